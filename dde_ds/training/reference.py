"""Make the function that predicts for the reference. A run chooses it once, at its start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dde_ds.models.family import Conditioning
from dde_ds.models.unet import predict

Reference = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""A function from (noisy latents (2B,C,H,W) in the models' type, timesteps (2B,), conditioning on the device) to predictions
(2B,C,H,W). It is called without gradients, before the policy's own pass."""


def adapters_off(unet: Any) -> Reference:
    """Return a function that predicts with the policy's own UNet, without its LoRA adapters.

    Without adapters, the UNet is the base that the policy was made from. So one UNet serves as policy and reference.

    Args:
        unet: the UNet inside a DeepSpeed engine, not the engine. ZeRO-3 gathers weights by hooks on the modules.
    """

    def predictions(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        unet.disable_adapters()
        try:
            return predict(unet, noisy, timesteps, conditioning)
        finally:
            unet.enable_adapters()

    return predictions


def frozen_model(reference: Any) -> Reference:
    """Return a function that predicts with a second UNet, or with a DeepSpeed engine around it."""
    return lambda noisy, timesteps, conditioning: predict(reference, noisy, timesteps, conditioning)
