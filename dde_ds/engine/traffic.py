"""Bytes that an optimizer step sends, from the DeepSpeed configuration.

Of S bytes, a ring over n ranks sends (n-1)/n · S from each rank to its neighbour in a reduce-scatter or an all-gather, and twice that in
an all-reduce (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). A ring that goes through all ranks of a node before it
leaves it carries the same bytes out of the node, once for all its ranks. What is sent how often is section 7 of the ZeRO paper
(https://arxiv.org/abs/1910.02054), as DeepSpeed 0.19 does it: stages 2 and 3 reduce gradients in every micro-batch, stage 1 once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dde_ds.engine.memory import Sizes, persistent_elements, stage_of


class Traffic(NamedTuple):
    """Bytes of an optimizer step."""

    inside: float
    """That each rank sends."""
    between: float
    """That leave each node, of all its ranks together. 0 on one node."""


def step_traffic(
    sizes: Sizes, config: dict, nodes: int, gpus: int, accumulation: int, reference: Sequence[int] = (), reference_width: int = 2
) -> Traffic:
    """Traffic of one optimizer step.

    Args:
        config: DeepSpeed's, complete.
        nodes, gpus: nodes, and ranks on each.
        reference: elements of the parameters of a reference that is sharded; none of any other.
    """
    world, zero = nodes * gpus, config.get("zero_optimization", {})
    width = 2 if config.get("bf16", {}).get("enabled") else 4
    trained = width * sum(sizes.trained)
    share = (world - 1) / world
    if stage_of(config) == 3:
        everything = [*sizes.trained, *sizes.frozen]
        gathered = width * (sum(everything) - persistent_elements(everything, zero))
        group = zero.get("zero_hpz_partition_size", 1)
        # Forward and backward gather the weights, blocks that are computed again with the latter. Persistent ones only after the step.
        everywhere = accumulation * share * (gathered + trained) + share * width * persistent_elements(sizes.trained, zero)
        backward = accumulation * gathered * ((group - 1) / group if group > 1 else share)
        crossing = everywhere + (0 if group > 1 and group <= gpus else backward)
        frozen = reference_width * (sum(reference) - persistent_elements(reference, zero)) * accumulation * share
        return Traffic(everywhere + backward + frozen, crossing + frozen if nodes > 1 else 0.0)
    # Stage 2 reduces each bucket to the ranks that own it, or, by its default, all-reduces it and lets them pick.
    all_reduce = stage_of(config) != 2 or zero.get("use_multi_rank_bucket_allreduce", True)
    reductions = accumulation if stage_of(config) == 2 else 1
    weights = trained if stage_of(config) else 0
    frozen = reference_width * (sum(reference) - persistent_elements(reference, zero)) * accumulation
    sent = share * (reductions * trained * (1 + all_reduce) + weights + frozen)
    return Traffic(sent, sent if nodes > 1 else 0.0)
