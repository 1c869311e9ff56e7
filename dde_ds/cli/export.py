"""``dde-ds export``: make a model from a run's checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from dde_ds.config import config_of
from dde_ds.errors import UserError


def add_commands(commands: Any) -> None:
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


def export(args: argparse.Namespace) -> None:
    """Write a model from a checkpoint. This needs no GPU."""
    from dde_ds.engine import checkpoint
    from dde_ds.engine.export import export_checkpoint
    from dde_ds.models.silence import silence_libraries
    from dde_ds.rows import is_metrics, last_numbers, read_rows
    from dde_ds.training.check import WEIGHTS, base_identity
    from dde_ds.training.prepare import build_run_objective
    from dde_ds.training.resume import require_same_base

    silence_libraries()
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
            identity = base_identity(run.model, build_run_objective(run), WEIGHTS in known and args.format != "kohya")
            require_same_base(run.model.path, identity, chosen[-1], known)
        if args.model and WEIGHTS not in known:
            print(
                f"note: this checkpoint is of an earlier version and does not know its base's weights: {args.model} is taken for it"
            )
        # The metrics lie in the run folder. There are none for a checkpoint that was moved out of it.
        rows = [row for row in read_rows(chosen[-1].parent.parent / "metrics.jsonl", is_metrics) if row["step"] <= state["step"]]
        metrics = last_numbers(rows)
        export_checkpoint(chosen[-1], run, metrics, args.output, args.dtype, args.format, args.raw, args.max_shard_size)
    except checkpoint.DamagedError as error:
        raise UserError(f"{error}; export an older one") from None
    print(f"{chosen[-1].name} → {args.output}")
