"""``dde-ds explain``: draw which timesteps an objective teaches."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from dde_ds.errors import UserError


def add_commands(commands: Any) -> None:
    picture = commands.add_parser("explain", help="draw which timesteps an objective teaches, from the schedule or from a run")
    picture.set_defaults(act=explain)
    picture.add_argument("--objective", nargs="+", metavar="NAME", help="default: all with a gain")
    picture.add_argument("--model", help="diffusers folder or hub id whose noise schedule is taken; default: Stable Diffusion's")
    picture.add_argument("--beta", type=float, help="default: 2000")
    picture.add_argument(
        "--margin", type=float, help="how far ahead every pair is assumed to be, as a mean squared error; default: 1e-3"
    )
    picture.add_argument(
        "--spread", type=float, help="standard deviation of the pairs' margins around it; default: 0, every pair at the mean"
    )
    picture.add_argument(
        "--run", type=Path, help="a run folder: draw what it recorded instead: credit over its pairs, correction, drift"
    )
    picture.add_argument("--credit-only", action="store_true", help="draw the credit profiles alone")
    picture.add_argument("--output", type=Path, default=Path("explain.png"))


def explain(args: argparse.Namespace) -> None:
    """Draw which timesteps the objectives teach, and print where their credit lies.

    With ``--run``, draw instead what a run recorded, and print each tenth's share of its credit.
    """
    from rich.console import Console
    from rich.table import Table

    from dde_ds.models.unet import load_scheduler_config
    from dde_ds.objective.objective import build_objective
    from dde_ds.objective.schedule import NoiseSchedule
    from dde_ds.objective.specs import LINKED
    from dde_ds.report import explain as pictures

    if args.run:
        unused = [name for name in ("objective", "model", "beta", "margin", "spread") if getattr(args, name) is not None]
        if unused:
            raise UserError(f"--{unused[0].replace('_', '-')}: a run has its own objective and schedule; leave it out beside --run")
        from dde_ds.training.prepare import load_run_objective

        objective, history, credited = load_run_objective(args.run)
        shares = pictures.draw_run(objective, history, credited, args.output, args.credit_only)
        steps = objective.schedule.num_train_timesteps
        table = Table(
            "credit", *(f"{tenth * steps // 10}-" for tenth in range(10)), title="Share of each tenth of the timesteps, in %"
        )
        for name, values in shares:
            table.add_row(name, *(f"{100 * value:.1f}" for value in values))
        Console().print(table)
        print(args.output)
        return
    margin = 1e-3 if args.margin is None else args.margin
    if not margin > 0:
        raise UserError(f"--margin {margin}: must be above 0")
    spread = args.spread or 0.0
    if not 0 <= spread < math.inf:
        raise UserError(f"--spread {spread}: must be a finite number, 0 or more")
    beta = 2000.0 if args.beta is None else args.beta
    names = args.objective or list(LINKED)
    schedule = NoiseSchedule.from_scheduler(load_scheduler_config(args.model) if args.model else pictures.STABLE_DIFFUSION)
    objectives = [build_objective(name, schedule, beta=beta, correction_buckets=1) for name in names]
    by_name = pictures.profiles(objectives, margin, spread)
    ahead = f"pairs {margin:g} ± {spread:g}" if spread else f"every pair {margin:g}"
    title = f"Which timesteps an objective teaches: |∂loss/∂d| at β = {beta:g}, {ahead} ahead"
    if args.credit_only:
        pictures.draw_credit(by_name, args.output, title)
    else:
        pictures.draw_objectives(by_name, schedule, margin, args.output)
    table = Table(title=title)
    for column in ("objective", "peak at t", "middle half of the credit", "saturated timesteps"):
        table.add_column(column)
    for row in pictures.summary(by_name):
        table.add_row(*row)
    Console().print(table)
    print(args.output)
