"""Plan a run without weights and without a GPU: batch, memory, traffic, time, disk, and whether the run fits.

Most numbers are counted, not guessed. :mod:`dde_ds.planning.cost` counts FLOPs and activations, :mod:`dde_ds.planning.memory`
what engines hold, and :mod:`dde_ds.planning.traffic` what they send. The utilisation, the disk's speed and the reserved memory
are assumed, and the plan says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dde_ds.config import RunConfig
from dde_ds.engine.adamw8bit import check_partition
from dde_ds.engine.reference import reference_config
from dde_ds.engine.zero import complete_config
from dde_ds.errors import UserError
from dde_ds.models.family import BATCH_NAMES, conditioning_shapes
from dde_ds.objective.specs import OBJECTIVES
from dde_ds.planning import cost
from dde_ds.planning.gpus import MFU, Device
from dde_ds.planning.memory import MOMENT_BYTES, Memory, policy_memory, reference_memory, stage_of
from dde_ds.planning.traffic import step_traffic

DISK_BYTES_PER_S = 1e9
"""Assumed speed of the file system that checkpoints are written to."""
RESERVED_FRACTION = 0.08
"""Assumed share of a device's memory for the CUDA context, NCCL's buffers, libraries' workspaces and gaps of the allocator."""
MODES = ("none", "selective", "every_2", "full")
"""Modes of gradient checkpointing, from the fastest to the one that keeps least."""
SHARD_WIDTH = 2
"""Bytes of a number in a shard: latents and embeddings are stored in float16."""


@dataclass(frozen=True)
class Workload:
    """The facts about model and data that the plan depends on."""

    unet: dict
    """The UNet's ``config.json``."""
    latent: tuple[int, int, int]
    """Shape of a latent, (C,H,W)."""
    tokens: int
    """Length of a prompt's embeddings, in tokens."""
    pair_bytes: float
    """Bytes of a pair's latents and prompt in the shards."""
    data_bytes: int | None = None
    """Bytes of all shards; None if the shards are not made yet."""
    pairs: int | None = None
    """Pairs in the shards; None if the shards are not made yet."""

    part: cost.Adapters | cost.Selection | None = None
    """Adapters or parameters that are trained instead of the whole UNet; None if the whole UNet is trained."""
    float32_output: bool = True
    """True if the last layer is computed in float32, as ``model.float32_output`` says."""

    @property
    def sizes(self) -> cost.Sizes:
        """Return the number of elements in each parameter, trained and frozen."""
        return cost.parameter_sizes(self.unet, self.part)

    def pair_flops(self, with_reference: bool) -> int:
        """Return the FLOPs of training on one pair, without recomputation."""
        if self.part is None:
            return cost.pair_flops(self.unet, self.latent, self.tokens, with_reference)
        # Frozen weights need no gradients, so the backward pass is no longer twice the forward pass.
        reference = 2 * with_reference * cost.forward_flops(self.unet, self.latent, self.tokens)
        return self.training_pass("none", torch.bfloat16).flops + reference

    def training_pass(self, checkpointing: str, dtype: torch.dtype) -> cost.Pass:
        """Return memory and FLOPs of the policy's forward and backward pass on one pair."""
        return cost.training_pass(
            self.unet,
            self.latent,
            checkpointing,
            dtype,
            self.tokens,
            part=self.part,
            float32_output=self.float32_output,
        )


def stored_pair_bytes(unet: dict, latent: tuple[int, int, int], tokens: int) -> int:
    """Return the bytes of two latents and one prompt's embeddings in a shard."""
    prompt = [shape for name, shape in conditioning_shapes(unet, tokens).items() if name in BATCH_NAMES.values()]
    return SHARD_WIDTH * (2 * math.prod(latent) + sum(map(math.prod, prompt)))


