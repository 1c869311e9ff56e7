"""``dde-ds suggest-beta``: print the β for a small and for a large effect, from a run's first steps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

TARGETS = (0.5, 5.0)
"""The mean z of a cautious and of a strong choice. σ(-z) is then 0.38 and 0.007; at the start it is 0.5."""
LARGE = 1.0
"""The mean z above which another β would change the margins."""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "suggest-beta", help="print the β at which a run's first steps would have come to a small or a large z"
    )
    parser.set_defaults(act=suggest_beta)
    parser.add_argument("run", type=Path, help="a run folder; a run of 40 steps with any β will do")
    parser.add_argument("--steps", type=int, default=40, help="take the second half of so many first steps; default: 40")


def suggest_beta(args: argparse.Namespace) -> None:
    """Print the effect of β in a run's first steps, and the β for each mean z of ``TARGETS``."""
    from dde_ds.report.beta import measure_beta

    effect = measure_beta(args.run, args.steps)
    print(
        f"{effect.objective}: mean z without the correction {effect.mean_z:.3g} at β = {effect.beta:g}, mean of -g m {2 * effect.mean_z / effect.beta:.3g}"
        f" ({effect.rows} {'row' if effect.rows == 1 else 'rows'}, steps {effect.first} to {effect.last})"
    )
    for target in TARGETS:
        print(f"mean z {target:g}: β = {float(f'{effect.beta_for(target):.3g}'):g}")
    if effect.rate_share < 0.9:
        print(
            f"note: these steps ran at {effect.rate_share:.0%} of optimizer.learning_rate, in its warm-up: at the full rate margins grow faster, "
            "and the same mean z takes a lower β; take later steps, or a run with optimizer.warmup_steps=0"
        )
    if effect.mean_z > LARGE:
        print(
            f"note: a mean z above {LARGE:g} slows learning down, and a lower β would not: take fewer steps, or a run with a lower β"
        )
