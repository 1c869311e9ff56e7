"""Architectures of public models that come with the project.

With them, parameters and FLOPs can be counted without reaching the hub.
"""

from __future__ import annotations

import json
from pathlib import Path

ARCHITECTURES = Path(__file__).with_name("architectures")
KNOWN = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
}
"""File in :data:`ARCHITECTURES` for each known hub id."""


def shipped_unet(path: str, revision: str | None = None) -> dict | None:
    """Return the UNet's ``config.json`` of a known hub id.

    Return None if the model is not known, or is on this machine itself.

    The hub is not asked: without a network, such a request takes half a minute to fail.
    """
    from huggingface_hub import try_to_load_from_cache

    if path not in KNOWN or Path(path).exists():
        return None
    names = ("model_index.json", "unet/config.json", "text_encoder/config.json")
    if all(isinstance(try_to_load_from_cache(path, name, revision=revision), str) for name in names):
        return None
    return read_architecture(KNOWN[path])


def read_architecture(name: str) -> dict:
    """Return the UNet's ``config.json`` of ``sd15`` or ``sdxl``."""
    return json.loads((ARCHITECTURES / f"{name}.json").read_text(encoding="utf-8"))
