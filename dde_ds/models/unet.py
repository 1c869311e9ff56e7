"""The policy and its frozen reference: load and call the UNet of a diffusers pipeline."""

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
"""The dtypes by their names in configurations and commands. A run trains in bf16 or fp32."""


def load_unet(path: str, revision: str | None = None, precision: str = "fp32", variant: str | None = None):
    """Load the pipeline's UNet2DConditionModel to the CPU, in a ``precision`` of :data:`DTYPES`."""
    variant = find_variant(path, revision, variant)
    # A file may hold tensors of several dtypes, which diffusers would keep. So convert them all.
    return load_part(path, "unet", revision, variant, DTYPES[precision]).to(DTYPES[precision])


def load_unet_config(path: str, revision: str | None = None) -> dict:
    """Load the UNet's ``config.json``, without the weights, and add diffusers' defaults for missing keys.

    Raises:
        UserError: the file cannot be read, or no UNet can be built from it.
    """
    config = read_object(path, "unet/config.json", revision)
    return dict(build_empty(path, "unet", revision).config) | config


def unet_digest(path: str, revision: str | None = None, variant: str | None = None) -> str:
    """Return the SHA-256 of the UNet that :func:`load_unet` loads: of all its weight files and its architecture. The result is cached."""
    config, *files = unet_files(path, revision, variant)
    folder = local_folder(path, revision, [config, *files])

    def compute() -> list[str]:
        digest = hashlib.sha256()
        for name in files:
            digest.update(sha256_of(folder / name).encode())
        # Keys that begin with an underscore describe the saving, such as diffusers' version, not the architecture.
        architecture = {key: value for key, value in read_object(path, config, revision).items() if not key.startswith("_")}
        digest.update(json.dumps(architecture, sort_keys=True).encode())
        return [digest.hexdigest()]

    with unreadable(path):
        return remembered("unet", [folder / name for name in (*files, config)], compute)[0]


def unet_files(path: str, revision: str | None = None, variant: str | None = None) -> list[str]:
    """Return the names in the pipeline of the UNet's ``config.json`` and weight files."""
    _, files = weight_files(path, "unet", revision, find_variant(path, revision, variant))
    return ["unet/config.json", *(f"unet/{name}" for name in files)]


def load_component_config(path: str, component: str, revision: str | None = None) -> dict:
    """Load the ``config.json`` of a component of the pipeline, such as ``vae``, without weights.

    The defaults of the component's library are added for missing keys.

    Raises:
        UserError: the file cannot be read, or no such component can be built from it.
    """
    config = read_object(path, f"{component}/config.json", revision)
    made = build_empty(path, component, revision).config
    return {**(made if isinstance(made, Mapping) else made.to_dict()), **config}


def load_scheduler_config(path: str, revision: str | None = None) -> dict:
    """Load the pipeline's ``scheduler_config.json``, the only source of the noise schedule."""
    return read_object(path, "scheduler/scheduler_config.json", revision)


def predict(unet: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the UNet's output, (N,C,H,W), for latents (N,C,H,W) at timesteps (N,).

    ``unet`` is the model or a DeepSpeed engine around it. Latents and embeddings are cast to the dtype of its weights.
    """
    dtype = next(unet.parameters()).dtype
    embeds, added = conditioning.prompt_embeds.to(dtype), conditioning.added(dtype)
    return unet(noisy_latents.to(dtype), timesteps, embeds, added_cond_kwargs=added, return_dict=False)[0]
