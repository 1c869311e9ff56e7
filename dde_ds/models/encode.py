"""What precedes the UNet: images to latents, captions to embeddings, by the pipeline's own VAE and text encoders.

Training applies the VAE's scaling factor here and nowhere else: latents are stored as the UNet takes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dde_ds.errors import UserError
from dde_ds.models.unet import LOADING, family

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """One image, upright, resized and cropped."""

    pixels: Tensor
    """(3,H,W) in [-1,1], float32."""
    original_size: tuple[int, int]
    """(height, width) before."""
    crop: tuple[int, int]
    """(top, left) of the crop, in the resized image."""


# Others are read by PIL too, some through programs of their own (EPS runs Ghostscript): an image from the internet gets none.
FORMATS = ("JPEG", "PNG", "WEBP")
# Decoding takes 7 to 13 bytes a pixel. Twice the largest picture of common cameras; a bomb has thousands of times its bytes.
MAX_PIXELS = 1 << 27
WHITE = (255, 255, 255)
# EXIF's orientations: what turns the stored picture upright. 1 is upright already.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112
PNG = b"\x89PNG\r\n\x1a\n"
# What a PNG's pixels follow from, and its EXIF record. All else is text, colour profiles and further frames.
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")


def prepare_image(data: bytes, resolution: int, min_side: int = 1, background: tuple[int, int, int] = WHITE) -> Prepared:
    """Decode, turn upright, lay transparent parts on ``background``, scale the short side to ``resolution``, crop the centre to a square.

    Raises:
        ValueError: not an image (``undecodable image: …``), a short side below ``min_side`` pixels (``too small image: …``), or
            one so large that decoding it would be an attack on memory (``decompression bomb: …``).
    """
    width, height = image_size(data)
    if width * height > MAX_PIXELS:
        raise ValueError(f"decompression bomb: {width}x{height} pixels in {len(data)} bytes")
    if min(width, height) < min_side:
        raise ValueError(f"too small image: {width}x{height} pixels")
    image = _read(data, lambda image, data: _rgb(_upright(image), data, background))
    width, height = image.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if size != (width, height):
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).permute(2, 0, 1) / 127.5 - 1
    return Prepared(pixels, (height, width), (top, left))


def image_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) of an image as it is stored, from its header. Raises ``ValueError`` as :func:`prepare_image`."""
    return _read(data, lambda image, data: image.size)


def _read(data: bytes, use: Callable[[Image.Image, bytes], T]) -> T:
    """Return ``use(image, data)`` of the image in ``data``; of a PNG that PIL refuses, without what its pixels do not need.

    PIL refuses a large text or colour profile, such as the workflows that node editors write, and its limits are global.
    """
    try:
        return use(Image.open(io.BytesIO(data), formats=FORMATS), data)
    except Image.DecompressionBombError as error:
        raise ValueError(f"decompression bomb: {error}") from None
    except Exception as error:  # a broken file can make its decoder raise anything
        if data.startswith(PNG) and len(plain := _without_text(data)) < len(data):
            with contextlib.suppress(Exception):  # as above; the whole file's error is the one to tell
                return use(Image.open(io.BytesIO(plain), formats=FORMATS), plain)
        raise ValueError(f"undecodable image: {_words(error)}") from None


def _without_text(data: bytes) -> bytes:
    """Return a PNG with :data:`PIXEL_CHUNKS` alone."""
    kept, at = [PNG], len(PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, type, content, checksum
        if data[at + 4 : at + 8] in PIXEL_CHUNKS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _upright(image: Image.Image) -> Image.Image:
    """Return ``image`` turned as its EXIF record says."""
    image.load()  # a PNG's record may follow the pixels
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except Exception:  # a broken record can raise anything; such a picture is shown as it is stored
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image, data: bytes, background: tuple[int, int, int]) -> Image.Image:
    """Return ``image`` with 8 bits a colour: 16-bit grey scaled, transparent parts laid on ``background``."""
    clear = image.info.get("transparency")
    if data.startswith(PNG) and clear is not None:
        # PIL keeps the transparent colour as the file has it, and scales the pixels to 8 bits.
        depth = data[24]
        if image.mode == "L":
            clear *= 255 // (2**depth - 1)
        elif image.mode == "RGB" and depth == 16:
            clear = tuple(value >> 8 for value in clear)
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        image = Image.fromarray(((grey.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    elif clear is not None:
        image.info["transparency"] = clear
    if "transparency" not in image.info and not image.mode.endswith(("A", "a")):
        return image.convert("RGB")
    image = image.convert("RGBA")
    whole = Image.new("RGB", image.size, background)
    whole.paste(image, mask=image.getchannel("A"))
    return whole


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

    def is_cut(self, captions: Sequence[str]) -> np.ndarray:
        """(captions,) bool: as :func:`cut_captions` of the pipeline's tokenizers."""
        tokenizers = (getattr(self.pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
        return cut_captions(filter(None, tokenizers), captions)

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


def cut_captions(tokenizers: Iterable[Any], captions: Sequence[str]) -> np.ndarray:
    """(captions,) bool: whether a text encoder sees less than the whole caption, since it has more tokens than it takes."""
    found = np.zeros(len(captions), bool)
    for tokenizer in tokenizers:
        for low in range(0, len(captions), 1024):
            tokens = tokenizer(list(captions[low : low + 1024]), truncation=False, verbose=False).input_ids
            found[low : low + 1024] |= np.array([len(caption) > tokenizer.model_max_length for caption in tokens])
    return found


def time_ids(image: Prepared, resolution: int) -> Tensor:
    """SDXL's micro-conditioning (6,): original size, crop corner, target size (arXiv 2307.01952, sec. 2.2)."""
    return torch.tensor([*image.original_size, *image.crop, resolution, resolution], dtype=torch.float32)
