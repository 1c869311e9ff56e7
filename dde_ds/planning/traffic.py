"""Count the bytes that an optimizer step sends, from the DeepSpeed configuration.

In a reduce-scatter or an all-gather of S bytes, each rank of a ring of n ranks sends (n-1)/n · S to its neighbour. In an
all-reduce it sends twice that (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). If the ring goes through
all ranks of a node before it leaves the node, the same bytes leave the node, once for all its ranks.

Section 7 of the ZeRO paper (https://arxiv.org/abs/1910.02054) says what is sent how often. DeepSpeed 0.19 reduces gradients in
every micro-batch at stages 2 and 3, and once a step at stage 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dde_ds.planning.cost import Sizes
from dde_ds.planning.memory import persistent_elements, stage_of


class Traffic(NamedTuple):
    """Bytes that an optimizer step sends."""

    inside: float
    """Bytes that each rank sends."""
    between: float
    """Bytes that leave each node, for all of its ranks together. 0 on one node."""


def step_traffic(
    sizes: Sizes,
    config: dict,
    nodes: int,
    gpus: int,
    accumulation: int,
    reference: Sequence[int] = (),
    frozen_config: dict | None = None,
) -> Traffic:
    """Return the traffic of one optimizer step.

    Args:
        config: a complete DeepSpeed configuration.
        nodes: number of nodes.
        gpus: ranks on each node.
        accumulation: micro-batches of one optimizer step on each rank.
        reference: number of elements in each parameter of the reference, if there is one.
        frozen_config: configuration of the reference's engine, if there is one. A policy with adapters may be its own
            reference; then this is the policy's configuration.
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
        # Weights are gathered in the forward pass, and again in the backward pass, where blocks are recomputed. Gradients are
        # reduced in each micro-batch. Persistent weights are gathered after the step. If each node has a second copy, the backward
        # pass gathers inside the node.
        everywhere = share * (accumulation * (gathered + trained) + width * persistent_elements(sizes.trained, zero)) + forward
        backward = accumulation * gathered * ((group - 1) / group if group > 1 else share)
        between = everywhere if 1 < group <= gpus else everywhere + backward
        return Traffic(everywhere + backward, between if nodes > 1 else 0.0)
    # By default, stage 2 all-reduces each bucket, and the owners pick their parts. Otherwise it reduces each bucket to its owners.
    all_reduce = stage_of(config) != 2 or zero.get("use_multi_rank_bucket_allreduce", True)
    reductions = accumulation if stage_of(config) == 2 else 1
    updated = trained if stage_of(config) else 0
    sent = share * (reductions * trained * (1 + all_reduce) + updated) + forward
    return Traffic(sent, sent if nodes > 1 else 0.0)


def _width(config: dict) -> int:
    """Return the bytes of an element."""
    return 2 if config.get("bf16", {}).get("enabled") else 4
