"""From a policy, or from a checkpoint of one, to files that other programs load: a diffusers folder, LoRA weights, or a single file."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from dde_ds import __version__
from dde_ds.config import RunConfig
from dde_ds.engine.checkpoint import WeightReader, read_state
from dde_ds.engine.single_file import to_single_file
from dde_ds.engine.state import EMA, WEIGHT, gather, moments
from dde_ds.errors import UserError
from dde_ds.files import publish, put_in_place, staged_path
from dde_ds.models import lora
from dde_ds.models.unet import DTYPES, LOADING, load_unet

FORMATS = ("folder", "lora", "single")
LORA_FILE = "pytorch_lora_weights.safetensors"
"""What ``load_lora_weights(folder)`` looks for."""


def export_policy(policy: Any, run: RunConfig, step: int, metrics: dict, target: Path) -> None:
    """Write the policy, in the run's precision, as a complete diffusers pipeline; its moving average where the run keeps one.
    Collective."""
    kind = EMA if run.ema and EMA in moments(policy) else WEIGHT  # it begins with the first step that is made
    trained = {}
    for name, tensors in gather(policy, [kind]):  # a module sharded by ZeRO-3 would save empty tensors without a word
        if dist.get_rank() == 0:
            trained[name] = tensors[kind].cpu()
    if dist.get_rank() == 0:
        _write_folder(trained, DTYPES[run.precision], run, model_card(run, step, metrics, kind), target)
    dist.barrier()


def export_checkpoint(
    checkpoint: Path,
    run: RunConfig,
    metrics: dict,
    target: Path,
    dtype: str,
    form: str = "folder",
    raw: bool = False,
    max_shard_size: str | None = None,
) -> None:
    """The same from a checkpoint's float32 weights, in one process and without a GPU.

    Args:
        form: one of ``FORMATS``.
        raw: the weights themselves, also where the run keeps a moving average of them.
        max_shard_size: of the folder's weight files, such as ``5GB``. None is diffusers' own.

    Raises:
        UserError: an unknown dtype or form, a target that exists, or a checkpoint of another model.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if form not in FORMATS:
        raise UserError(f"--format {form}: must be one of {', '.join(FORMATS)}")
    if form == "lora" and not run.lora:
        raise UserError("--format lora: this run trained all parameters and has no adapters; choose folder or single")
    if form == "single" and target.suffix != ".safetensors":
        raise UserError(f"--output {target}: --format single writes one file; give it a name that ends in .safetensors")
    if max_shard_size and not re.fullmatch(r"\d+[KMG]B", max_shard_size):
        raise UserError(f"--max-shard-size {max_shard_size}: expected a size such as 500MB or 5GB")
    if target.exists():
        raise UserError(f"--output {target}: exists already; choose another name")
    reader, kind = WeightReader(checkpoint), EMA if run.ema and not raw else WEIGHT
    trained = {name.removesuffix(f"/{kind}"): reader.read(name) for name in reader.names if name.endswith(f"/{kind}")}
    if not trained:
        raise UserError(f"checkpoint {checkpoint}: holds no moving average of the weights; export them with --raw")
    card = model_card(run, read_state(checkpoint)["step"], metrics, kind)
    if form == "folder":
        _write_folder(trained, DTYPES[dtype], run, card, target, max_shard_size)
    elif form == "lora":
        _in_place(target, card, lambda staging: _write_lora(trained, DTYPES[dtype], run, staging))
    else:
        _write_single(trained, DTYPES[dtype], run, card, target)


def trained_unet(trained: dict[str, Tensor], run: RunConfig) -> Any:
    """The base's UNet, float32, with what was trained put in its place, or merged into it if it was adapters.

    Raises:
        UserError: the base has no such parameters.
    """
    unet = load_unet(run.model.path, run.model.revision)
    weights = unet.state_dict()  # the UNet's own tensors
    for name, value in lora.differences(trained, run.lora.scale) if run.lora else trained.items():
        if name not in weights:
            raise UserError(f"model.path {run.model.path}: has no {name} in its UNet, which was trained: not the base of this run")
        if run.lora:
            weights[name] += value.view_as(weights[name])
        else:
            weights[name].copy_(value)
    return unet


