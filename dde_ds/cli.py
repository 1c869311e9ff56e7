"""``dde-ds``: what can be found out about a run before or after it."""

from __future__ import annotations

import argparse
import sys

from dde_ds.config import load_config
from dde_ds.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dde-ds", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("validate", help="check a configuration, its shards and its model, without loading weights")
    check.add_argument("config", help="YAML of a run")
    check.add_argument("overrides", nargs="*", metavar="key.sub=value")
    check.add_argument("--ranks", type=int, default=1, help="how many GPUs will run it")
    args = parser.parse_args(arguments)
    try:
        validate(args.config, args.overrides, args.ranks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def validate(config: str, overrides: list[str], ranks: int) -> None:
    """Everything that would stop a run in its first minute, found without starting it."""
    run = load_config(config, overrides)
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: must be 1 or more")
    accumulation = run.batch.accumulation(ranks)

    from dde_ds.engine.zero import complete_config
    from dde_ds.training.loop import build_run_objective, check_fit, open_run_shards

    stage = complete_config(run, ranks)["zero_optimization"]["stage"]
    shards = open_run_shards(run)
    check_fit(run, shards)
    objective = build_run_objective(run)
    samples = sum(shards.counts)
    print(f"{objective.name}, ZeRO-{stage}, {run.precision}, latents {'x'.join(map(str, shards.latent_shape))}")
    print(f"{run.batch.pairs} pairs a step = {ranks} ranks x {accumulation} micro-batches of {run.batch.micro}")
    print(
        f"{run.steps} steps = {run.steps * run.batch.pairs} pairs = {run.steps * run.batch.pairs / samples:.2f} epochs of {samples}"
    )
