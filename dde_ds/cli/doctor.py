"""``dde-ds doctor``: check machines, network and folders before a run."""

from __future__ import annotations

import argparse
from typing import Any

from dde_ds.config import LONGEST_TIMEOUT, load_config
from dde_ds.errors import UserError


def add_commands(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="check machines, network and folders, under the launcher that the run will use")
    doctor.set_defaults(act=diagnose, report={"over_ranks": True})
    doctor.add_argument("config", nargs="?", help="YAML of a run: its folders are checked too")
    doctor.add_argument("overrides", nargs="*", metavar="key.sub=value")
    doctor.add_argument("--timeout-minutes", type=float, default=2.0, help="how long to wait for the other ranks")


def diagnose(args: argparse.Namespace) -> int:
    from dde_ds import doctor

    if not 0 < args.timeout_minutes <= LONGEST_TIMEOUT:
        raise UserError(f"--timeout-minutes {args.timeout_minutes:g}: must be above 0, and {LONGEST_TIMEOUT:,} or less")
    return doctor.diagnose(load_config(args.config, args.overrides) if args.config else None, args.timeout_minutes)
