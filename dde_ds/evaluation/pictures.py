"""A folder of generated images: the settings of its images, and which images are there and whole.

folder/
  manifest.json          settings, their digest, and the prompts; written first, never changed
  images/00012-03.png    prompt 12, image 3, both counted from 0; its text chunks say what it shows and how it was made
  scores/                cached scores, see scoring.py
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from dde_ds.errors import UserError
from dde_ds.files import write_atomically
from dde_ds.shape import COUNT, require_shape
from dde_ds.untrusted import open_regular, read_json
from dde_ds.warn import reason

FORMAT = "dde_ds images 1"
SHAPE = {"digest": str, "prompts": [str], "settings": {"images_per_prompt": COUNT, "seed": object, "model": object}}
MOST_BYTES = 512 * 2**20
"""The largest ``manifest.json`` that is read. It holds some millions of prompts."""
MOST_IMAGES = 10**8


@dataclass(frozen=True)
class ImageFolder:
    folder: Path
    prompts: list[str]
    settings: dict[str, Any]
    """``images_per_prompt``, ``seed``, ``model``, ``weights`` (their SHA-256), scheduler, steps, guidance, …"""

    @property
    def per_prompt(self) -> int:
        return self.settings["images_per_prompt"]

    @property
    def digest(self) -> str:
        return settings_digest(self.settings, self.prompts)

    def path(self, prompt: int, index: int) -> Path:
        return self.folder / "images" / f"{prompt:05d}-{index:02d}.png"

    def items(self) -> Iterator[tuple[int, int]]:
        """Return (prompt, image index) of every image that belongs to this folder."""
        return ((prompt, index) for prompt in range(len(self.prompts)) for index in range(self.per_prompt))

    def is_whole(self, prompt: int, index: int) -> bool:
        """Tell whether the image is there, is undamaged by the checksums of its chunks, and was made with these settings."""
        try:
            with open_regular(self.path(prompt, index)) as file, Image.open(file, formats=["PNG"]) as image:
                text = dict(image.info)
                image.verify()
        except Exception:  # Pillow may raise anything on a damaged image
            return False
        expected = self._text(prompt, index)
        return all(text.get(key) == value for key, value in expected.items())

    def save(self, prompt: int, index: int, pixels) -> None:
        """Write an image with its text chunks. ``pixels`` is an (H,W,3) uint8 array."""
        chunks = PngImagePlugin.PngInfo()
        for key, value in self._text(prompt, index).items():
            chunks.add_text(key, value)  # a tEXt chunk, or an iTXt chunk where Latin-1 is not enough
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=chunks)
        write_atomically(self.path(prompt, index), file.getvalue())

    def _text(self, prompt: int, index: int) -> dict[str, str]:
        return {
            "prompt": self.prompts[prompt],
            "image": str(index),
            "seed": str(self.settings["seed"]),
            "model": str(self.settings["model"]),
            "settings": self.digest,
        }


def settings_digest(settings: Mapping, prompts: list[str]) -> str:
    return hashlib.sha256(json.dumps([dict(settings), prompts], sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def claim(pictures: ImageFolder) -> ImageFolder:
    """Mark the folder as belonging to these settings, or confirm that it belongs to them.

    A model is recognised by its weights, so its path and revision may have changed since the folder was begun.

    Returns:
        The folder with the settings that it was begun with.

    Raises:
        UserError: the folder was begun with other settings or prompts, holds something else, or is not writable.
    """
    path = pictures.folder / "manifest.json"
    if path.exists():
        before = open_pictures(pictures.folder)
        differing = [
            f"{key} {before.settings.get(key)!r}, now {value!r}"
            for key, value in pictures.settings.items()
            if key not in ("model", "revision") and before.settings.get(key) != value
        ]
        if before.prompts != pictures.prompts:
            differing.append(f"{len(before.prompts)} prompts, now {len(pictures.prompts)} or others")
        if differing:
            raise UserError(
                f"out {pictures.folder}: was begun with other settings ({differing[0]}); choose another folder or delete this one"
            )
        return before
    # Encode the manifest before anything is made: a failure must leave nothing that a second run would stumble over.
    manifest = {"format": FORMAT, "settings": pictures.settings, "digest": pictures.digest, "prompts": pictures.prompts}
    data = json.dumps(manifest, ensure_ascii=False, indent=1).encode()
    if not _is_unclaimed(pictures.folder):
        raise UserError(f"out {pictures.folder}: is not empty and holds no images of ours; choose another folder")
    try:
        (pictures.folder / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out {pictures.folder}: not writable: {reason(error).lower()}") from None
    write_atomically(path, data)
    return pictures


def _is_unclaimed(folder: Path) -> bool:
    """Tell whether a folder is empty, or holds only what a run leaves if it ends before it writes its manifest."""
    if not folder.exists():
        return True
    entries = [entry for entry in folder.iterdir() if not (entry.name.startswith(".manifest.json.") and entry.suffix == ".partial")]
    return not entries or (entries == [folder / "images"] and entries[0].is_dir() and not any(entries[0].iterdir()))


def open_pictures(folder: str | Path) -> ImageFolder:
    """Read a folder of images that :func:`claim` has marked.

    Raises:
        UserError: the manifest is missing, cannot be read, or was changed.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder}: no manifest.json in it; make images there with launchers/generate.py")
    try:
        manifest = read_json(path, MOST_BYTES)
        require_shape(manifest, {"format": str})
        if manifest["format"] != FORMAT:
            raise UserError(f"{path}: its format is {manifest['format']!r}, expected {FORMAT!r}")
        require_shape(manifest, SHAPE)
    except OSError as error:
        raise UserError(f"{path}: {reason(error).lower()}") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a manifest of images: {error}") from None
    pictures = ImageFolder(folder, manifest["prompts"], manifest["settings"])
    if manifest["digest"] != pictures.digest:
        raise UserError(f"{path}: was changed by hand (its digest differs); generate the images again")
    if not 1 <= pictures.per_prompt * len(pictures.prompts) <= MOST_IMAGES:
        raise UserError(
            f"{path}: is of {pictures.per_prompt} images of each of {len(pictures.prompts)} prompts; generate them again"
        )
    return pictures


def require_whole(pictures: ImageFolder) -> None:
    """Refuse a folder that is not whole.

    Raises:
        UserError: images are missing or damaged. The message names the first of them and says how many there are.
    """
    missing = [pictures.path(*item).name for item in pictures.items() if not pictures.is_whole(*item)]
    if missing:
        named = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        total = len(pictures.prompts) * pictures.per_prompt
        raise UserError(
            f"{pictures.folder}: {len(missing)} of {total} images are missing or damaged ({named}); "
            "generate again into the same folder to make what is missing"
        )
