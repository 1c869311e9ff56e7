"""Align a diffusion model with preference pairs: ``dde-ds train`` as one rank, for launchers that start a script.

    deepspeed launchers/train.py --config launchers/recipes/sdxl_dde.yaml optimizer.learning_rate=1e-8 output=runs/first

Exit code 0: done. 75: stopped as asked and resumable. 1: an error, in one line.
"""

from __future__ import annotations

from dde_ds.training.signals import listen

if __name__ == "__main__":
    listen()  # before any slow import, so that a request to stop counts from the start

import sys

from dde_ds.cli import main
from dde_ds.distributed.process import end_process

if __name__ == "__main__":
    end_process(main(["train", "--one-rank", *sys.argv[1:]]))
