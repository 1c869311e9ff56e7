"""``dde-ds demo`` and ``launchers/demo/run.py``: align a small model and measure it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """The demo: from image pairs to an aligned model and a measured win rate, by the commands that a large run uses.

    dde-ds demo [--output demo_run] [--zero 3] [-- key.sub=value …]

Shards the training pairs, aligns the base model with two DeepSpeed ranks (or the GPU that is there), draws base and aligned
model on held-out captions from equal noise, and lets a judge that never saw the policy say which style each picture has.
Whatever stands after ``--`` overrides the demo's ``train.yaml``. Done parts are not done again; delete the output folder to start over.
"""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="align a small emoji model and measure it, in minutes on two cores", description=DESCRIPTION
    )
    parser.set_defaults(act=demo)
    parser.add_argument("--output", type=Path, default=Path("demo_run"))
    parser.add_argument("--zero", choices=("2", "3"), default="2", help="DeepSpeed ZeRO stage of the policy")
    parser.add_argument("--images", type=int, default=2, help="images a held-out caption")
    parser.add_argument("--captions", type=int, help="only the first N held-out captions")
    parser.add_argument("--judge-steps", type=int, default=600)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")


def demo(args: argparse.Namespace) -> None:
    from dde_ds.demo.run import run_demo

    run_demo(args.output, args.zero, args.images, args.captions, args.judge_steps, args.overrides)
