"""Connect the planner with a run that starts.

The planner gets the run's model and data. The run gets what the planner says for this machine.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dde_ds.config import RunConfig
from dde_ds.data.estimate import shard_bytes
from dde_ds.data.mixture import MixedShards
from dde_ds.data.shards import ShardSet
from dde_ds.models.unet import load_component_config, load_unet_config
from dde_ds.planning.cost import TOKENS, Adapters, Selection
from dde_ds.planning.gpus import peak_flops
from dde_ds.planning.plan import MODES, RESERVED_FRACTION, Workload, pick_checkpointing, stored_pair_bytes


def shards_are_there(run: RunConfig) -> bool:
    """Return whether each of the run's training shard sets is remote or has its manifest on this machine."""
    return all("://" in path or (Path(path) / "manifest.json").is_file() for path, _ in run.data.weighted_paths)


def trained_part(run: RunConfig) -> Adapters | Selection | None:
    """Return the part of the UNet that a run trains, or None if it trains the whole UNet."""
    if run.lora:
        return Adapters(run.lora.rank, run.lora.targets)
    return None if run.model.trainable == "all" else Selection(run.model.trained_patterns)


def workload_of(run: RunConfig, shards: ShardSet | MixedShards | None, known_unet: dict | None = None) -> Workload:
    """Return model and data of a run, from configurations and manifests.

    Args:
        shards: the run's shards, or None if they are not made yet. Their latents are then assumed to have the size that the
            model was trained at.
        known_unet: the result of :func:`dde_ds.models.known.shipped_unet`. If it is given, nothing is read of the model.

    Raises:
        UserError: a configuration of the model cannot be read.
    """
    if known_unet is not None:
        unet, tokens = known_unet, TOKENS
    else:
        unet = load_unet_config(run.model.path, run.model.revision)
        tokens = load_component_config(run.model.path, "text_encoder", run.model.revision)["max_position_embeddings"]
    trained: dict[str, Any] = {
        "part": trained_part(run),
        "float32_output": run.model.float32_output,
    }
    if shards is None:
        latent = (unet["in_channels"], unet["sample_size"], unet["sample_size"])
        return Workload(unet, latent, tokens, stored_pair_bytes(unet, latent, tokens), **trained)
    manifests = [shard_set.manifest for shard_set in getattr(shards, "sets", [shards])]
    pairs, prompts = sum(shards.counts), sum(manifest["prompts"]["distinct"] for manifest in manifests)
    total = sum(map(shard_bytes, manifests))
    of_prompts = sum(row["bytes"] for manifest in manifests for row in manifest["prompts"]["files"])
    pair_bytes = (total - of_prompts) / pairs + of_prompts / prompts
    return Workload(unet, shards.latent_shape, tokens, pair_bytes, total, pairs, **trained)


def chosen_checkpointing(
    run: RunConfig, shards: ShardSet | MixedShards, with_reference: bool, world: int, local_world_size: int, device: torch.device
) -> str:
    """Return the mode of gradient checkpointing. Collective.

    It is the run's own mode. For ``auto``, it is the mode that fits the memory of the smallest device, or the last mode if
    none fits.
    """
    if run.model.gradient_checkpointing != "auto":
        return run.model.gradient_checkpointing
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:  # the host's memory, which the node's ranks share
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_world_size
    smallest = torch.tensor(memory, device=device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    usable = smallest.item() * (1 - RESERVED_FRACTION)
    return pick_checkpointing(run, workload_of(run, shards), world, local_world_size, usable, with_reference) or MODES[-1]


class Utilisation:
    """Compute ``perf/mfu``: FLOPs of training in a second, without recomputation, as a share of the devices' peak.

    The number is left out on a CPU, on a GPU that is not in :data:`dde_ds.planning.gpus.DEVICES`, and in float32. It is also
    left out where a part is trained, such as with LoRA, which has another backward pass.
    """

    def __init__(self, run: RunConfig, shards: ShardSet | MixedShards, with_reference: bool, world: int, device: torch.device):
        peak = peak_flops(torch.cuda.get_device_name(device), run.precision) if device.type == "cuda" else None
        self._share = None
        if peak and trained_part(run) is None:
            self._share = workload_of(run, shards).pair_flops(with_reference) / (world * peak)

    def row(self, pairs_per_s: float) -> dict[str, float]:
        """Return ``perf/mfu`` at this throughput, or nothing if it is left out."""
        return {} if self._share is None else {"perf/mfu": pairs_per_s * self._share}
