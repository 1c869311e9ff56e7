"""A folder of generated images: what it was made with, and which of its images are there and whole.

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
from dde_ds.evaluation.shape import COUNT, require_shape
from dde_ds.files import write_atomically
from dde_ds.untrusted import open_regular, read_json
from dde_ds.warn import reason

FORMAT = "dde_ds images 1"
SHAPE = {"digest": str, "prompts": [str], "settings": {"images_per_prompt": COUNT, "seed": object, "model": object}}
MOST_BYTES = 512 * 2**20
"""Of a ``manifest.json``: some millions of prompts."""
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
        """(prompt, image index) of every image that belongs here."""
        return ((prompt, index) for prompt in range(len(self.prompts)) for index in range(self.per_prompt))

    def is_whole(self, prompt: int, index: int) -> bool:
        """Whether the image is there, undamaged (the checksums of its chunks), and made with these settings."""
        try:
            with open_regular(self.path(prompt, index)) as file, Image.open(file, formats=["PNG"]) as image:
                text = dict(image.info)
                image.verify()
        except Exception:  # whatever Pillow meets in a damaged image
            return False
        expected = self._text(prompt, index)
        return all(text.get(key) == value for key, value in expected.items())

    def save(self, prompt: int, index: int, pixels) -> None:
        """``pixels``: (H,W,3) uint8 array."""
        chunks = PngImagePlugin.PngInfo()
        for key, value in self._text(prompt, index).items():
            chunks.add_text(key, value)  # tEXt, or iTXt where Latin-1 does not do
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
    """Mark the folder as belonging to these settings, or find that it does. The model is known by its weights: it may lie elsewhere now.

    Returns:
        The pictures with the settings that the folder was begun with.

    Raises:
        UserError: the folder was begun with other settings or prompts, or holds something else.
    """
    path = pictures.folder / "manifest.json"
    if path.is_file():
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
    # Before anything is made: what cannot be written must leave nothing that a second run would stumble over.
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
    """Whether a folder holds nothing, or no more than a run leaves that ended before it wrote its manifest."""
    if not folder.exists():
        return True
    found = [entry for entry in folder.iterdir() if not (entry.name.startswith(".manifest.json.") and entry.suffix == ".partial")]
    return not found or (found == [folder / "images"] and found[0].is_dir() and not any(found[0].iterdir()))


def open_pictures(folder: str | Path) -> ImageFolder:
    """A folder that :func:`claim` made.

    Raises:
        UserError: no manifest there, or one that cannot be read.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
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
    """Raises:
    UserError: images are missing or damaged; the message names the first of them and how many there are.
    """
    missing = [pictures.path(*item).name for item in pictures.items() if not pictures.is_whole(*item)]
    if missing:
        named = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        total = len(pictures.prompts) * pictures.per_prompt
        raise UserError(
            f"{pictures.folder}: {len(missing)} of {total} images are missing or damaged ({named}); "
            "generate again into the same folder to make what is missing"
        )
