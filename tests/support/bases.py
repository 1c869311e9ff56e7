"""Make bases as repositories have them, by leaving out, renaming or changing files of a whole pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import safetensors.torch
import torch


def copied(base: Path, folder: Path, **index) -> Path:
    """Copy a pipeline, and replace entries of its ``model_index.json``."""
    shutil.copytree(base, folder)
    changed(folder / "model_index.json", **index)
    return folder


def changed(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def with_checker(base: Path, folder: Path, pickled: bool = False) -> Path:
    """Copy a pipeline, and add a safety checker and its feature extractor."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    copied(
        base,
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16, "projection_dim": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=small, projection_dim=16))
    checker.save_pretrained(folder / "safety_checker")
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    if pickled:
        torch.save(checker.state_dict(), folder / "safety_checker" / "pytorch_model.bin")
        (folder / "safety_checker" / "model.safetensors").unlink()
    return folder


def in_half(base: Path, folder: Path, keep: bool = False) -> Path:
    """Copy a pipeline with its weights in files named after fp16. ``keep`` leaves the other files beside them."""
    copied(base, folder)
    for file in list(folder.rglob("*.safetensors")):
        half = {name: value.half() for name, value in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        if not keep:
            file.unlink()
    return folder


def scaled(folder: Path, part: str) -> Path:
    """Change a part's weights in place, which makes another base under the same path."""
    (file,) = (folder / part).glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: value * 1.05 for name, value in weights.items()}, file, metadata={"format": "pt"})
    return folder
