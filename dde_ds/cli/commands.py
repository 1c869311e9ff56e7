"""Align text-to-image diffusion models with preference pairs: make shards, plan, train, export, evaluate."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from dde_ds import planner, push
from dde_ds.cli import demo, inspect_shards, recipe, shard, train, verify_shards
from dde_ds.cli.parsing import Parser
from dde_ds.cli.reporting import report_errors
from dde_ds.config import LONGEST_TIMEOUT, config_of, load_config
from dde_ds.errors import UserError
from dde_ds.evaluation.commands import add_commands
from dde_ds.ranks import read_hostfile
from dde_ds.text import without_passwords


def run(arguments: list[str]) -> int:
    """Parse a command and do it. Returns its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one piece: overrides behind an option are left over.
    may_be_left = args.command == "train"  # which takes its configuration among them
    if unknown := [
        word for word in rest if not hasattr(args, "overrides") or word.startswith("-") or not ("=" in word or may_be_left)
    ]:
        parser.error(without_passwords(f"unrecognized arguments: {' '.join(unknown)}"))
    if rest:
        args.overrides = [*args.overrides, *rest]
    # What does not run on several ranks never looks at the launcher's variables, which may be there in part.
    how: dict[str, Any] = (
        {"over_ranks": False} | getattr(args, "report", {}) | ({"over_ranks": False} if getattr(args, "alone", False) else {})
    )
    return report_errors(lambda: args.act(args), **how)


