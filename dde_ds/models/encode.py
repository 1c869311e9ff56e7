"""What precedes the UNet: images to latents, captions to embeddings, by the pipeline's own VAE and text encoders.

Training applies the VAE's scaling factor here and nowhere else: latents are stored as the UNet takes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dde_ds.errors import UserError
from dde_ds.models.base import family_of, find_variant, local_folder, unreadable, weight_files
from dde_ds.models.family import BATCH_NAMES, encode_prompts, tokenizers_of
from dde_ds.models.parts import load_part, load_pipeline
from dde_ds.models.remembered import remembered
from dde_ds.models.unet import load_unet_config

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
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 0))
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
        variant: of the weights' files, such as ``fp16``; None finds it.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        device: str = "cpu",
        vae_dtype: torch.dtype | None = None,
        text_dtype: torch.dtype | None = None,
        variant: str | None = None,
    ):
        self.family = family_of(path, revision)
        # The UNet is not needed here, and it is most of the pipeline.
        self.pipeline = load_pipeline(path, revision, variant, unet=None)
        half = torch.float16 if device.startswith("cuda") else torch.float32
        overflows = bool(getattr(self.pipeline.vae.config, "force_upcast", True))
        self.vae_dtype = vae_dtype or (torch.float32 if overflows else half)
        self.text_dtype = text_dtype or half
        loaded = [getattr(self.pipeline, name) for name in self.family.encoders]
        self.digests = encoders_digests(path, revision, variant, loaded)
        """SHA-256 over the weights of the VAE and the text encoders as they were loaded: shards of another model are other shards."""
        self.pipeline.set_progress_bar_config(disable=True)
        for name, part in zip(self.family.encoders, loaded, strict=True):
            part.to(device, self.vae_dtype if name == "vae" else self.text_dtype).requires_grad_(False)
        self.device = device
        self.zero_empty_prompt = bool(getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False))
        """The pipeline samples without a caption by zeros, not by the encoded empty text (SDXL)."""
        self.scaling_factor = float(self.pipeline.vae.config.scaling_factor)
        unet = load_unet_config(path, revision)
        self.resolution = unet["sample_size"] * self.pipeline.vae_scale_factor
        """Side in pixels of the images that the UNet was made for."""

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C,H,W) of the latent of a square image.

        Raises:
            UserError: a side that the VAE cannot halve often enough.
        """
        factor = self.pipeline.vae_scale_factor
        if resolution < factor or resolution % factor:
            raise UserError(f"resolution {resolution}: must be a multiple of {factor}, the VAE's factor")
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
        return cut_captions(tokenizers_of(self.pipeline), captions)

    def latents(self, pixels: Tensor) -> Tensor:
        """Scaled latents (N,C,h,w), float32 on the CPU, of images (N,3,H,W) in [-1,1]: the posterior's mean, no draw."""
        return self.posterior(pixels)[0]

    @torch.no_grad()
    def prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the prompts' tensors of the family's layout, such as ``prompt_embeds`` (N,S,D): float32 on the CPU.

        Too long captions are cut, as in the pipeline; the empty one is what the pipeline samples with where it has no caption.
        """
        captions = list(captions)
        embedded = encode_prompts(self.pipeline, captions, self.device)
        found = {name: embedded[BATCH_NAMES[name]].float().cpu() for name in self.family.layout.prompt}
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


class Digests(NamedTuple):
    """SHA-256 of the weights of VAE and text encoders, of float32 and rounded to float16.

    ``other`` are those of the same weights where transformers names those of the first text encoder otherwise: its versions do and do
    not begin them with ``text_model.``. Shards of either have the same encoders.
    """

    full: str
    half: str
    other_full: str
    other_half: str

    def fit(self, settings: Mapping) -> bool:
        """Whether shards with these settings were made by these encoders, or by the same ones stored in half precision."""
        full, half = settings.get("weights"), settings.get("weights_half")
        return full in (self.full, self.other_full) or half in (self.half, self.other_half)


def encoders_digests(
    path: str, revision: str | None = None, variant: str | None = None, loaded: Iterable[Any] | None = None
) -> Digests:
    """Return the digests of VAE and text encoders as loaded in float32. Remembered.

    Args:
        loaded: the parts, where they are there already; None loads them one after another.

    Raises:
        UserError: a part cannot be loaded.
    """
    import diffusers
    import transformers

    parts = family_of(path, revision).encoders
    variant, files = find_variant(path, revision, variant), encoder_files(path, revision, variant)
    folder = local_folder(path, revision, files)

    def compute() -> list[str]:
        full, half, other_full, other_half = digests = tuple(hashlib.sha256() for _ in Digests._fields)
        for name, part in zip(parts, loaded or (load_part(path, part, revision, variant) for part in parts), strict=True):
            for key, tensor in sorted(part.state_dict().items()):
                stem = key.removeprefix("text_model.")
                other = ("text_model." + stem if stem == key else stem) if name == "text_encoder" else key
                for digest, called in ((full, key), (half, key), (other_full, other), (other_half, other)):
                    digest.update(called.encode())
                for rounded, both in ((tensor, (full, other_full)), (tensor.half(), (half, other_half))):
                    value = rounded.cpu().contiguous().view(torch.uint8).numpy() if tensor.ndim else str(rounded.item()).encode()
                    for digest in both:
                        digest.update(value)
        return [digest.hexdigest() for digest in digests]

    with unreadable(path):
        what = f"encoders, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
        return Digests(*remembered(what, [folder / name for name in files], compute, len(Digests._fields)))


def encoder_files(path: str, revision: str | None = None, variant: str | None = None) -> list[str]:
    """The configurations and weight files of VAE and text encoders, by their names in the pipeline."""
    variant = find_variant(path, revision, variant)
    parts = family_of(path, revision).encoders
    return [f"{part}/{name}" for part in parts for name in ("config.json", *weight_files(path, part, revision, variant)[1])]
