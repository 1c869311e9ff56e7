"""What precedes the UNet: images to latents, captions to embeddings, by the pipeline's own VAE and text encoders.

Training applies the VAE's scaling factor here and nowhere else: latents are stored as the UNet takes them.
"""

from __future__ import annotations

import hashlib
import io
import math
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


# Others are read by PIL too, some through programs of their own (EPS runs Ghostscript): an image from the internet gets none.
FORMATS = ("JPEG", "PNG", "WEBP")
# Decoding takes some 7 bytes a pixel. Twice the largest picture of common cameras; a bomb has thousands of times its bytes.
MAX_PIXELS = 1 << 27


def prepare_image(data: bytes, resolution: int, min_side: int = 1) -> Prepared:
    """Decode, scale the short side to ``resolution``, crop the centre to a square.

    Raises:
        ValueError: not an image (``undecodable image: …``), a short side below ``min_side`` pixels (``too small image: …``), or
            one so large that decoding it would be an attack on memory (``decompression bomb: …``).
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"decompression bomb: {error}") from None
    except Exception as error:  # a broken file can make its decoder raise anything
        raise ValueError(f"undecodable image: {_words(error)}") from None
    if width * height > MAX_PIXELS:
        raise ValueError(f"decompression bomb: {width}x{height} pixels in {len(data)} bytes")
    if min(width, height) < min_side:
        raise ValueError(f"too small image: {width}x{height} pixels")
    try:
        image = image.convert("RGB")
    except Exception as error:
        raise ValueError(f"undecodable image: {_words(error)}") from None
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if size != (width, height):
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).permute(2, 0, 1) / 127.5 - 1
    return Prepared(pixels, (height, width), (top, left))


def _words(error: Exception) -> str:
    # PIL names the object in memory: the same file would read differently each time.
    return " ".join(str(error).partition("<_io")[0].split()) or type(error).__name__


class Encoder:
    """VAE and text encoders of a diffusers pipeline, for making shards.

    Args:
        vae_dtype: None takes float32, and on a GPU float16 where the VAE's own configuration says that it does not overflow.
        text_dtype: None takes float32, and on a GPU float16.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        device: str = "cpu",
        vae_dtype: torch.dtype | None = None,
        text_dtype: torch.dtype | None = None,
    ):
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

        self.family = family(path, revision)
        kind = StableDiffusionXLPipeline if self.family == "sdxl" else StableDiffusionPipeline
        # The UNet is not needed here, and it is most of the pipeline.
        parts = {"unet": None} | ({} if self.family == "sdxl" else {"safety_checker": None, "feature_extractor": None})
        try:
            self.pipeline = kind.from_pretrained(path, revision=revision, **LOADING, **parts)
        except OSError as error:
            raise UserError(f"--model {path}: {' '.join(str(error).split())}") from None
        half = torch.float16 if device.startswith("cuda") else torch.float32
        overflows = bool(getattr(self.pipeline.vae.config, "force_upcast", True))
        self.vae_dtype = vae_dtype or (torch.float32 if overflows else half)
        self.text_dtype = text_dtype or half
        self.weights = self._digest()
        """SHA-256 over the weights of the VAE and the text encoders as they were loaded: shards of another model are other shards."""
        self.pipeline.set_progress_bar_config(disable=True)
        for name in ("vae", "text_encoder", "text_encoder_2"):
            part = getattr(self.pipeline, name, None)
            if part is not None:
                part.to(device, self.vae_dtype if name == "vae" else self.text_dtype).requires_grad_(False)
        self.device = device
        self.zero_empty_prompt = bool(getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False))
        """The pipeline samples without a caption by zeros, not by the encoded empty text (SDXL)."""
        self.scaling_factor = float(self.pipeline.vae.config.scaling_factor)
        unet = UNet2DConditionModel.load_config(path, subfolder="unet", revision=revision)
        self.resolution = unet["sample_size"] * self.pipeline.vae_scale_factor
        """Side in pixels of the images that the UNet was made for."""

    def _digest(self) -> str:
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
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the VAE's posterior of images (N,3,H,W) in [-1,1]: (N,C,h,w) each, float32 on the CPU.

        Both are scaled as the UNet takes latents: mean + exp(logvar/2)·ε is a draw. This is where the factor is applied.
        """
        found = self.pipeline.vae.encode(pixels.to(self.device, self.vae_dtype)).latent_dist
        shift = getattr(self.pipeline.vae.config, "shift_factor", None) or 0.0
        mean = (found.mean.float() - shift) * self.scaling_factor
        return mean.cpu(), (found.logvar.float() + 2 * math.log(self.scaling_factor)).cpu()

    def latents(self, pixels: Tensor) -> Tensor:
        """Scaled latents (N,C,h,w), float32 on the CPU, of images (N,3,H,W) in [-1,1]: the posterior's mean, no draw."""
        return self.posterior(pixels)[0]

    @torch.no_grad()
    def prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds`` (N,S,D) and, for SDXL, ``pooled`` (N,P): float32 on the CPU.

        Too long captions are cut, as in the pipeline; the empty one is what the pipeline samples with where it has no caption.
        """
        captions = list(captions)
        if self.family == "sdxl":
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            found = {"prompt_embeds": embeds.float().cpu(), "pooled": pooled.float().cpu()}
        else:
            embeds, _ = self.pipeline.encode_prompt(
                captions, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            found = {"prompt_embeds": embeds.float().cpu()}
        if self.zero_empty_prompt:
            for row in (row for row, caption in enumerate(captions) if not caption):
                for value in found.values():
                    value[row] = 0
        return found


def time_ids(image: Prepared, resolution: int) -> Tensor:
    """SDXL's micro-conditioning (6,): original size, crop corner, target size (arXiv 2307.01952, sec. 2.2)."""
    return torch.tensor([*image.original_size, *image.crop, resolution, resolution], dtype=torch.float32)
