"""``dde-ds plan``: print the plan of a run as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dde_ds.config import load_config
from dde_ds.errors import UserError
from dde_ds.planning.gpus import DEVICES, MFU, Device, find_device
from dde_ds.text import verbatim

GPU = "H100"


def add_commands(commands: Any) -> None:
    plan = commands.add_parser(
        "plan", help="memory, traffic, time and disk of a run, and whether it fits, without weights or a GPU"
    )
    plan.set_defaults(act=plan_run)
    plan.add_argument("config", help="YAML of a run")
    plan.add_argument("overrides", nargs="*", metavar="key.sub=value")
    plan.add_argument("--nodes", type=int, default=1)
    plan.add_argument("--gpus", type=int, default=8, help="of a node; default: 8")
    plan.add_argument("--gpu", default=GPU, help=f"which, for its peak and memory; default: {GPU}")
    plan.add_argument("--gpu-memory", type=int, metavar="GB", help="of one GPU, as it is sold; default: what --gpu has")
    plan.add_argument("--mfu", type=float, default=MFU, help=f"assumed share of the peak that is reached; default: {MFU:g}")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON: bytes, FLOPs, seconds")


def plan_run(args: argparse.Namespace) -> None:
    run = load_config(args.config, args.overrides)
    for flag, value in (("--nodes", args.nodes), ("--gpus", args.gpus), ("--gpu-memory", args.gpu_memory)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be 1 or more")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu:g}: must lie in (0, 1]")
    device = chosen_device(args.gpu, args.gpu_memory)
    # These imports take seconds, so the arguments are checked first.
    from dde_ds.data.mixture import open_sources
    from dde_ds.models.known import shipped_unet
    from dde_ds.models.silence import silence_libraries
    from dde_ds.planning.plan import make_plan
    from dde_ds.planning.workload import shards_are_there, workload_of
    from dde_ds.training.prepare import open_shards

    silence_libraries()
    unet, shards, data = shipped_unet(run.model.path, run.model.revision), None, run.data
    if shards_are_there(run) and unet is None:
        shards = open_shards(run)[0]
    elif shards_are_there(run):  # the model is not on this machine, so the shards are not compared with it
        shards = open_sources(
            data.weighted_paths, data.cache_dir, data.cache_gb, data.timeout_s, not data.max_bad_samples, data.key
        )
    plan = make_plan(run, workload_of(run, shards, unet), args.nodes, args.gpus, device, args.mfu)
    plan["model"]["architecture"] = "model.path" if unet is None else "shipped copy"
    if args.json:
        print(json.dumps(plan, indent=1))
    else:
        _print(plan)


def chosen_device(name: str, gibibytes: int | None) -> Device:
    device = find_device(name)
    if device is None:
        raise UserError(f"--gpu {name}: not known; known: {', '.join(device.name for device in DEVICES)}")
    return device if gibibytes is None else device._replace(gibibytes=gibibytes)


def _print(plan: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = verbatim(f"{plan['model']['path']} on {plan['batch']['ranks']} x {plan['time']['device']}")
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, lines in _rows(plan):
        table.add_row(name, Text("\n").join(map(verbatim, lines)), end_section=True)
    Console().print(table)


def _rows(plan: dict[str, Any]) -> list[tuple[str, list[str]]]:
    model, batch, chosen = plan["model"], plan["batch"], plan["settings"]
    flops, memory, traffic = plan["flops"], plan["memory"], plan["traffic"]
    time, data, saved = plan["time"], plan["data"], plan["checkpoints"]
    parts = ("weights", "gradients", "optimizer", "reference", "ema", "communication", "activations")
    breakdown = " + ".join(f"{part} {_gib(memory[part])}" for part in parts if memory[part])
    modes = ", ".join(f"{mode} {_gib(value)}" for mode, value in memory["activations_by_mode"].items())
    rows = [
        ("model", [
            f"{model['parameters']:,} parameters, {model['trained']:,} of them trained, latents {'x'.join(map(str, model['latent']))}, prompts of {model['tokens']} tokens",
            *(["architecture: shipped copy, since the model is not on this machine"] if model["architecture"] == "shipped copy" else []),
        ]),
        ("settings", [f"ZeRO-{chosen['stage']} ({chosen['deepspeed']}), {chosen['precision']}, {chosen['optimizer']}, gradient checkpointing "
                      f"{chosen['gradient_checkpointing']}, reference {chosen['reference'] or 'none'}"]),
        ("batch", [f"{batch['pairs']} pairs a step = {batch['nodes']} nodes x {batch['ranks'] // batch['nodes']} ranks x {batch['accumulation']} "
                   f"micro-batches of {batch['micro']}"]),
        ("computing", [f"{flops['forward_latent'] / 1e12:.4g} TFLOP to predict a latent, {flops['pair'] / 1e12:.4g} to train on a pair, "
                       f"{flops['pair_recomputed'] / 1e12:.4g} more by gradient checkpointing"]),
        ("memory of a rank", [
            f"{_gib(memory['peak'])} GiB = {breakdown}" if memory["communication"] + memory["activations"] >= memory["step"]
            else f"{_gib(memory['peak'])} GiB, in the optimizer step",
            f"activations, counted uncompiled, by gradient checkpointing: {modes}",
            *([f"and {_gib(memory['host'])} GiB of the host's"] if memory["host"] else []),
        ]),
        ("traffic of a step", [
            f"{traffic['inside'] / 1e9:.1f} GB from each rank" + (f", {traffic['between'] / 1e9:.1f} GB out of each node" if traffic["between"] else "")
        ]),
    ]  # fmt: skip
    if time["step"] is None:
        rows.append(("time", ["not planned in float32: no one peak is known"]))
    else:
        rows.append(("time", [
            f"{time['step']:.3g} s a step, {time['pairs_per_s']:.4g} pairs/s, {time['run_hours']:.4g} h for {batch['steps']} steps, "
            f"{time['gpu_hours']:,.0f} GPU-hours",
            f"if {time['mfu']:.0%} of {time['peak_flops'] / 1e12:.0f} TFLOP/s is reached and nothing waits: an assumption, not a measurement",
        ]))  # fmt: skip
    rows.append(("data", [
        f"{data['pair_bytes'] / 1e3:.0f} kB a pair" + (f", {data['bytes_per_s'] / 1e6:.1f} MB/s over all ranks" if data["bytes_per_s"] else ""),
        f"{data['pairs']} pairs in {data['shards_bytes'] / 1e9:.2f} GB of shards, {data['epochs']:.2f} epochs" if data["pairs"]
        else "shards not there yet: latents of the size that the model was trained at",
    ]))  # fmt: skip
    rows.append(("checkpoints", [
        f"{saved['bytes'] / 1e9:.1f} GB each, {saved['save_seconds']:.0f} s at an assumed {saved['disk_bytes_per_s'] / 1e9:g} GB/s; at most {saved['kept']} "
        f"and the export take {saved['disk'] / 1e9:.0f} GB",
    ]))  # fmt: skip
    rows.append(("verdict", [_verdict(plan)]))
    return rows


def _verdict(plan: dict[str, Any]) -> str:
    memory, verdict = plan["memory"], plan["verdict"]
    limit = f"{_gib(memory['device'])} GiB less {_gib(memory['held_back'])} assumed for CUDA, NCCL and gaps"
    if verdict["fits"]:
        return f"fits, with {_gib(verdict['room'])} GiB of room ({limit})"
    hint = f"this would fit: {' '.join(verdict['change'])}" if verdict["change"] else "more GPUs or a smaller model are needed"
    return f"does not fit, by {_gib(-verdict['room'])} GiB ({limit}); {hint}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}" if size >= 2**30 / 10 else f"{size / 2**30:.2g}"