def build_parser() -> Parser:
    parser = Parser(prog="dde-ds", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for module in (train, demo, recipe, shard, verify_shards, inspect_shards):
        module.add_commands(commands)
    check = commands.add_parser("validate", help="check a configuration, its shards and its model, without loading weights")
    check.set_defaults(
        act=lambda args: validate(
            args.config, args.overrides, sum(read_hostfile(args.hostfile).values()) if args.hostfile else args.ranks, args.resume
        )
    )
    check.add_argument("config", help="YAML of a run")
    check.add_argument("overrides", nargs="*", metavar="key.sub=value")
    check.add_argument("--ranks", type=int, default=1, help="how many GPUs will run it")
    check.add_argument("--hostfile", help="check this too, and count its slots, in the place of --ranks")
    check.add_argument("--resume", action="store_true", help="check that the run can go on from its newest checkpoint")
    planner.add_command(commands)
    picture = commands.add_parser("explain", help="draw which timesteps an objective teaches, from the schedule or from a run")
    picture.set_defaults(act=explain)
    picture.add_argument("--objective", nargs="+", metavar="NAME", help="default: all that compare pairs")
    picture.add_argument("--model", help="diffusers folder or hub id whose noise schedule is taken; default: Stable Diffusion's")
    picture.add_argument("--beta", type=float, help="default: 2000")
    picture.add_argument(
        "--margin", type=float, help="how far ahead every pair is assumed to be, as a mean squared error; default: 1e-3"
    )
    picture.add_argument("--run", type=Path, help="a run folder: draw what its correction table recorded instead")
    picture.add_argument("--credit-only", action="store_true", help="draw the credit profiles alone")
    picture.add_argument("--output", type=Path, default=Path("explain.png"))
    model = commands.add_parser("export", help="make a model from a run's newest checkpoint, or from one of your choice")
    model.set_defaults(act=export)
    model.add_argument("source", type=Path, help="run folder, or a folder in its checkpoints/")
    model.add_argument(
        "--output", type=Path, required=True, help="folder to write; with --format kohya or single a .safetensors file"
    )
    model.add_argument(
        "--format",
        default="folder",
        help="folder: for diffusers, with a LoRA run's adapters merged and beside it; lora: a folder of the adapters alone; "
        "kohya: the adapters in one file for ComfyUI, A1111 and sd-scripts; single: one file in the layout of the original Stable Diffusion code",
    )
    model.add_argument("--dtype", default="fp32", help="of the UNet, of adapters, or of a single file: fp32, bf16 or fp16")
    model.add_argument("--max-shard-size", metavar="5GB", help="split the folder's weights into files of at most this size")
    model.add_argument("--raw", action="store_true", help="the weights themselves, where the run kept a moving average of them")
    model.add_argument("--model", metavar="PATH", help="where the run's base lies now, if it was moved: its content is compared")
    model.add_argument("--revision", help="of --model, where it is a hub id")
    model.add_argument("--variant", help="of --model's weight files, such as fp16")
    doctor = commands.add_parser("doctor", help="check machines, network and folders, under the launcher that the run will use")
    doctor.set_defaults(act=diagnose, report={"over_ranks": True})
    doctor.add_argument("config", nargs="?", help="YAML of a run: its folders are checked too")
    doctor.add_argument("overrides", nargs="*", metavar="key.sub=value")
    doctor.add_argument("--timeout-minutes", type=float, default=2.0, help="how long to wait for the other ranks")
    add_commands(commands)
    push.add_command(commands)
    return parser


def diagnose(args: argparse.Namespace) -> int:
    from dde_ds import doctor

    if not 0 < args.timeout_minutes <= LONGEST_TIMEOUT:
        raise UserError(f"--timeout-minutes {args.timeout_minutes:g}: must be above 0, and {LONGEST_TIMEOUT:,} or less")
    return doctor.diagnose(load_config(args.config, args.overrides) if args.config else None, args.timeout_minutes)


def explain(args: argparse.Namespace) -> None:
    """Draw an objective, or what a run made of it, and print where its credit lies."""
    from rich.console import Console
    from rich.table import Table

    from dde_ds.evaluation import explain as pictures
    from dde_ds.models.unet import load_scheduler_config
    from dde_ds.objective.objective import build_objective
    from dde_ds.objective.schedule import NoiseSchedule
    from dde_ds.objective.specs import COMPARING

    if args.run:
        own = [name for name in ("objective", "model", "beta", "margin", "credit_only") if getattr(args, name)]
        if own:
            raise UserError(f"--{own[0].replace('_', '-')}: a run has its own objective and schedule; leave it out beside --run")
        from dde_ds.training.prepare import load_run_objective

        pictures.draw_run(*load_run_objective(args.run), args.output)
        print(args.output)
        return
    margin = 1e-3 if args.margin is None else args.margin
    if not margin > 0:
        raise UserError(f"--margin {margin}: must be above 0")
    beta = 2000.0 if args.beta is None else args.beta
    names = args.objective or list(COMPARING)
    schedule = NoiseSchedule.from_scheduler(load_scheduler_config(args.model) if args.model else pictures.STABLE_DIFFUSION)
    objectives = [build_objective(name, schedule, beta=beta) for name in names]
    found = pictures.profiles(objectives, margin)
    title = f"Which timesteps an objective teaches: |∂loss/∂d| at β = {beta:g}, every pair {margin:g} ahead"
    if args.credit_only:
        pictures.draw_credit(found, args.output, title)
    else:
        pictures.draw_objectives(found, schedule, margin, args.output)
    table = Table(title=title)
    for column in ("objective", "peak at t", "middle half of the credit", "saturated timesteps"):
        table.add_column(column)
    for row in pictures.summary(found):
        table.add_row(*row)
    Console().print(table)
    print(args.output)


def export(args: argparse.Namespace) -> None:
    """A model from a checkpoint, without a GPU."""
    from dde_ds.engine import checkpoint
    from dde_ds.engine.export import export_checkpoint
    from dde_ds.models.quiet import quiet_libraries
    from dde_ds.rows import is_metrics, last_numbers, read_rows
    from dde_ds.training.check import WEIGHTS, base_identity
    from dde_ds.training.prepare import build_run_objective
    from dde_ds.training.resume import require_same_base

    quiet_libraries()
    for option in ("revision", "variant"):
        if getattr(args, option) and not args.model:
            raise UserError(f"--{option}: belongs to --model, which is not given")
    source = args.source
    chosen = [source] if (source / checkpoint.MANIFEST).is_file() else checkpoint.list_checkpoints(source / "checkpoints")
    if not chosen:
        raise UserError(f"{source}: neither a run folder with a finished checkpoint nor a checkpoint")
    try:
        state = checkpoint.read_state(chosen[-1])
        run = config_of(state["config"])
        if args.model:
            run = replace(run, model=replace(run.model, path=args.model, revision=args.revision, variant=args.variant))
        known = state["identity"]
        if args.format != "lora" or args.model:  # adapters alone need no base
            own = base_identity(run.model, build_run_objective(run), WEIGHTS in known and args.format != "kohya")
            require_same_base(run.model.path, own, chosen[-1], known)
        if args.model and WEIGHTS not in known:
            print(
                f"note: this checkpoint is of an earlier version and does not know its base's weights: {args.model} is taken for it"
            )
        # Of the run folder, where the checkpoint still lies in one.
        rows = [row for row in read_rows(chosen[-1].parent.parent / "metrics.jsonl", is_metrics) if row["step"] <= state["step"]]
        metrics = last_numbers(rows)
        export_checkpoint(chosen[-1], run, metrics, args.output, args.dtype, args.format, args.raw, args.max_shard_size)
    except checkpoint.DamagedError as error:
        raise UserError(f"{error}; export an older one") from None
    print(f"{chosen[-1].name} → {args.output}")


def validate(config: str, overrides: list[str], ranks: int, resume: bool = False) -> None:
    """Everything that would stop a run in its first minute, found without starting it."""
    run = load_config(config, overrides)
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: must be 1 or more")
    accumulation = run.batch.accumulation(ranks)

    from dde_ds.engine.zero import complete_config
    from dde_ds.models.quiet import quiet_libraries
    from dde_ds.training.check import check_start, require_writable
    from dde_ds.training.ledger import check_ledger
    from dde_ds.training.prepare import build_run_objective, open_shards
    from dde_ds.training.resume import check_folder

    quiet_libraries()
    require_writable(Path(run.output))
    ds_config = complete_config(run, ranks)
    stage = ds_config["zero_optimization"]["stage"]
    shards, held_out = open_shards(run)
    objective = build_run_objective(run)
    base, said = check_start(run, shards, held_out, objective, ds_config, ranks, download=False)
    check_folder(run, shards, base, resume)
    check_ledger(run, shards, objective)
    for line in said:
        print(f"note: {line}")
    samples = sum(shards.counts)
    print(f"{objective.name}, ZeRO-{stage}, {run.precision}, latents {'x'.join(map(str, shards.latent_shape))}")
    print(f"{run.batch.pairs} pairs a step = {ranks} ranks x {accumulation} micro-batches of {run.batch.micro}")
    print(
        f"{run.steps} steps = {run.steps * run.batch.pairs} pairs = {run.steps * run.batch.pairs / samples:.2f} epochs of {samples}"
    )
