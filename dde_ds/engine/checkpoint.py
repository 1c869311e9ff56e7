"""Checkpoints that are whole or absent, and the export to a diffusers folder.

    checkpoints/step-00000100/
      engine/                 DeepSpeed's: policy weights and optimizer shards
      objective.safetensors   the correction table
      state.json              step, position, ranks, and what must not change on resume

A checkpoint is written in ``checkpoints/.staging`` and renamed when every rank is done: a folder named ``step-…`` is whole.
DeepSpeed's files are pickles: load only checkpoints that you trust.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from dde_ds.errors import RankError, UserError
from dde_ds.models.unet import LOADING
from dde_ds.objective.objective import Objective

STATE = "state.json"
TABLE = "objective.safetensors"


def save(folder: Path, policy: Any, objective: Objective, state: dict, keep: int) -> Path:
    """Write the checkpoint of ``state["step"]`` and delete all but the ``keep`` newest. Collective; ranks share ``folder``."""
    staging, target = folder / ".staging", folder / f"step-{state['step']:08d}"
    if dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    policy.save_checkpoint(str(staging), tag="engine", save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        safetensors.torch.save_file(objective.state_dict(), staging / TABLE)
        (staging / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        _sync_tree(staging)
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def read_state(checkpoint: Path) -> dict:
    """``state.json`` of a checkpoint."""
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {checkpoint}: {STATE} not readable: {error}") from None


def load(checkpoint: Path, policy: Any, objective: Objective) -> None:
    """Restore weights, optimizer and correction table. Collective.

    Raises:
        UserError: the checkpoint was written by another number of ranks, or a file of it is missing or damaged.
    """
    written_by, world = read_state(checkpoint)["world"], dist.get_world_size()
    if written_by != world:
        raise UserError(
            f"checkpoint {checkpoint}: was written by {written_by} ranks, this run has {world}; resume with {written_by}"
        )
    load_table(checkpoint, objective)
    try:
        found, _ = policy.load_checkpoint(str(checkpoint), tag="engine")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, AssertionError) as error:
        raise _damaged(checkpoint, error) from None
    if found is None:
        raise UserError(f"checkpoint {checkpoint}: holds no engine state; delete it to resume from the one before")


def load_table(checkpoint: Path, objective: Objective) -> None:
    """Restore the correction table alone.

    Raises:
        UserError: the table is missing or damaged.
    """
    try:
        objective.load_state_dict(safetensors.torch.load_file(checkpoint / TABLE))
    except (OSError, safetensors.SafetensorError, KeyError) as error:
        raise _damaged(checkpoint, error) from None


def _damaged(checkpoint: Path, error: Exception) -> RankError:
    return RankError(
        f"checkpoint {checkpoint}: damaged: {' '.join(str(error).split())[:300]}; delete it to resume from the one before"
    )


def export(policy: Any, model: str, revision: str | None, target: Path) -> None:
    """Write the policy as a complete diffusers pipeline: the base's other parts with the trained UNet. Collective.

    The folder appears under its name when it is whole. The UNet is stored in the run's precision, the other parts in
    float32: that way a plain ``from_pretrained(folder)`` works, which mixes types where the text encoders are stored in half.
    """
    weights = gather_weights(policy.module)
    if dist.get_rank() == 0:
        from diffusers import DiffusionPipeline, UNet2DConditionModel

        unet = UNet2DConditionModel.from_config(policy.module.config)
        unet.load_state_dict(weights)
        pipeline = DiffusionPipeline.from_pretrained(model, revision=revision, unet=unet, **LOADING)
        staging = target.with_name(f".{target.name}.staging")
        shutil.rmtree(staging, ignore_errors=True)
        unet.to(next(iter(weights.values())).dtype)
        pipeline.save_pretrained(staging, safe_serialization=True)
        _sync_tree(staging)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    dist.barrier()


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


def _sync_tree(folder: Path) -> None:
    """fsync every file and folder below, so that the rename that follows never names half of them."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
