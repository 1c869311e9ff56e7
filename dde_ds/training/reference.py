"""Where the reference's predictions come from: a function of a micro-batch, chosen once at the start of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dde_ds.models.family import Conditioning
from dde_ds.models.unet import predict

Reference = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(noisy latents (2B,C,H,W) in the models' type, timesteps (2B,), conditioning on the device) → predictions (2B,C,H,W). Called
without gradients, before the policy's own pass."""


def adapters_off(unet: Any) -> Reference:
    """The policy's own UNet without its LoRA adapters, which is the base that it was made from: one UNet serves as both.

    The UNet inside a DeepSpeed engine, not the engine: ZeRO-3 gathers by hooks on the modules.
    """

    def predictions(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        unet.disable_adapters()
        try:
            return predict(unet, noisy, timesteps, conditioning)
        finally:
            unet.enable_adapters()

    return predictions


def frozen_model(reference: Any) -> Reference:
    """A second UNet, or a DeepSpeed engine around one."""
    return lambda noisy, timesteps, conditioning: predict(reference, noisy, timesteps, conditioning)
