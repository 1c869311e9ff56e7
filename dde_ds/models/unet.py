"""The policy and its frozen reference: UNets of a diffusers pipeline, and what conditions them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dde_ds.files import sha256_of
from dde_ds.models.base import find_variant, local_folder, read_object, unreadable, weight_files
from dde_ds.models.family import Conditioning
from dde_ds.models.parts import build_empty, load_part
from dde_ds.models.remembered import remembered

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""By the names that configurations and commands have for them; a run trains in bf16 or fp32."""


def load_unet(path: str, revision: str | None = None, precision: str = "fp32", variant: str | None = None):
    """The pipeline's UNet2DConditionModel on the CPU, in ``fp32`` or ``bf16``."""
    variant = find_variant(path, revision, variant)
    # A file may hold several types, which diffusers would leave as they are.
    return load_part(path, "unet", revision, variant, DTYPES[precision]).to(DTYPES[precision])


def load_unet_config(path: str, revision: str | None = None) -> dict:
    """The UNet's ``config.json``, without its weights, and diffusers' defaults for what it leaves out.

    Raises:
        UserError: it cannot be had, or no UNet can be made from it.
    """
    config = read_object(path, "unet/config.json", revision)
    return dict(build_empty(path, "unet", revision).config) | config


def unet_digest(path: str, revision: str | None = None, variant: str | None = None) -> str:
    """SHA-256 of what :func:`load_unet` loads, read from its files: all weights, and the architecture. Remembered."""
    config, *files = unet_files(path, revision, variant)
    folder = local_folder(path, revision, [config, *files])

    def compute() -> list[str]:
        digest = hashlib.sha256()
        for name in files:
            digest.update(sha256_of(folder / name).encode())
        # Keys with an underscore say by which version it was saved.
        architecture = {key: value for key, value in read_object(path, config, revision).items() if not key.startswith("_")}
        digest.update(json.dumps(architecture, sort_keys=True).encode())
        return [digest.hexdigest()]

    with unreadable(path):
        return remembered("unet", [folder / name for name in (*files, config)], compute)[0]


def unet_files(path: str, revision: str | None = None, variant: str | None = None) -> list[str]:
    """The UNet's ``config.json`` and its weight files, by their names in the pipeline."""
    _, files = weight_files(path, "unet", revision, find_variant(path, revision, variant))
    return ["unet/config.json", *(f"unet/{name}" for name in files)]


def load_component_config(path: str, component: str, revision: str | None = None) -> dict:
    """``config.json`` of a component of the pipeline, such as ``vae``, without its weights, and its library's defaults for what it
    leaves out.

    Raises:
        UserError: it cannot be had, or no such part can be made from it.
    """
    config = read_object(path, f"{component}/config.json", revision)
    made = build_empty(path, component, revision).config
    return {**(made if isinstance(made, Mapping) else made.to_dict()), **config}


def load_scheduler_config(path: str, revision: str | None = None) -> dict:
    """``scheduler_config.json`` of the pipeline: the only source of the noise schedule."""
    return read_object(path, "scheduler/scheduler_config.json", revision)


def predict(unet: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the UNet's output, (N,C,H,W), for latents (N,C,H,W) at timesteps (N,).

    ``unet`` may be the model or a DeepSpeed engine around it; latents and embeddings are cast to its type.
    """
    dtype = next(unet.parameters()).dtype
    embeds, added = conditioning.prompt_embeds.to(dtype), conditioning.added(dtype)
    return unet(noisy_latents.to(dtype), timesteps, embeds, added_cond_kwargs=added, return_dict=False)[0]
