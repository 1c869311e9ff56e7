"""Placement of the reference's weights. The reference only predicts: it has no optimizer and no gradients.

    replicated   whole on every GPU: no communication; SDXL in bf16 takes 5.1 GB of each
    sharded      sharded by ZeRO-3 over all ranks, whatever the policy's stage: a block's weights are gathered when the block runs
    cpu          the same, with the shards in host memory: the GPU holds the weights of the running blocks, and nothing after the pass

DeepSpeed accepts an engine without an optimizer at stages 0 and 3 only.
"""

from __future__ import annotations

import copy
from typing import Any

from dde_ds.config import ReferenceConfig, section_of
from dde_ds.models.family import BLOCKS

# A forward pass uses each weight once, so no weight is kept for a second use. The next weights are fetched while the current block
# runs. DeepSpeed's default of 10⁹ for each of the last two keys would keep all of SD1.5 and a third of SDXL.
SHARDED = {
    "stage": 3,
    "overlap_comm": True,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "leaf_module": {"classes": list(BLOCKS)},
    "memory_efficient_linear": False,  # as in dde_ds.engine.zero: the layers would be replaced in the policy too
    "stage3_max_live_parameters": 200_000_000,
    "stage3_max_reuse_distance": 0,
}
# By default DeepSpeed times each micro-batch. To do so, it waits for the GPU before the forward pass and after the step.
NO_TIMER = {"enabled": False}


def reference_config(config: dict, placement: str = "auto", dtype: str = "policy") -> dict:
    """Return the DeepSpeed configuration of the reference, derived from the policy's configuration ``config`` without its
    training settings.

    Args:
        placement: ``auto``, ``replicated``, ``sharded`` or ``cpu``.
        dtype: ``policy`` for the policy's precision, ``bf16`` or ``fp32``.

    Raises:
        UserError: an unknown placement or type.
    """
    section_of(ReferenceConfig, {"placement": placement, "dtype": dtype}, "reference")  # refuses unknown values
    batch = "train_micro_batch_size_per_gpu" if "train_micro_batch_size_per_gpu" in config else "train_batch_size"
    kept: dict[str, Any] = {key: copy.deepcopy(config[key]) for key in ("bf16", "fp16", "steps_per_print", batch) if key in config}
    if dtype != "policy":
        kept.pop("fp16", None)
        kept["bf16"] = {"enabled": dtype == "bf16"}
    kept["timers"] = {"throughput": dict(NO_TIMER)}
    policy = config.get("zero_optimization", {})
    placement = resolve_placement(policy, placement)
    if placement == "replicated":
        kept["zero_optimization"] = {"stage": 0}
    else:
        # Beside a ZeRO-3 policy, the reference is sharded and gathered in the same way.
        keys = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "zero_hpz_partition_size", "leaf_module")
        shared = {key: policy[key] for key in keys if policy.get("stage") == 3 and key in policy}
        kept["zero_optimization"] = copy.deepcopy({**SHARDED, **shared})
        if placement == "cpu":
            kept["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    return kept


def resolve_placement(policy: dict, placement: str = "auto") -> str:
    """Return ``placement``, with ``auto`` resolved for a policy that has this ``zero_optimization`` section."""
    if placement != "auto":
        return placement
    if policy.get("stage") != 3:
        return "replicated"
    return "sharded" if policy.get("offload_param", {}).get("device", "none") == "none" else "cpu"
