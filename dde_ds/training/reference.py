"""Where the reference's predictions come from: a function of a micro-batch, chosen once at the start of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dde_ds.models.unet import predict

Reference = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
"""(noisy latents (2B,C,H,W) in the models' type, timesteps (2B,), the micro-batch on the device) → predictions (2B,C,H,W). Called
without gradients, before the policy's own pass."""


def frozen_model(reference: Any) -> Reference:
    """A second UNet, or a DeepSpeed engine around one."""
    return lambda noisy, timesteps, batch: predict(reference, noisy, timesteps, batch)
