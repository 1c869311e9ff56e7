"""``dde-ds relabel``: score both pictures of every pair of an input."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dde_ds.cli.evaluate import join, progress
from dde_ds.cli.shard import add_input, input_pairs
from dde_ds.errors import UserError
from dde_ds.text import printable

DESCRIPTION = """Score both pictures of every pair, so that a scorer can label pairs instead of people or beside them.

    dde-ds relabel --input 'pickapic_v2/data/train-*.parquet' --scorer pickscore --output labels.jsonl
    dde-ds shard --input 'pickapic_v2/data/train-*.parquet' --labels labels.jsonl --labels-as winner --model … --output …
    deepspeed --module dde_ds.cli relabel …      # on many GPUs

Start it again to go on: nothing is scored twice. Ties and rows without a label are scored too.
"""


def add_commands(commands: Any) -> None:
    """Add ``relabel`` to the subcommands."""
    parser = commands.add_parser("relabel", help="let scorers label the pairs of an input", description=DESCRIPTION)
    parser.set_defaults(act=relabel_pairs, report={"over_ranks": True, "kept": "what is scored is kept, a second run goes on"})
    add_input(parser)
    parser.add_argument(
        "--scorer",
        nargs="+",
        required=True,
        metavar="NAME[=MODEL[,PROCESSOR]]",
        help="clip, pickscore, hps_v2, hps_v2.1 or aesthetic, or FILE.py:NAME, as for evaluate",
    )
    parser.add_argument("--output", type=Path, required=True, help="the file of labels, such as labels.jsonl")
    parser.add_argument("--batch", type=int, default=8, help="pairs scored at a time")


def relabel_pairs(args: argparse.Namespace) -> None:
    """Score this rank's share of the pairs. The first rank writes the file and prints a summary."""
    from dde_ds.evaluation.relabel import relabel
    from dde_ds.evaluation.scorers import build_scorers

    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: must be 1 or more")
    if not args.output.absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: its folder does not exist")
    source = input_pairs(args)  # Refuse a bad input before minutes of loading.
    ranks, device = join()
    scorers = build_scorers(args.scorer, device)
    with progress("pairs", ranks) as advance:
        summary = relabel(source, args.output, scorers, ranks, device, args.batch, advance)
    if summary is None:
        return
    for what, count in sorted(summary["rows"].items(), key=lambda item: -item[1]):
        print(printable(f"{count:,} pairs: {what}"))
    for name, count in summary["agree"].items():
        if summary["decided"]:
            print(f"{name} agrees with people on {count / summary['decided']:.1%} of {summary['decided']:,} decided pairs")
    print(printable(str(args.output)))
