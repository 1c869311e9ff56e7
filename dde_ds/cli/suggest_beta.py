"""``dde-ds suggest-beta``: print which β would have which effect, from a run's first steps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

TARGETS = (0.5, 5.0)
"""Mean z of a cautious and of a strong choice: σ(-z) is 0.38 and 0.007, of 0.5 at the start."""
LARGE = 1.0
"""Mean z from which on the margins of another β would no longer be the same."""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "suggest-beta", help="print the β at which a run's first steps would have come to a small or a large z"
    )
    parser.set_defaults(act=suggest_beta)
    parser.add_argument("run", type=Path, help="a run folder; a run of 40 steps with any β will do")
    parser.add_argument("--steps", type=int, default=40, help="take the second half of so many first steps; default: 40")


def suggest_beta(args: argparse.Namespace) -> None:
    """Print what β came to in a run's first steps, and the β for each of ``TARGETS``."""
    from dde_ds.report.beta import measure_beta

    found = measure_beta(args.run, args.steps)
    print(
        f"{found.objective}: mean z without the correction {found.mean_z:.3g} at β = {found.beta:g}, mean of -g m {2 * found.mean_z / found.beta:.3g}"
        f" ({found.rows} {'row' if found.rows == 1 else 'rows'}, steps {found.first} to {found.last})"
    )
    for target in TARGETS:
        print(f"mean z {target:g}: β = {float(f'{found.beta_for(target):.3g}'):g}")
    if found.rate_share < 0.9:
        print(
            f"note: these steps ran at {found.rate_share:.0%} of optimizer.learning_rate, in its warm-up: at the full rate margins grow faster, "
            "and the same mean z takes a lower β; take later steps, or a run with optimizer.warmup_steps=0"
        )
    if found.mean_z > LARGE:
        print(
            f"note: a mean z above {LARGE:g} slows learning down, and a lower β would not: take fewer steps, or a run with a lower β"
        )
