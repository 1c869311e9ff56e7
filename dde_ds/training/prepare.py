"""Build the parts of a run: objective, engines, shards and folder. Check each against the others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dde_ds.config import RunConfig, load_config
from dde_ds.data.manifest import SOFT_LABEL
from dde_ds.data.mixture import MixedShards, open_sources
from dde_ds.data.shards import ShardSet
from dde_ds.engine import checkpoint
from dde_ds.engine.zero import initialize_policy, initialize_reference
from dde_ds.errors import UserError
from dde_ds.files import write_atomically
from dde_ds.models import unet as models
from dde_ds.models.base import family_of
from dde_ds.models.checkpointing import set_checkpointing
from dde_ds.models.compute_options import compile_blocks, use_channels_last, use_float32_output
from dde_ds.models.lora import add_adapters, read_adapters, set_adapters
from dde_ds.models.trainable import train_part
from dde_ds.objective.objective import Objective, configured_objective
from dde_ds.rows import is_correction, is_credit, read_rows
from dde_ds.training.reference import Reference, adapters_off, frozen_model
from dde_ds.warn import reason

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def build_run_objective(run: RunConfig) -> Objective:
    """Return the run's objective, with the noise schedule of its base."""
    return configured_objective(run.objective, models.load_scheduler_config(run.model.path, run.model.revision))


def load_run_objective(folder: Path) -> tuple[Objective, list[dict], list[dict]]:
    """Return the objective of a run folder, with the table of its newest checkpoint, and the rows of its ``correction.jsonl`` and of its
    ``credit.jsonl``.

    Raises:
        UserError: the folder holds no run or no checkpoint, or the run's objective has no reference.
    """
    if not (folder / "config.yaml").exists():
        raise UserError(f"run {folder}: no config.yaml there; name the output folder of a run")
    objective = build_run_objective(load_config(folder / "config.yaml"))
    checkpoints = [path for path in checkpoint.list_checkpoints(folder / "checkpoints") if not checkpoint.misnamed(path)]
    if not checkpoints:
        raise UserError(f"run {folder}: no checkpoint there yet; explain the run after its first one")
    if not objective.needs_reference:
        raise UserError(f"run {folder}: {objective.name} compares with no reference and records no table")
    checkpoint.load_table(checkpoints[-1], objective)
    return objective, read_rows(folder / "correction.jsonl", is_correction), read_rows(folder / "credit.jsonl", is_credit)


def load_engines(run: RunConfig, ds_config: dict, with_reference: bool, checkpointing: str) -> tuple[Any, Reference | None]:
    """Return the policy's engine and the reference, or None for a run that needs no reference. Collective.

    The reference is read after the policy has gone to its GPU. Both are read in the type that they compute in. For SDXL in
    bfloat16, a rank holds 5.1 GB in host memory while it reads. It also holds pages of the file, which a node's ranks share
    and the system may drop.
    """
    policy = models.load_unet(run.model.path, run.model.revision, run.precision, run.model.variant)
    if run.lora:
        add_adapters(policy, run.lora.rank, run.lora.alpha_or_rank, run.lora.targets, run.seed)
        if run.lora.init:
            set_adapters(policy, read_adapters(policy, run.lora.init, run.lora.rank, run.lora.targets), run.lora.scale)
    else:
        train_part(policy, run.model.trained_patterns)
    set_checkpointing(policy, checkpointing)
    apply_compute_options(run, policy)
    engine = initialize_policy(policy, ds_config)
    if not with_reference:
        return engine, None
    if run.lora:
        return engine, adapters_off(engine.module)
    second = models.load_unet(run.model.path, run.model.revision, run.reference_precision, run.model.variant)
    apply_compute_options(run, second)
    return engine, frozen_model(initialize_reference(second, ds_config, run.reference.placement, run.reference.dtype))


def apply_compute_options(run: RunConfig, unet: UNet2DConditionModel) -> None:
    """Give a UNet the options that policy and reference must share, so that both begin with the same predictions."""
    if run.model.channels_last:
        use_channels_last(unet)
    if run.model.float32_output:
        use_float32_output(unet)
    if run.model.compile:
        compile_blocks(unet)
    # From Ampere on, cuDNN's default is TF32, which keeps three digits of each factor.
    if "fp32" in (run.precision, run.reference_precision):
        torch.backends.cudnn.allow_tf32 = False


