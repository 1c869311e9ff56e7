"""Encode what the UNet takes: images to latents and captions to embeddings, by the pipeline's own VAE and text
encoders.

Training applies the VAE's scaling factor here and nowhere else. Latents are stored as the UNet takes them.
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
    """One image, turned upright, resized and cropped."""

    pixels: Tensor
    """(3,H,W) in [-1,1], float32."""
    original_size: tuple[int, int]
    """(height, width) in pixels before resizing."""
    crop: tuple[int, int]
    """(top, left) of the crop in pixels of the resized image."""


# PIL reads other formats too, some through external programs (EPS runs Ghostscript). An image from the internet must
# not start any.
FORMATS = ("JPEG", "PNG", "WEBP")
# Decoding takes 7 to 13 bytes a pixel. The limit is twice the largest picture of common cameras. A decompression bomb
# takes thousands of times the bytes of its file.
MAX_PIXELS = 1 << 27
WHITE = (255, 255, 255)
# EXIF's orientations, with the operation that turns the stored picture upright. With 1 it is upright already.
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
# The chunks that determine a PNG's pixels, and its EXIF record. All other chunks are text, colour profiles and further
# frames.
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")


def decode_image(data: bytes, min_side: int = 1, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Return an image as people see it: RGB, upright, its transparent parts laid on ``background``.

    Raises:
        ValueError: as :func:`prepare_image` raises.
    """
    width, height = image_size(data)
    if width * height > MAX_PIXELS:
        raise ValueError(f"decompression bomb: {width}x{height} pixels in {len(data)} bytes")
    if min(width, height) < min_side:
        raise ValueError(f"too small image: {width}x{height} pixels")
    return _read(data, lambda image, data: _rgb(_upright(image), data, background))


def prepare_image(data: bytes, resolution: int, min_side: int = 1, background: tuple[int, int, int] = WHITE) -> Prepared:
    """Decode an image and prepare it for the VAE.

    The image is turned upright, and its transparent parts are laid on ``background``. Its short side is scaled to
    ``resolution``, and the centre is cropped to a square.

    Args:
        data: JPEG, PNG or WebP.
        resolution: side of the square in pixels.
        min_side: shortest side in pixels that the image may have.
        background: red, green, blue; 0 to 255.

    Raises:
        ValueError: the data are not an image (``undecodable image: …``), a side is shorter than ``min_side``
            (``too small image: …``), or the image is so large that decoding it would be an attack on memory
            (``decompression bomb: …``).
    """
    image = decode_image(data, min_side, background)
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
    """Return (width, height) in pixels of an image as it is stored, from its header.

    Raises:
        ValueError: the data are not an image, or PIL takes it for a decompression bomb.
    """
    return _read(data, lambda image, data: image.size)


def _read(data: bytes, use: Callable[[Image.Image, bytes], T]) -> T:
    """Return ``use(image, data)`` for the image in ``data``.

    If PIL refuses a PNG, try it again without the chunks that its pixels do not need. PIL refuses large texts and
    colour profiles, such as the workflows that node editors write, and its limits can only be changed globally.

    Raises:
        ValueError: as :func:`prepare_image` raises.
    """
    try:
        return use(Image.open(io.BytesIO(data), formats=FORMATS), data)
    except Image.DecompressionBombError as error:
        raise ValueError(f"decompression bomb: {error}") from None
    except Exception as error:  # a broken file can make its decoder raise any exception
        if data.startswith(PNG) and len(plain := _without_text(data)) < len(data):
            with contextlib.suppress(Exception):  # any exception again; the error of the whole file is the one to report
                return use(Image.open(io.BytesIO(plain), formats=FORMATS), plain)
        raise ValueError(f"undecodable image: {_words(error)}") from None


