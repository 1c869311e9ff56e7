"""Draw a model's images for evaluation, split over all ranks.

    deepspeed launchers/generate.py --model runs/first/export --prompts prompts.txt --out images/first

Each image is a function of (model, seed, prompt, image number) alone: any number of ranks gives the same. Start it again to
make what is missing. Exit code 0: all images are there. 1: an error, in one line. 130: Ctrl-C; what is made is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dde_ds.cli import report_errors
from dde_ds.evaluation.commands import add_drawing, generate
from dde_ds.ranks import end_process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="diffusers folder or hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--prompts", required=True, help="txt (one a line), jsonl or parquet (caption, prompt or text)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    add_drawing(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    args = parser.parse_args()
    return report_errors(lambda: generate(args))


if __name__ == "__main__":
    end_process(main())
