"""The argument parser of all commands."""

from __future__ import annotations

import argparse
from typing import Any

from dde_ds import __version__


class Parser(argparse.ArgumentParser):
    """Takes options by their whole names alone, and what the deepspeed launcher adds."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.add_argument("--version", action="version", version=f"dde_ds {__version__}")
        self.add_argument("--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
