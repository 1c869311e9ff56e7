"""Draw pictures of captions with any UNet, and judge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dde_ds.demo.judge import Judge
from dde_ds.evaluation.generate import PromptSet


def latent_spread(latents: Tensor) -> float:
    """Return the mean, over samples, of the standard deviation within a sample's latents (N,C,H,W).

    This spread grows when a model overshoots its images.
    """
    return float(latents.flatten(1).std(1).mean())


@dataclass(frozen=True)
class Drawn:
    """Hold the pictures of N captions, K for each, with the judge's numbers."""

    pixels: Tensor
    """(N,K,3,H,W) uint8."""
    logits: Tensor
    """(N,K): the judge's logits, positive for the preferred style."""
    features: Tensor
    """(N,K,64): the features in which the Fréchet distance is measured."""
    spread: Tensor
    """(N,K): standard deviation within each picture's latents."""


class CaptionSet:
    """Hold captions that are embedded once, so that several UNets can draw them from equal noise."""

    def __init__(self, model: str, captions: Sequence[str], judge: Judge, device: torch.device):
        self.prompts = PromptSet(model, None, captions, device, torch.float32)
        self._judge, self._device = judge, device

    @torch.no_grad()
    def draw(self, unet: Any, images: int, inference_steps: int, guidance_scale: float, seed: int = 0) -> Drawn:
        """Draw ``images`` pictures for each caption, each a function of (weights, seed, caption, picture number)."""
        unet.to(self._device).eval()
        pixels = torch.stack(
            [self.prompts.draw(unet, seed, inference_steps, guidance_scale, index=number) for number in range(images)], 1
        )
        unet.cpu()
        flat = pixels.flatten(0, 1).float() / 127.5 - 1
        latents = self.prompts.encode(flat)
        spread = torch.tensor([latent_spread(one[None]) for one in latents])
        shape = pixels.shape[:2]
        return Drawn(pixels, self._judge(flat).view(shape), self._judge.features(flat).unflatten(0, shape), spread.view(shape))
