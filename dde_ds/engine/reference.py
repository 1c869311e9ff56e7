"""Where the reference's weights lie. It only ever predicts: no optimizer, no gradients.

    replicated   whole on every GPU: no communication, SDXL in bf16 takes 5.1 GB of each
    sharded      by ZeRO-3 over all ranks, whatever the policy's stage: a block's weights are gathered when its turn comes
    cpu          the same, with the shards in the host's memory: the GPU holds the blocks whose turn it is, and nothing after the pass

DeepSpeed accepts an engine without optimizer at stages 0 and 3 only.
"""

from __future__ import annotations

import copy
from typing import Any

from dde_ds.config import ReferenceConfig
from dde_ds.models.family import BLOCKS

# A forward pass uses each weight once, so that there is nothing to keep one for; what is ahead is fetched during the current block.
# DeepSpeed's default of 10⁹ for each of the last two would keep all of SD1.5 and a third of SDXL.
SHARDED = {
    "stage": 3,
    "overlap_comm": True,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "leaf_module": {"classes": list(BLOCKS)},
    "memory_efficient_linear": False,  # as in dde_ds.engine.zero; it would be the policy's too
    "stage3_max_live_parameters": 200_000_000,
    "stage3_max_reuse_distance": 0,
}
# DeepSpeed times each micro-batch by default, and for it waits for the GPU before the forward pass and behind the step.
NO_TIMER = {"enabled": False}


def reference_config(config: dict, placement: str = "auto", dtype: str = "policy") -> dict:
    """The DeepSpeed configuration of the reference beside a policy's, without what trains.

    Args:
        placement: ``auto``, ``replicated``, ``sharded`` or ``cpu``.
        dtype: ``policy`` takes the policy's precision; ``bf16`` or ``fp32``.

    Raises:
        UserError: another placement or type.
    """
    ReferenceConfig(placement=placement, dtype=dtype)  # which checks them
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
        # Beside a ZeRO-3 policy cut and gathered as that one is.
        alike = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "zero_hpz_partition_size", "leaf_module")
        own = {key: policy[key] for key in alike if policy.get("stage") == 3 and key in policy}
        kept["zero_optimization"] = copy.deepcopy({**SHARDED, **own})
        if placement == "cpu":
            kept["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    return kept


def resolve_placement(policy: dict, placement: str = "auto") -> str:
    """What ``auto`` means beside a policy of this ``zero_optimization`` section."""
    if placement != "auto":
        return placement
    if policy.get("stage") != 3:
        return "replicated"
    return "sharded" if policy.get("offload_param", {}).get("device", "none") == "none" else "cpu"