def _without_text(data: bytes) -> bytes:
    """Return a PNG with only the chunks in :data:`PIXEL_CHUNKS`."""
    kept, at = [PNG], len(PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, type, content, checksum
        if data[at + 4 : at + 8] in PIXEL_CHUNKS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _upright(image: Image.Image) -> Image.Image:
    """Return ``image`` turned as its EXIF record says."""
    image.load()  # the record of a PNG may follow its pixels
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 0))
    except Exception:  # a broken record can raise any exception; the picture is then used as it is stored
        turn = None
    return image if turn is None else image.transpose(turn)


def _low_bytes(data: bytes) -> Image.Image:
    """Return the lower 8 bits of a PNG with 16 bits a colour. PIL itself keeps the upper ones."""
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    image.tile = [(*tile[:3], "RGB;16L") for tile in image.tile]  # pyright: ignore[reportAttributeAccessIssue]
    return image


def _rgb(image: Image.Image, data: bytes, background: tuple[int, int, int]) -> Image.Image:
    """Return ``image`` with 8 bits a colour. 16-bit grey is scaled, and transparent parts are laid on ``background``."""
    clear = image.info.get("transparency")
    if data.startswith(PNG) and clear is not None:
        # PIL scales the pixels to 8 bits, but keeps the transparent colour as the file has it.
        depth = data[24]
        if image.mode == "L":
            clear *= 255 // (2**depth - 1)
        elif image.mode == "RGB" and depth == 16:
            high, low = np.asarray(image), np.asarray(_upright(_low_bytes(data)))
            opaque = (high.astype(np.uint16) << 8 | low != clear).any(-1)
            image.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
            del image.info["transparency"]
            clear = None
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
    """Return an error's message in one line, the same each time."""
    # PIL's messages contain an address in memory, so that the same file would give another message each time.
    return " ".join(str(error).partition("<_io")[0].split()) or type(error).__name__


class Encoder:
    """The VAE and the text encoders of a diffusers pipeline, for making shards.

    Args:
        path: a diffusers folder or a hub id.
        revision: revision on the hub.
        device: where the encoders run, such as ``cuda``.
        vae_dtype: None means float32; but float16 on a GPU, if the VAE's configuration says that it does not overflow.
        text_dtype: None means float32, but float16 on a GPU.
        variant: variant of the weights' files, such as ``fp16``; None finds it.

    Raises:
        UserError: a part cannot be loaded.
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
        # The UNet is not needed here, and it is the largest part of the pipeline.
        self.pipeline = load_pipeline(path, revision, variant, unet=None)
        half = torch.float16 if device.startswith("cuda") else torch.float32
        overflows = bool(getattr(self.pipeline.vae.config, "force_upcast", True))
        self.vae_dtype = vae_dtype or (torch.float32 if overflows else half)
        self.text_dtype = text_dtype or half
        loaded = [getattr(self.pipeline, name) for name in self.family.encoders]
        self.digests = encoders_digests(path, revision, variant, loaded)
        """SHA-256 of the weights of the VAE and the text encoders as they were loaded.

        It tells shards of different models apart.
        """
        self.pipeline.set_progress_bar_config(disable=True)
        for name, part in zip(self.family.encoders, loaded, strict=True):
            part.to(device, self.vae_dtype if name == "vae" else self.text_dtype).requires_grad_(False)
        self.device = device
        self.zero_empty_prompt = bool(getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False))
        """True if the pipeline uses zeros for a missing caption (SDXL), and not the encoded empty text."""
        self.scaling_factor = float(self.pipeline.vae.config.scaling_factor)
        unet = load_unet_config(path, revision)
        self.resolution = unet["sample_size"] * self.pipeline.vae_scale_factor
        """Side in pixels of the images that the UNet was made for."""

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return the shape (C,H,W) of the latent of a square image.

        Args:
            resolution: side of the image in pixels.

        Raises:
            UserError: the side is not a multiple of the VAE's factor.
        """
        factor = self.pipeline.vae_scale_factor
        if resolution < factor or resolution % factor:
            raise UserError(f"resolution {resolution}: must be a multiple of {factor}, the VAE's factor")
        return self.pipeline.vae.config.latent_channels, resolution // factor, resolution // factor

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the log-variance of the VAE's posterior of images.

        Both are scaled as the UNet takes latents: this is where the factor is applied. mean + exp(logvar/2)·ε is a
        draw.

        Args:
            pixels: (N,3,H,W) in [-1,1].

        Returns:
            Mean and log-variance, (N,C,h,w) each, float32 on the CPU.
        """
        posterior = self.pipeline.vae.encode(pixels.to(self.device, self.vae_dtype)).latent_dist
        shift = getattr(self.pipeline.vae.config, "shift_factor", None) or 0.0
        mean = (posterior.mean.float() - shift) * self.scaling_factor
        return mean.cpu(), (posterior.logvar.float() + 2 * math.log(self.scaling_factor)).cpu()

    def is_cut(self, captions: Sequence[str]) -> np.ndarray:
        """Return (captions,) bool: whether a text encoder sees less than the whole caption. See :func:`cut_captions`."""
        return cut_captions(tokenizers_of(self.pipeline), captions)

    def latents(self, pixels: Tensor) -> Tensor:
        """Return scaled latents (N,C,h,w), float32 on the CPU, of images (N,3,H,W) in [-1,1].

        They are the mean of the posterior, not a draw.
        """
        return self.posterior(pixels)[0]

    @torch.no_grad()
    def prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the prompts' tensors of the family's layout, such as ``prompt_embeds`` (N,S,D), float32 on the CPU.

        Captions that are too long are cut, as in the pipeline. The empty caption gives the tensors with which the
        pipeline samples if it has no caption.
        """
        captions = list(captions)
        embedded = encode_prompts(self.pipeline, captions, self.device)
        tensors = {name: embedded[BATCH_NAMES[name]].float().cpu() for name in self.family.layout.prompt}
        if self.zero_empty_prompt:
            for row in (row for row, caption in enumerate(captions) if not caption):
                for value in tensors.values():
                    value[row] = 0
        return tensors


