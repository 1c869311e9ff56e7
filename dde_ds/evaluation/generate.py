"""Draw images with a pipeline. Each image is a pure function of (model, seed, prompt, image index)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dde_ds.files import write_atomically
from dde_ds.models import parts
from dde_ds.models.family import TEXT_PARTS, encode_prompts


def initial_noise(seed: int, prompt: str, index: int, shape: Sequence[int]) -> Tensor:
    """Return the initial noise x_T of one image, (C,H,W) float32.

    The noise is the same for every model, batch and rank, so that models are compared on equal noise.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}\n{index}\n{prompt}".encode()).digest()[:16], "little")
    random = np.random.Generator(np.random.Philox(key=key))
    return torch.from_numpy(random.standard_normal(tuple(shape), dtype=np.float32))


class PromptSet:
    """Hold prompts that a diffusers pipeline has embedded once, so that any UNet of its kind can draw them.

    The VAE and a DDIM sampler are kept. The text encoders are released after embedding.
    """

    def __init__(
        self,
        model: str,
        revision: str | None,
        prompts: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        variant: str | None = None,
    ):
        from diffusers import DDIMScheduler

        self.prompts, self._device, self._dtype = list(prompts), device, dtype
        self._pipeline = pipeline = load_pipeline(model, revision, variant, unet=None)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.to(device)
        with torch.no_grad():
            embedded = [encode_prompts(pipeline, prompt, device, negative=True) for prompt in self.prompts]
        self._embeddings = {key: torch.cat([item[key] for item in embedded]).to(dtype) for key in embedded[0]}
        pipeline.register_modules(**{name: None for name in TEXT_PARTS if hasattr(pipeline, name)})

    @torch.no_grad()
    def draw(
        self,
        unet: Any,
        seed: int,
        inference_steps: int,
        guidance_scale: float,
        batch: int = 32,
        index: int = 0,
        poll: Callable[[], None] | None = None,
    ) -> Tensor:
        """Draw one image for each prompt, (N,3,H,W) uint8 on the CPU.

        Under ZeRO-3 every forward pass is a collective, so all ranks must call this together, with the same arguments. ``poll`` is
        called after each denoising step. An exception that ``poll`` raises ends the drawing.
        """

        def after_step(pipeline, step, timestep, tensors) -> dict:
            if poll:
                poll()
            # A UNet with a float32 output makes latents of float32, which its first layer would refuse.
            return {"latents": tensors["latents"].to(self._dtype)}

        pipeline, config = self._pipeline, unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        side = config.sample_size * pipeline.vae_scale_factor
        pipeline.unet = unet
        images = []
        for low in range(0, len(self.prompts), batch):
            prompts = self.prompts[low : low + batch]
            noise = torch.stack([initial_noise(seed, prompt, index, shape) for prompt in prompts])
            latents = pipeline(
                **{key: value[low : low + batch] for key, value in self._embeddings.items()},
                latents=noise.to(self._device, self._dtype),
                num_inference_steps=inference_steps,
                guidance_scale=guidance_scale,
                height=side,
                width=side,
                output_type="latent",
                callback_on_step_end=after_step,
            ).images
            images.append(decode(pipeline.vae, latents))
        pipeline.unet = None
        return torch.cat(images)

    @torch.no_grad()
    def encode(self, pixels: Tensor, batch: int = 64) -> Tensor:
        """Encode images (N,3,H,W) in [-1,1] into scaled mean latents, (N,C,h,w) float32 on the CPU."""
        vae = self._pipeline.vae
        means = [vae.encode(chunk.to(self._device)).latent_dist.mean.cpu() for chunk in pixels.split(batch)]
        return torch.cat(means) * vae.config.scaling_factor


def save_row(images: Tensor, path: Path) -> None:
    """Write images (N,3,H,W) uint8 side by side into one PNG."""
    data = io.BytesIO()
    Image.fromarray(torch.cat(list(images), dim=2).permute(1, 2, 0).numpy()).save(data, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data.getvalue())  # a file that a full disk cut short would pass for a drawn one


def load_pipeline(model: str, revision: str | None = None, variant: str | None = None, **replaced: Any) -> Any:
    """Load a pipeline by :func:`dde_ds.models.parts.load_pipeline`, without progress bars. Its VAE decodes one image at a time."""
    pipeline = parts.load_pipeline(model, revision, variant, **replaced)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()  # at 1024 pixels, decoding a batch would take memory that the policy needs
    return pipeline


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode scaled latents into images, (N,3,H,W) uint8 on the CPU.

    This does not use the pipeline's own decoding: here the VAE stays in float32, because VAEs in half precision overflow.
    """
    decoded = vae.decode(latents.float() / vae.config.scaling_factor).sample
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
