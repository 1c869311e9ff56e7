"""What precedes the UNet: images to latents, captions to embeddings, by the pipeline's own VAE and text encoders.

Training applies the VAE's scaling factor here and nowhere else: latents are stored as the UNet takes them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dde_ds.errors import UserError
from dde_ds.models.unet import LOADING, family


@dataclass(frozen=True)
class Prepared:
    """One image, resized and cropped."""

    pixels: Tensor
    """(3,H,W) in [-1,1], float32."""
    original_size: tuple[int, int]
    """(height, width) before."""
    crop: tuple[int, int]
    """(top, left) of the crop, in the resized image."""


def prepare_image(data: bytes, resolution: int) -> Prepared:
    """Decode, scale the short side to ``resolution``, crop the centre to a square.

    Raises:
        ValueError: not an image, or one so large that decoding it would be an attack on memory.
    """
    try:
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        image = image.convert("RGB")
    except (OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"undecodable image: {error}") from None
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if size != (width, height):
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).permute(2, 0, 1) / 127.5 - 1
    return Prepared(pixels, (height, width), (top, left))


class Encoder:
    """VAE and text encoders of a diffusers pipeline, for making shards.

    ``vae_dtype``: SDXL's original VAE overflows in float16, so float32 is the default.
    """

    def __init__(self, path: str, revision: str | None = None, device: str = "cpu", vae_dtype: torch.dtype = torch.float32):
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

        self.family = family(path, revision)
        kind = StableDiffusionXLPipeline if self.family == "sdxl" else StableDiffusionPipeline
        # The UNet is not needed here, and it is most of the pipeline.
        parts = {"unet": None} | ({} if self.family == "sdxl" else {"safety_checker": None, "feature_extractor": None})
        try:
            self.pipeline = kind.from_pretrained(path, revision=revision, **LOADING, **parts)
        except OSError as error:
            raise UserError(f"--model {path}: {' '.join(str(error).split())}") from None
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(device)
        self.pipeline.vae.to(dtype=vae_dtype).requires_grad_(False)
        self.device, self.vae_dtype = device, vae_dtype
        self.scaling_factor = float(self.pipeline.vae.config.scaling_factor)
        unet = UNet2DConditionModel.load_config(path, subfolder="unet", revision=revision)
        self.resolution = unet["sample_size"] * self.pipeline.vae_scale_factor
        """Side in pixels of the images that the UNet was made for."""

    def digest(self) -> str:
        """SHA-256 over the weights of the VAE and the text encoders: shards of another model are other shards."""
        digest = hashlib.sha256()
        for name in ("vae", "text_encoder", "text_encoder_2"):
            part = getattr(self.pipeline, name, None)
            for key, tensor in sorted(part.state_dict().items()) if part is not None else ():
                digest.update(key.encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy() if tensor.ndim else str(tensor.item()).encode())
        return digest.hexdigest()

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C,H,W) of the latent of a square image.

        Raises:
            UserError: a side that the VAE cannot halve often enough.
        """
        factor = self.pipeline.vae_scale_factor
        if resolution < factor or resolution % factor:
            raise UserError(f"--resolution {resolution}: must be a multiple of {factor}, the VAE's factor")
        return self.pipeline.vae.config.latent_channels, resolution // factor, resolution // factor

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Scaled latents (N,C,h,w), float32 on the CPU, of images (N,3,H,W) in [-1,1]: the posterior's mean, no draw."""
        mean = self.pipeline.vae.encode(pixels.to(self.device, self.vae_dtype)).latent_dist.mean
        config = self.pipeline.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        return ((mean.float() - shift) * self.scaling_factor).cpu()

    @torch.no_grad()
    def prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds`` (N,S,D) and, for SDXL, ``pooled`` (N,P): float32 on the CPU. Too long captions are cut, as in the pipeline."""
        captions = list(captions)
        if self.family == "sdxl":
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            return {"prompt_embeds": embeds.float().cpu(), "pooled": pooled.float().cpu()}
        embeds, _ = self.pipeline.encode_prompt(captions, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds.float().cpu()}


def time_ids(image: Prepared, resolution: int) -> Tensor:
    """SDXL's micro-conditioning (6,): original size, crop corner, target size (arXiv 2307.01952, sec. 2.2)."""
    return torch.tensor([*image.original_size, *image.crop, resolution, resolution], dtype=torch.float32)
