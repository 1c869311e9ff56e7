"""Check shards: checksums, shapes, types, finite values, prompt references, names of members: the same as ``dde-ds verify``."""

from __future__ import annotations

import sys

from dde_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