def open_shards(run: RunConfig) -> tuple[ShardSet | MixedShards, ShardSet | MixedShards | None]:
    """Open the training shards, and the held-out shards if the run names any.

    Shards and model must mean the same latents. This is checked here, before any weight is loaded.

    Raises:
        UserError: shards that cannot be read, shards that do not fit the model or the settings, or held-out shards that are
            training shards.
    """
    data = run.data
    remote = {"cache_dir": data.cache_dir, "cache_gb": data.cache_gb, "timeout": data.timeout_s}
    training = open_sources(data.weighted_paths, **remote, strict=not data.max_bad_samples, key=data.key)
    _check_fit(run, training, f"{data.key} {data.name}")
    if data.flip and not training.manifest["settings"]["flip"]:
        raise UserError(f"data.flip is true, but {data.name} holds no mirrored latents; shard the pairs with --flip")
    _require_labels(run, training, f"{data.key} {data.name}")
    held_out = open_sources([(run.evaluation.path, 1.0)], **remote, key="evaluation.path") if run.evaluation.path else None
    if held_out:
        _check_fit(run, held_out, f"evaluation.path {run.evaluation.path}")
        _require_labels(run, held_out, f"evaluation.path {run.evaluation.path}")
    trained_on = {one.digest for one in (training.sets if isinstance(training, MixedShards) else [training])}
    if held_out and held_out.digest in trained_on:
        raise UserError(f"evaluation.path {run.evaluation.path}: holds the pairs of {data.key}; held-out pairs are needed")
    return training, held_out


def _require_labels(run: RunConfig, shards: ShardSet | MixedShards, name: str) -> None:
    sets = shards.sets if isinstance(shards, MixedShards) else [shards]  # pairs of a set without votes are sure, label 1
    if run.objective.soft_labels and not any(one.manifest["settings"].get(SOFT_LABEL) for one in sets):
        raise UserError(
            f"objective.soft_labels is true, but {name} holds no shares of votes; shard pairs with votes (--columns votes_0=… votes_1=…)"
        )


def _check_fit(run: RunConfig, shards: ShardSet | MixedShards, name: str) -> None:
    """Refuse shards whose latents or embeddings do not fit the run's UNet."""
    config = models.load_unet_config(run.model.path, run.model.revision)
    channels, height, width = shards.latent_shape
    if channels != config["in_channels"]:
        raise UserError(
            f"{name}: latents have {channels} channels (shape {channels}x{height}x{width}), "
            f"the UNet of model.path {run.model.path} takes {config['in_channels']}; shard the pairs with this model"
        )
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if height % factor or width % factor:
        raise UserError(f"{name}: latents of {height}x{width} do not divide by the UNet's {factor}; shard at another --resolution")
    family = family_of(run.model.path, run.model.revision).layout.name
    if family != shards.manifest["settings"]["family"]:
        raise UserError(
            f"{name}: was made for {shards.manifest['settings']['family']!r} models, model.path {run.model.path} is {family!r}"
        )
    width = shards.manifest["prompts"]["tensors"]["prompt_embeds"][-1]
    if width != config["cross_attention_dim"]:  # Stable Diffusion 1 and 2 have the same layout
        raise UserError(
            f"{name}: embeddings of its captions are {width} wide, the UNet of model.path {run.model.path} takes "
            f"{config['cross_attention_dim']}; shard the pairs with this model"
        )


def open_folder(folder: Path, run: RunConfig) -> None:
    """Write the configuration into a folder that :func:`~dde_ds.training.folder.claimed` keeps for this run. Remove leftovers of
    an earlier start.

    A ``STOP`` file is such a leftover, because it counts only for the run that saw it.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        write_atomically(folder / "config.yaml", run.to_yaml().encode())
        for stale in ("DONE", "STOP"):
            (folder / stale).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output {folder}: not writable: {reason(error).lower()}") from None
    shutil.rmtree(folder / "checkpoints" / ".staging", ignore_errors=True)