def make_plan(run: RunConfig, workload: Workload, nodes: int, gpus: int, device: Device, mfu: float = MFU) -> dict[str, Any]:
    """Return the plan as plain data: bytes, FLOPs, seconds, and hours where a key says so.

    Raises:
        UserError: a batch that does not divide (the message says what would), or a contradiction with the DeepSpeed file.
    """
    world = nodes * gpus
    chosen = run
    if run.model.gradient_checkpointing == "auto":
        picked = pick_checkpointing(run, workload, world, gpus, usable(device))
        chosen = _change(run, {"model.gradient_checkpointing": picked or MODES[-1]})
    config = complete_config(chosen, world, gpus)
    if run.optimizer.type == "adamw_8bit":
        check_partition(sum(workload.sizes.trained), world)
    accumulation = chosen.batch.accumulation(world)
    mode, dtype = chosen.model.gradient_checkpointing, _dtype(chosen)
    with_reference = needs_reference(chosen)
    pair = workload.pair_flops(with_reference)
    passes = {name: workload.training_pass(name, dtype) for name in {*MODES, mode}}
    again = passes[mode].flops - passes["none"].flops
    memory = rank_memory(chosen, workload, world, gpus)
    room = usable(device) - memory.peak
    frozen = _reference_config(chosen, config)
    read_twice = config if with_reference and run.lora else frozen
    sent = step_traffic(
        workload.sizes, config, nodes, gpus, accumulation, [*workload.sizes.trained, *workload.sizes.frozen], read_twice
    )
    speed = device.flops * mfu if run.precision == "bf16" else None
    seconds = run.batch.pairs * (pair + again) / (world * speed) if speed else None
    checkpoint = checkpoint_bytes(run, workload.sizes)
    kept = kept_checkpoints(run)
    return {
        "model": {"path": run.model.path, "parameters": sum(map(sum, workload.sizes)), "trained": sum(workload.sizes.trained), "latent": list(workload.latent), "tokens": workload.tokens},
        "batch": {
            "pairs": run.batch.pairs, "nodes": nodes, "ranks": world, "micro": run.batch.micro_batch_size, "accumulation": accumulation,
            "steps": run.steps,
        },
        "settings": {
            "deepspeed": run.deepspeed, "stage": stage_of(config), "precision": run.precision, "gradient_checkpointing": mode,
            "optimizer": run.optimizer.type, "reference": "the policy without its adapters" if with_reference and run.lora else _placement(frozen),
        },
        "flops": {
            "forward_latent": cost.forward_flops(workload.unet, workload.latent, workload.tokens), "pair": pair, "pair_recomputed": again,
            "step": run.batch.pairs * (pair + again),
        },
        "memory": dataclasses.asdict(memory) | {
            "peak": memory.peak, "held_back": device.gibibytes * 2**30 - usable(device), "device": device.gibibytes * 2**30,
            "activations_by_mode": {name: passes[name].peak * run.batch.micro_batch_size for name in sorted(passes, key=_saving)},
        },
        "traffic": {"inside": sent.inside, "between": sent.between},
        "time": {
            "device": device.name, "peak_flops": device.flops if speed else None, "mfu": mfu, "step": seconds,
            "pairs_per_s": run.batch.pairs / seconds if seconds else None,
            "run_hours": run.steps * seconds / 3600 if seconds else None,
            "gpu_hours": run.steps * seconds * world / 3600 if seconds else None,
        },
        "data": {
            "pair_bytes": workload.pair_bytes, "bytes_per_s": workload.pair_bytes * run.batch.pairs / seconds if seconds else None,
            "shards_bytes": workload.data_bytes, "pairs": workload.pairs,
            "epochs": run.steps * run.batch.pairs / workload.pairs if workload.pairs else None,
        },
        "checkpoints": {
            "bytes": checkpoint, "kept": kept, "disk": checkpoint * kept + export_bytes(run, workload.sizes),
            "save_seconds": checkpoint / DISK_BYTES_PER_S, "disk_bytes_per_s": DISK_BYTES_PER_S,
        },
        "verdict": {
            "fits": room >= 0, "room": room,
            "change": [] if room >= 0 else nearest_fit(chosen, workload, world, gpus, usable(device)),
        },
    }  # fmt: skip


def rank_memory(run: RunConfig, workload: Workload, world: int, local_world_size: int, with_reference: bool = True) -> Memory:
    """Return the memory of one rank, with activations. Activations are counted for eager PyTorch, even if the run compiles its
    blocks.

    Args:
        with_reference: False if a complete precomputed reference replaces the reference that the objective needs.

    Raises:
        UserError: as :func:`~dde_ds.engine.zero.complete_config`.
    """
    state = _state_memory(run, workload, world, local_world_size, with_reference)
    one = workload.training_pass(run.model.gradient_checkpointing, _dtype(run))
    return dataclasses.replace(state, activations=one.peak * run.batch.micro_batch_size)


def pick_checkpointing(
    run: RunConfig, workload: Workload, world: int, local_world_size: int, usable_bytes: float, with_reference: bool = True
) -> str | None:
    """Return the mode of gradient checkpointing that recomputes least, among those that fit into ``usable_bytes`` of a device's
    memory.

    Return None if not even the last mode fits. ``with_reference`` is as in :func:`rank_memory`.
    """
    for mode in _modes(run):
        changed = _change(run, {"model.gradient_checkpointing": mode})
        if rank_memory(changed, workload, world, local_world_size, with_reference).peak <= usable_bytes:
            return mode
    return None


def _modes(run: RunConfig) -> list[str]:
    """Return the modes to choose from. ``selective`` is left out if the blocks are compiled.

    Compiled blocks decide by themselves what to keep, and what that saves is not counted.
    """
    return [mode for mode in MODES if not (run.model.compile and mode == "selective")]


def nearest_fit(run: RunConfig, workload: Workload, world: int, local_world_size: int, usable_bytes: float) -> list[str] | None:
    """Return the smallest change that makes the run fit, as overrides ``key=value``. Return None if no change does.

    The changes are tried in this order: a smaller micro-batch, more checkpointing, ZeRO-3, offloading.
    """
    for changes in _changes(run, world):
        changed = _change(run, changes)
        try:
            # Counting a mode's activations takes seconds. Count them only if the rest leaves room for any.
            if _state_memory(changed, workload, world, local_world_size).peak > usable_bytes:
                continue
            if rank_memory(changed, workload, world, local_world_size).peak <= usable_bytes:
                return [f"{key}={value}" for key, value in changes.items()]
        except UserError:
            continue  # settings that do not go together, such as 8-bit moments and ZeRO-3
    return None


