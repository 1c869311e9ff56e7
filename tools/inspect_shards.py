"""Say what shards hold, and show some of their pairs: the same as ``dde-ds inspect``."""

from __future__ import annotations

import sys

from dde_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
