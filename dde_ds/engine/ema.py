"""The moving average of the trained weights.

Each rank averages the part of the float32 weights that it updates, so no rank holds all of them. The average is one more
tensor of the optimizer's state, beside the moments, and is saved and restored with them.
"""

from __future__ import annotations

from typing import Any

import torch

from dde_ds.engine import state
from dde_ds.engine.state import EMA


@torch.no_grad()
def update_ema(policy: Any, decay: float) -> None:
    """Add the policy's weights to the average. Call this once after each step that the optimizer made, and never after a skipped
    step.

    The decay warms up as in diffusers' EMAModel (``training_utils.py``). The first update copies the weights. For k = 1, 2, …,
    update k + 1 has decay min(``decay``, (1 + k)/(10 + k)). Without the warm-up, the average would long stay near the first
    weights.
    """
    earlier = state.optimizer_steps(policy) - 1
    weight = 1 - min(decay, (1 + earlier) / (10 + earlier)) if earlier else 1.0
    began = False
    for master, tensors in state.partitions(policy):
        if EMA in tensors:
            tensors[EMA].lerp_(master, weight)
        else:
            tensors[EMA], began = master.clone(), True
    if began:
        state.link_views(policy, again=True)
