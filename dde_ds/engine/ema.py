"""The moving average of the trained weights. Each rank averages the part of the float32 weights that it updates: no rank holds all.

The average is one more tensor of the optimizer's state, beside its moments, and so is saved and restored as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from dde_ds.engine import state
from dde_ds.engine.state import EMA


@torch.no_grad()
def update_ema(policy: Any, decay: float) -> None:
    """Take the policy's weights into the average. Once after each step that the optimizer made, and after no skipped one.

    The decay warms up as diffusers' EMAModel has it (``training_utils.py``): the first update takes the weights as they are, update
    k + 1 (k = 1, 2, …) has decay min(``decay``, (1 + k)/(10 + k)). Otherwise the average would stay with its beginning for long.
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