def _pipeline(trained: dict[str, Tensor], dtype: torch.dtype, run: RunConfig) -> Any:
    """The base's pipeline with the trained UNet in ``dtype``, its other parts in float32."""
    from diffusers import DiffusionPipeline

    unet = trained_unet(trained, run).to(dtype)
    return DiffusionPipeline.from_pretrained(run.model.path, revision=run.model.revision, unet=unet, **LOADING)


def _write_folder(
    trained: dict[str, Tensor], dtype: torch.dtype, run: RunConfig, card: str, target: Path, max_shard_size: str | None = None
) -> None:
    """The base's other parts with the trained UNet; of a LoRA run with the adapters in a file beside, for the base model.

    The UNet is stored in ``dtype``, the other parts in float32: that way a plain ``from_pretrained(folder)`` works, which mixes
    types where the text encoders are stored in half.
    """
    pipeline = _pipeline(trained, dtype, run)

    def write(staging: Path) -> None:
        pipeline.save_pretrained(staging, safe_serialization=True, max_shard_size=max_shard_size)
        if run.lora:
            _write_lora(trained, dtype, run, staging)

    _in_place(target, card, write)


def _write_lora(trained: dict[str, Tensor], dtype: torch.dtype, run: RunConfig, folder: Path) -> None:
    from diffusers import StableDiffusionPipeline  # SDXL's writes the same

    layers = {name: value.to(dtype).contiguous() for name, value in lora.to_file(trained, run.lora.scale).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, weight_name=LORA_FILE)


def _write_single(trained: dict[str, Tensor], dtype: torch.dtype, run: RunConfig, card: str, target: Path) -> None:
    """One file in the layout of the original Stable Diffusion code, all of it in ``dtype``: programs that read it expect one type."""
    weights = to_single_file(_pipeline(trained, dtype, run))
    weights = {name: value.to(dtype).contiguous() for name, value in weights.items()}
    staged = staged_path(target)
    staged.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, staged, metadata={"format": "pt", "model_card": card})
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    put_in_place(staged, target)


def _in_place(target: Path, card: str, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder, which appears under its name, with the model card, when it is whole."""
    staging = target.with_name(f".{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    write(staging)
    (staging / "README.md").write_text(card, encoding="utf-8")
    publish(staging, target)


def model_card(run: RunConfig, step: int, metrics: dict, kind: str) -> str:
    """Where a model comes from: base, pairs, objective and settings, and the last numbers that its run logged."""
    head = {
        "base_model": run.model.path,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["preference-alignment", *(["lora"] if run.lora else [])],
    }
    settings = {
        "base model": run.model.path + (f" at {run.model.revision}" if run.model.revision else ""),
        "preference pairs": run.data.name,
        "objective": f"{run.objective.name}, β = {run.objective.beta:g}",
        "optimizer steps": f"{step} of {run.batch.pairs} pairs",
        "learning rate": f"{run.optimizer.learning_rate:g}",
        "precision": run.precision,
        "seed": run.seed,
        **({"weights": f"moving average of decay {run.ema.decay:g}"} if kind == EMA else {}),
        **({"LoRA": f"rank {run.lora.rank}, α {run.lora.alpha_or_rank:g}, on {', '.join(run.lora.targets)}"} if run.lora else {}),
        "trained with": f"dde_ds {__version__}",
    }
    shown = ("loss", "rewards/accuracies", "drift/chosen", "drift/rejected", "dde/saturation")
    numbers = {name: f"{value:.4g}" for name, value in metrics.items() if name in shown or name.startswith("eval/")}
    adapters = (
        f"The adapters are in `{LORA_FILE}`, for `load_lora_weights` on the base model; a UNet beside it has them merged already.\n\n"
        if run.lora
        else ""
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in (settings | numbers).items())
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {run.model.path}, aligned with preference pairs\n\n"
        "The UNet was trained on pairs of a preferred and a rejected image (Denoised Distribution Estimation and its baselines, "
        "arXiv 2411.14871); all other parts are the base model's, and so is its licence.\n\n"
        f"{adapters}| | |\n| --- | --- |\n{rows}\n"
    )