def _changes(run: RunConfig, world: int) -> Iterator[dict[str, Any]]:
    """Yield changed values by key, the smallest change first."""
    share = run.batch.pairs // world
    micros = [micro for micro in range(run.batch.micro_batch_size, 0, -1) if share % micro == 0]
    modes = [mode for mode in _modes(run) if _saving(mode) > _saving(run.model.gradient_checkpointing)]
    files = [run.deepspeed]
    for name in ("zero3.json", "zero2_offload.json", "zero3_offload.json"):
        beside = Path(run.deepspeed).with_name(name)
        if beside.is_file() and str(beside) not in files:
            files.append(str(beside))
    for file in files:
        for mode in (run.model.gradient_checkpointing, *modes):
            for micro in micros:
                wanted = {"batch.micro_batch_size": micro, "model.gradient_checkpointing": mode, "deepspeed": file}
                changes = {key: value for key, value in wanted.items() if value != _value(run, key)}
                if changes:
                    yield changes


def usable(device: Device) -> float:
    """Return the bytes of a device's memory that a plan may fill."""
    return device.gibibytes * 2**30 * (1 - RESERVED_FRACTION)


def needs_reference(run: RunConfig) -> bool:
    """Return whether the reference's predictions are computed.

    A run with a complete precomputed reference computes none. The plan does not know whether the file is complete: the run
    finds out.
    """
    spec = OBJECTIVES.get(run.objective.name)  # an unknown name is refused elsewhere
    return spec is None or spec.needs_reference


def checkpoint_bytes(run: RunConfig, sizes: cost.Sizes) -> int:
    """Return the bytes of a checkpoint: weights, AdamW's two moments, and the moving average if the run keeps one.

    All of them are float32 there, even if the run keeps moments of 8 bits.
    """
    return (12 + 4 * bool(run.ema)) * sum(sizes.trained)


def export_bytes(run: RunConfig, sizes: cost.Sizes) -> int:
    """Return about the bytes of an export: those of its largest part, the UNet in float32, or those of the adapters."""
    return 4 * sum(sizes.trained if run.lora else map(sum, sizes))


def kept_checkpoints(run: RunConfig) -> int:
    """Return the largest number of checkpoints on the disk at a time.

    They are the newest, those of ``keep_every``, and the one that is being written before an old one is deleted.
    """
    keep = run.checkpoint
    return keep.keep + 1 + (run.steps // keep.keep_every if keep.keep_every else 0)


def _state_memory(run: RunConfig, workload: Workload, world: int, local_world_size: int, with_reference: bool = True) -> Memory:
    """Return the memory of one rank without activations: the policy's engine and the reference's."""
    config = complete_config(run, world, local_world_size)
    memory = policy_memory(workload.sizes, config, world, MOMENT_BYTES[run.optimizer.type], ema=bool(run.ema))
    placed = _reference_config(run, config) if with_reference else None
    if placed is None:
        return memory
    frozen = reference_memory([*workload.sizes.trained, *workload.sizes.frozen], placed, world)
    return dataclasses.replace(
        memory,
        reference=frozen.reference,
        # Not the sum: the reference lets go of gathered weights before the policy's pass.
        communication=max(memory.communication, frozen.communication),
        host=memory.host + frozen.host,
    )


def _reference_config(run: RunConfig, config: dict) -> dict | None:
    """Return the DeepSpeed configuration of the reference's engine, or None if the run has no such engine."""
    if not needs_reference(run) or run.lora:
        return None
    return reference_config(config, run.reference.placement, run.reference.dtype)


def _placement(frozen: dict | None) -> str | None:
    if frozen is None:
        return None
    if stage_of(frozen) == 0:
        return "replicated"
    return "cpu" if "offload_param" in frozen["zero_optimization"] else "sharded"


def _dtype(run: RunConfig) -> torch.dtype:
    return torch.bfloat16 if run.precision == "bf16" else torch.float32


def _saving(mode: str) -> float:
    """Return a number that orders modes by how much they recompute. every_K lies between selective and full."""
    return 2 - 1 / int(mode.removeprefix("every_")) if mode.startswith("every_") else {"none": 0, "selective": 1, "full": 2}[mode]


def _value(run: RunConfig, key: str) -> Any:
    *parents, leaf = key.split(".")
    for parent in parents:
        run = getattr(run, parent)
    return getattr(run, leaf)


def _change(run: RunConfig, changes: dict[str, Any]) -> RunConfig:
    for key, value in changes.items():
        section, _, leaf = key.rpartition(".")
        part = dataclasses.replace(getattr(run, section), **{leaf: value}) if section else value
        run = dataclasses.replace(run, **{section or leaf: part})
    return run
