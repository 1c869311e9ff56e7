"""Bytes that a rank holds, by what they are for, from a DeepSpeed configuration and the sizes of the parameters.

The formulas are those of ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5) with what DeepSpeed 0.19's
optimizers add to them: each is read from the class that the docstring names, and compared with the tensors of real engines in
``tests/planning/test_plan_measured.py``. T trained elements, N ranks, b bytes of an element in the run's precision.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dde_ds.engine.adamw8bit import BLOCK
from dde_ds.engine.zero import bucket_elements, offloads_optimizer
from dde_ds.planning.cost import Sizes

# DeepSpeed's defaults of keys that a configuration may leave out.
PERSISTENCE, LIVE, SUB_GROUP = 100_000, 1_000_000_000, 1_000_000_000
# Float32, or one byte each and a float32 for each block of them.
MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / BLOCK)}
"""Bytes of an element's two moments, by ``optimizer.type``."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device, and what it holds in host memory for it."""

    weights: int = 0
    gradients: int = 0
    """While they are summed up over micro-batches."""
    optimizer: int = 0
    """Float32 master weights and the moments."""
    reference: int = 0
    ema: int = 0
    communication: int = 0
    """Buckets, and under ZeRO-3 weights that are gathered for the blocks at work, at most. A reference's are gone before the policy's come."""
    activations: int = 0
    step: int = 0
    """Copies that live in the optimizer step only, when there are no activations."""
    host: int = 0

    @property
    def peak(self) -> int:
        """Of the device."""
        held = self.weights + self.gradients + self.optimizer + self.reference + self.ema
        return held + max(self.communication + self.activations, self.step)


def stage_of(config: dict) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def policy_memory(sizes: Sizes, config: dict, world: int, moments: float, ema: bool = False) -> Memory:
    """Of a policy engine, without activations.

    Args:
        config: DeepSpeed's, complete.
        moments: bytes of an element's moments.
        ema: whether a moving average of the master weights lies beside them.
    """
    narrow = bool(config.get("bf16", {}).get("enabled"))
    width = 2 if narrow else 4
    wide_sums = narrow and config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    if stage_of(config) == 3:
        return _stage_3(sizes, config["zero_optimization"], world, moments, 4 * ema, width, 4 if wide_sums else width)
    return _flat(sizes, config.get("zero_optimization", {}), world, moments, 4 * ema, width, wide_sums)


def _flat(sizes: Sizes, zero: dict, world: int, moments: float, average: int, width: int, wide_sums: bool) -> Memory:
    """ZeRO-0 to 2: whole weights in one flat buffer, T rounded up to 2N, of which each rank updates an Nth part.

    ``DeepSpeedZeroOptimizer`` makes float32 master weights even of float32 ones. Stage 2 keeps an Nth of the gradients as float32 sums
    of bfloat16 ones; of float32 ones it keeps those of the parameters that reach into the Nth whole. Stage 1 keeps all: in bfloat16
    with float32 sums (``BF16_Optimizer``) each sum beside the bfloat16 gradient itself, and for the all-reduce of the step a bfloat16
    copy of all.
    """
    stage, total = zero.get("stage", 0), sum(sizes.trained)
    flat = math.ceil(total / (2 * world)) * 2 * world
    if stage == 0:  # float32 alone: PyTorch's own optimizer on the model's own weights
        optimizer = round(moments * total)
        return Memory(width * (total + sum(sizes.frozen)), width * total, optimizer, ema=average * total)
    own = flat // world
    # Two buckets that take turns where reduction goes on beside the backward pass, and a copy of the one that is being reduced to its owners.
    buckets = (
        1 + bool(zero.get("overlap_comm")) + bool(zero.get("reduce_scatter", True) or not zero.get("contiguous_gradients", True))
    )
    communication = bucket_elements(zero, total) * width * buckets
    held = Memory(weights=width * (flat + sum(sizes.frozen)), communication=communication)
    if offloads_optimizer({"zero_optimization": zero}):
        # Master weights, moments and float32 gradients on the host, and its copy of the new weights; the largest gradient in transit.
        host = round((4 + moments + average + 4 + width) * own)
        return replace(held, communication=communication + width * max(sizes.trained), host=host)
    held = replace(held, optimizer=round((4 + moments) * own), ema=average * own)
    if stage == 2 and wide_sums:
        return replace(held, gradients=4 * own)
    if stage == 2:
        # Flattened once more for the step, in float32. What one rank sums up in place it takes through its buckets only then.
        beside = 0 if world == 1 and width == 4 else communication
        return replace(held, gradients=width * _reaching_into(sizes.trained, own), communication=beside, step=4 * own)
    if wide_sums:
        return replace(held, gradients=4 * flat + width * total, communication=0, step=width * flat)
    return replace(held, gradients=width * total, step=4 * own)