def cut_captions(tokenizers: Iterable[Any], captions: Sequence[str]) -> np.ndarray:
    """Return (captions,) bool: whether a caption has more tokens than one of the text encoders takes, which cuts off
    its end.
    """
    cut = np.zeros(len(captions), bool)
    for tokenizer in tokenizers:
        for low in range(0, len(captions), 1024):
            tokens = tokenizer(list(captions[low : low + 1024]), truncation=False, verbose=False).input_ids
            cut[low : low + 1024] |= np.array([len(caption) > tokenizer.model_max_length for caption in tokens])
    return cut


class Digests(NamedTuple):
    """SHA-256 of the weights of the VAE and the text encoders, both in float32 and rounded to float16.

    Versions of transformers differ in whether the names of the first text encoder's weights begin with ``text_model.``.
    ``other_full`` and ``other_half`` are the digests of the same weights under the other names. Shards with either
    digest were made by the same encoders.
    """

    full: str
    half: str
    other_full: str
    other_half: str

    def fit(self, settings: Mapping) -> bool:
        """Return whether shards with these settings were made by these encoders, or by the same encoders stored in half
        precision.
        """
        full, half = settings.get("weights"), settings.get("weights_half")
        return full in (self.full, self.other_full) or half in (self.half, self.other_half)


def encoders_digests(
    path: str, revision: str | None = None, variant: str | None = None, loaded: Iterable[Any] | None = None
) -> Digests:
    """Return the digests of the VAE and the text encoders as they are loaded in float32. The result is remembered.

    Args:
        path: a diffusers folder or a hub id.
        revision: revision on the hub.
        variant: as ``model.variant``; None finds it.
        loaded: the parts, if they are loaded already. None loads them one after another.

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
    """Return the configurations and weight files of the VAE and the text encoders, by their names in the pipeline."""
    variant = find_variant(path, revision, variant)
    parts = family_of(path, revision).encoders
    return [f"{part}/{name}" for part in parts for name in ("config.json", *weight_files(path, part, revision, variant)[1])]
