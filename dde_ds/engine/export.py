"""From a policy, or from a checkpoint of one, to a diffusers folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from dde_ds import __version__
from dde_ds.config import RunConfig
from dde_ds.engine.checkpoint import WeightReader, read_state
from dde_ds.engine.state import WEIGHT
from dde_ds.errors import UserError
from dde_ds.files import publish
from dde_ds.models.unet import LOADING, load_unet

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export_policy(policy: Any, run: RunConfig, step: int, metrics: dict, target: Path) -> None:
    """Write the policy, in the run's precision, as a complete diffusers pipeline. Collective."""
    weights = gather_weights(policy.module)
    if dist.get_rank() == 0:
        _write(weights, policy.module.config, DTYPES[run.precision], run, step, metrics, target)
    dist.barrier()


def export_checkpoint(checkpoint: Path, run: RunConfig, metrics: dict, target: Path, dtype: str) -> None:
    """The same from a checkpoint's float32 weights, in one process and without a GPU.

    Raises:
        UserError: an unknown dtype, a target that exists, or a checkpoint of another model.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if target.exists():
        raise UserError(f"--output {target}: exists already; choose another folder")
    unet = load_unet(run.model.path, run.model.revision)  # what was not trained is the base's
    weights, reader = unet.state_dict(), WeightReader(checkpoint)
    for key in reader.names:
        name, _, kind = key.rpartition("/")
        if kind == WEIGHT:
            if name not in weights:
                raise UserError(f"checkpoint {checkpoint}: holds {name}, which the UNet of {run.model.path} has not")
            weights[name] = reader.read(key)
    _write(weights, unet.config, DTYPES[dtype], run, read_state(checkpoint)["step"], metrics, target)


def gather_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """The whole state dict on rank 0's CPU, empty elsewhere; parameters sharded by ZeRO-3 are gathered one by one. Collective.

    A sharded module's own ``state_dict`` and ``save_pretrained`` give empty tensors without a word.
    """
    import deepspeed

    weights = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    if dist.get_rank() == 0:
        weights.update(
            {name: buffer.detach().cpu().clone() for name, buffer in module.named_buffers() if name in module.state_dict()}
        )
    return weights


def _write(weights: dict, config: dict, dtype: torch.dtype, run: RunConfig, step: int, metrics: dict, target: Path) -> None:
    """The base's other parts with the trained UNet; the folder appears under its name when it is whole.

    The UNet is stored in ``dtype``, the other parts in float32: that way a plain ``from_pretrained(folder)`` works, which mixes
    types where the text encoders are stored in half.
    """
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(weights)
    pipeline = DiffusionPipeline.from_pretrained(run.model.path, revision=run.model.revision, unet=unet.to(dtype), **LOADING)
    staging = target.with_name(f".{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    pipeline.save_pretrained(staging, safe_serialization=True)
    (staging / "README.md").write_text(model_card(run, step, metrics), encoding="utf-8")
    publish(staging, target)


def model_card(run: RunConfig, step: int, metrics: dict) -> str:
    """Where a model comes from: base, pairs, objective and settings, and the last numbers that its run logged."""
    head = {
        "base_model": run.model.path,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["preference-alignment"],
    }
    settings = {
        "base model": run.model.path + (f" at {run.model.revision}" if run.model.revision else ""),
        "preference pairs": run.data.path,
        "objective": f"{run.objective.name}, β = {run.objective.beta:g}",
        "optimizer steps": f"{step} of {run.batch.pairs} pairs",
        "learning rate": f"{run.optimizer.learning_rate:g}",
        "precision": run.precision,
        "seed": run.seed,
        "trained with": f"dde_ds {__version__}",
    }
    shown = ("loss", "rewards/accuracies", "drift/chosen", "drift/rejected", "dde/saturation")
    numbers = {name: f"{value:.4g}" for name, value in metrics.items() if name in shown or name.startswith("eval/")}
    rows = "\n".join(f"| {name} | {value} |" for name, value in (settings | numbers).items())
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {run.model.path}, aligned with preference pairs\n\n"
        "The UNet was trained on pairs of a preferred and a rejected image (Denoised Distribution Estimation and its baselines, "
        f"arXiv 2411.14871); all other parts are the base model's, and so is its licence.\n\n| | |\n| --- | --- |\n{rows}\n"
    )