def _stage_3(sizes: Sizes, zero: dict, world: int, moments: float, average: int, width: int, sum_width: int) -> Memory:
    """ZeRO-3: ⌈n/N⌉ of each parameter; those of up to ``param_persistence_threshold`` elements are on every rank whole as well.

    ``DeepSpeedZeroOptimizer_Stage3`` makes float32 master weights even of float32 ones; its sums of gradients are always there. In the
    step it flattens them, a group of ``sub_group_size`` elements after the other. At most ``stage3_max_live_parameters`` elements are
    gathered at a time.
    """
    own = sum(math.ceil(size / world) for size in sizes.trained)
    everything = [*sizes.trained, *sizes.frozen]
    parts = sum(math.ceil(size / world) for size in everything)
    persistent = persistent_elements(everything, zero)
    secondary = sum(math.ceil(size / group) for size in everything) if (group := zero.get("zero_hpz_partition_size", 1)) > 1 else 0
    gathered = min(sum(everything) - persistent, zero.get("stage3_max_live_parameters", LIVE))
    communication = width * (bucket_elements(zero, sum(sizes.trained)) * 2 + gathered)
    shard = width * parts
    held = Memory(weights=width * (persistent + secondary), communication=communication)
    if offloads_optimizer({"zero_optimization": zero}):
        # The gradients have a float32 copy beside their sums.
        held = replace(held, host=round((4 + moments + average + sum_width + 4) * own))
    else:
        step = 4 * min(own, math.ceil(zero.get("sub_group_size", SUB_GROUP) / world))
        held = replace(held, optimizer=round((4 + moments) * own), ema=average * own, gradients=sum_width * own, step=step)
    if zero.get("offload_param", {}).get("device", "none") != "none":
        return replace(held, host=held.host + shard)
    return replace(held, weights=held.weights + shard)


def _reaching_into(sizes: Sequence[int], own: int) -> int:
    """Elements of the parameters of which a part lies in one of the flat partitions of ``own`` elements: the most of any."""
    found, start = Counter(), 0
    for size in sizes:
        for partition in range(start // own, (start + size - 1) // own + 1):
            found[partition] += size
        start += size
    return max(found.values())


def reference_memory(elements: Sequence[int], config: dict, world: int) -> Memory:
    """Of a reference engine.

    Args:
        config: of :func:`dde_ds.engine.reference.reference_config`: replicated by stage 0, else sharded, on the device or the host.
    """
    width = 2 if config.get("bf16", {}).get("enabled") else 4
    zero = config["zero_optimization"]
    if zero["stage"] == 0:
        return Memory(reference=width * sum(elements))
    held = _stage_3(Sizes((), tuple(elements)), zero, world, 0, 0, width, width)
    gathered = min(sum(elements), zero["stage3_max_live_parameters"])
    # It has no gradients, and so no buckets for them.
    return Memory(reference=held.weights, communication=width * gathered, host=held.host)


def persistent_elements(elements: Sequence[int], zero: dict) -> int:
    """Of parameters that ZeRO-3 leaves on every rank."""
    threshold = zero.get("stage3_param_persistence_threshold", PERSISTENCE)
    return sum(size for size in elements if size <= threshold)
