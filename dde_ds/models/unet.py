"""The policy and its frozen reference: UNets of a diffusers pipeline, and what conditions them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dde_ds.errors import UserError
from dde_ds.files import sha256_of

PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
}
"""Pipelines that can be trained, and the family of conditioning that their UNet takes."""


# float32 said explicitly: otherwise transformers takes the type a part was saved in, diffusers takes float32, and they mix.
# Only safetensors: weights in a .bin file are a pickle, which runs code.
# low_cpu_mem_usage needs accelerate, and is of no use for parts that are trained.
LOADING = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False, "use_safetensors": True}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""By the names that configurations and commands have for them; a run trains in bf16 or fp32."""
WEIGHTS = "diffusion_pytorch_model"
"""What diffusers calls a model's weights, before ``.safetensors``."""


def pipeline_index(path: str, revision: str | None = None) -> dict:
    """``model_index.json`` of a diffusers folder or hub id.

    Raises:
        UserError: it cannot be had, or names a pipeline that this project does not train.
    """
    file = Path(path) / "model_index.json"
    if not file.is_file():
        if Path(path).exists() or path.startswith((".", "/")):
            raise UserError(f"model.path {path}: no model_index.json in it; expected a diffusers pipeline folder or a hub id")
        file = _from_hub(path, "model_index.json", revision)
    index = json.loads(Path(file).read_text(encoding="utf-8"))
    if index.get("_class_name") not in PIPELINES:
        raise UserError(f"model.path {path}: is a {index.get('_class_name')}, expected one of {', '.join(PIPELINES)}")
    return index


def family(path: str, revision: str | None = None) -> str:
    """``sd`` or ``sdxl``."""
    return PIPELINES[pipeline_index(path, revision)["_class_name"]]


def load_unet(path: str, revision: str | None = None, precision: str = "fp32"):
    """The pipeline's UNet2DConditionModel on the CPU, in ``fp32`` or ``bf16``."""
    from diffusers import UNet2DConditionModel

    pipeline_index(path, revision)
    try:
        options = LOADING | {"torch_dtype": DTYPES[precision]}
        # A file may hold several types, which diffusers would leave as they are.
        return UNet2DConditionModel.from_pretrained(path, subfolder="unet", revision=revision, **options).to(DTYPES[precision])
    except OSError as error:
        raise UserError(f"model.path {path}: unet not loadable: {' '.join(str(error).split())}") from None


def load_unet_config(path: str, revision: str | None = None) -> dict:
    """The UNet's ``config.json``, without its weights."""
    from diffusers import UNet2DConditionModel

    pipeline_index(path, revision)
    try:
        return UNet2DConditionModel.load_config(path, subfolder="unet", revision=revision)
    except OSError as error:
        raise UserError(f"model.path {path}: unet not loadable: {' '.join(str(error).split())}") from None


def unet_digest(path: str, revision: str | None = None) -> str:
    """SHA-256 of what :func:`load_unet` loads, read from its files: all weights, and the architecture."""
    folder = Path(path) / "unet"
    if not Path(path).exists():
        parts = ("config.json", f"{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors.index.json", f"{WEIGHTS}-*-of-*.safetensors")
        folder = _snapshot(path, revision, [f"unet/{part}" for part in parts]) / "unet"
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    names = [f"{WEIGHTS}.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    digest = hashlib.sha256()
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"model.path {path}: unet holds no {name}")
        digest.update(sha256_of(folder / name).encode())
    # Keys with an underscore say by which version it was saved.
    config = {key: value for key, value in load_unet_config(path, revision).items() if not key.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True).encode())
    return digest.hexdigest()


def load_component_config(path: str, component: str, revision: str | None = None) -> dict:
    """``config.json`` of a component of the pipeline, such as ``vae``, without its weights."""
    index = pipeline_index(path, revision)
    file = Path(path) / component / "config.json"
    if component not in index or (Path(path).exists() and not file.is_file()):
        raise UserError(f"model.path {path}: no {component}/config.json in it")
    found = file if file.is_file() else _from_hub(path, f"{component}/config.json", revision)
    return json.loads(Path(found).read_text(encoding="utf-8"))


def load_scheduler_config(path: str, revision: str | None = None) -> dict:
    """``scheduler_config.json`` of the pipeline: the only source of the noise schedule."""
    from diffusers import DDIMScheduler

    try:
        return DDIMScheduler.load_config(path, subfolder="scheduler", revision=revision)
    except OSError as error:
        raise UserError(f"model.path {path}: scheduler not loadable: {' '.join(str(error).split())}") from None


class Conditioning(NamedTuple):
    """What a UNet is told beside latents and timesteps."""

    prompt_embeds: Tensor
    """(N,S,D)."""
    pooled_prompt_embeds: Tensor | None = None
    """(N,P), SDXL's."""
    time_ids: Tensor | None = None
    """(N,6) float32, SDXL's sizes and crops in pixels."""


def predict(unet: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the UNet's output, (N,C,H,W), for latents (N,C,H,W) at timesteps (N,).

    ``unet`` may be the model or a DeepSpeed engine around it; latents and embeddings are cast to its type.
    """
    dtype = next(unet.parameters()).dtype
    embeds, pooled, time_ids = conditioning
    # time_ids stay float32: a size of 765 pixels has no bfloat16.
    added = None if pooled is None else {"text_embeds": pooled.to(dtype), "time_ids": time_ids}
    return unet(noisy_latents.to(dtype), timesteps, embeds.to(dtype), added_cond_kwargs=added, return_dict=False)[0]


def _from_hub(path: str, name: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return hf_hub_download(path, name, revision=revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.path {path}: neither a diffusers folder nor to be had from the hub: {' '.join(str(error).split())}"
        ) from None


def _snapshot(path: str, revision: str | None, patterns: list[str]) -> Path:
    """Folder with the files of a hub id that match."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.path {path}: neither a diffusers folder nor to be had from the hub: {' '.join(str(error).split())}"
        ) from None
