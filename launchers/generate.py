"""Draw a model's images for evaluation, split over all ranks: the same as ``dde-ds generate``.

deepspeed launchers/generate.py --model runs/first/export --prompts prompts.txt --out images/first
"""

from __future__ import annotations

import sys

from dde_ds.cli import main
from dde_ds.distributed.process import end_process

if __name__ == "__main__":
    end_process(main(["generate", *sys.argv[1:]]))
