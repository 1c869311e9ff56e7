"""Bytes that an optimizer step sends, from the DeepSpeed configuration.

Of S bytes, a ring over n ranks sends (n-1)/n · S from each rank to its neighbour in a reduce-scatter or an all-gather, and twice that in
an all-reduce (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). A ring that goes through all ranks of a node before it
leaves it carries the same bytes out of the node, once for all its ranks. What is sent how often is section 7 of the ZeRO paper
(https://arxiv.org/abs/1910.02054), as DeepSpeed 0.19 does it: stages 2 and 3 reduce gradients in every micro-batch, stage 1 once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dde_ds.planning.cost import Sizes
from dde_ds.planning.memory import persistent_elements, stage_of


class Traffic(NamedTuple):
    """Bytes of an optimizer step."""

    inside: float
    """That each rank sends."""
    between: float
    """That leave each node, of all its ranks together. 0 on one node."""


def step_traffic(
    sizes: Sizes,
    config: dict,
    nodes: int,
    gpus: int,
    accumulation: int,
    reference: Sequence[int] = (),
    frozen_config: dict | None = None,
) -> Traffic:
    """Traffic of one optimizer step.

    Args:
        config: DeepSpeed's, complete.
        nodes, gpus: nodes, and ranks on each.
        reference, frozen_config: elements of the reference's parameters and its engine's configuration, where there is one; of a policy
            that is its own reference with adapters off, the policy's.
    """
    world, zero = nodes * gpus, config.get("zero_optimization", {})
    width = _width(config)
    trained, share = width * sum(sizes.trained), (world - 1) / world
    forward = 0.0
    if frozen_config is not None and stage_of(frozen_config) == 3:
        persistent = persistent_elements(reference, frozen_config["zero_optimization"])
        forward = accumulation * share * _width(frozen_config) * (sum(reference) - persistent)
    if stage_of(config) == 3:
        everything = [*sizes.trained, *sizes.frozen]
        persistent = persistent_elements(everything, zero)
        gathered = width * (sum(everything) - persistent)
        group = zero.get("zero_hpz_partition_size", 1)
        # Gathered forward and, with blocks that are computed again, backward; reduced in each micro-batch. Persistent weights are
        # gathered after the step. With a second copy inside the node, the backward pass gathers there.
        everywhere = share * (accumulation * (gathered + trained) + width * persistent_elements(sizes.trained, zero)) + forward
        backward = accumulation * gathered * ((group - 1) / group if group > 1 else share)
        between = everywhere if 1 < group <= gpus else everywhere + backward
        return Traffic(everywhere + backward, between if nodes > 1 else 0.0)
    # Stage 2 reduces each bucket to the ranks that own it, or, by its default, all-reduces it and lets them pick.
    all_reduce = stage_of(config) != 2 or zero.get("use_multi_rank_bucket_allreduce", True)
    reductions = accumulation if stage_of(config) == 2 else 1
    updated = trained if stage_of(config) else 0
    sent = share * (reductions * trained * (1 + all_reduce) + updated) + forward
    return Traffic(sent, sent if nodes > 1 else 0.0)


def _width(config: dict) -> int:
    return 2 if config.get("bf16", {}).get("enabled") else 4
