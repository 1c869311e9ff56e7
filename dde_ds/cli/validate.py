"""``dde-ds validate``: find what would stop a run in its first minutes, without loading weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dde_ds.config import load_config
from dde_ds.distributed.hostfile import read_hostfile
from dde_ds.errors import UserError


def add_commands(commands: Any) -> None:
    check = commands.add_parser("validate", help="check a configuration, its shards and its model, without loading weights")
    check.set_defaults(
        act=lambda args: validate(
            args.config, args.overrides, sum(read_hostfile(args.hostfile).values()) if args.hostfile else args.ranks, args.resume
        )
    )
    check.add_argument("config", help="YAML of a run")
    check.add_argument("overrides", nargs="*", metavar="key.sub=value")
    check.add_argument("--ranks", type=int, default=1, help="how many GPUs will run it")
    check.add_argument("--hostfile", help="check this too, and count its slots, instead of --ranks")
    check.add_argument("--resume", action="store_true", help="check that the run can go on from its newest checkpoint")


def validate(config: str, overrides: list[str], ranks: int, resume: bool = False) -> None:
    """Find what would stop a run in its first minutes, without starting the run. Print notes and a summary.

    Raises:
        UserError: the first problem found.
    """
    run = load_config(config, overrides)
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: must be 1 or more")
    accumulation = run.batch.accumulation(ranks)

    from dde_ds.engine.zero import complete_config
    from dde_ds.models.silence import silence_libraries
    from dde_ds.training.check import check_start, require_writable
    from dde_ds.training.precomputed import check_precomputed
    from dde_ds.training.prepare import build_run_objective, open_shards
    from dde_ds.training.resume import check_folder

    silence_libraries()
    require_writable(Path(run.output))
    ds_config = complete_config(run, ranks)
    stage = ds_config["zero_optimization"]["stage"]
    shards, held_out = open_shards(run)
    objective = build_run_objective(run)
    base, said = check_start(run, shards, held_out, objective, ds_config, ranks, download=False)
    check_folder(run, shards, base, resume)
    check_precomputed(run, shards, objective)
    for line in said:
        print(f"note: {line}")
    samples = sum(shards.counts)
    print(f"{objective.name}, ZeRO-{stage}, {run.precision}, latents {'x'.join(map(str, shards.latent_shape))}")
    print(f"{run.batch.pairs} pairs a step = {ranks} ranks x {accumulation} micro-batches of {run.batch.micro_batch_size}")
    print(
        f"{run.steps} steps = {run.steps * run.batch.pairs} pairs = {run.steps * run.batch.pairs / samples:.2f} epochs of {samples}"
    )
