"""Run the demo, from image pairs to an aligned model and a measured win rate: the same as ``dde-ds demo``.

python launchers/demo/run.py [--output demo_run] [--zero 3] [-- key.sub=value …]
"""

from __future__ import annotations

import sys

from dde_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
