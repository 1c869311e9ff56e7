"""Find whatever would stop a run in its first minutes, before a weight is loaded.

``dde-ds validate`` and the start of a run make the same checks.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from dde_ds.config import ModelConfig, RunConfig
from dde_ds.data.mixture import MixedShards
from dde_ds.data.shards import ShardSet
from dde_ds.engine.zero import check_engine
from dde_ds.errors import UserError
from dde_ds.models.base import are_here
from dde_ds.models.check import check_base
from dde_ds.models.encode import encoder_files, encoders_digests
from dde_ds.models.lora import check_targets, read_adapters
from dde_ds.models.optional import left_out
from dde_ds.models.parts import build_empty
from dde_ds.models.trainable import trained_names
from dde_ds.models.unet import load_component_config, unet_digest, unet_files
from dde_ds.objective.objective import Objective
from dde_ds.training.track import require_trackers

WEIGHTS, ENCODERS, SCHEDULE = "model.weights", "model.encoders", "model.schedule"
Shards = ShardSet | MixedShards


def check_start(
    run: RunConfig,
    shards: Shards,
    held_out: Shards | None,
    objective: Objective,
    ds_config: dict,
    world: int,
    download: bool = True,
) -> tuple[dict[str, str], list[str]]:
    """Check base, shards and settings against each other.

    Args:
        ds_config: a configuration that :func:`dde_ds.engine.zero.complete_config` made.
        world: number of ranks.
        download: fetch a hub id's weights that this machine lacks. If False, missing weights are not compared.

    Returns:
        The base's identity, as in :func:`base_identity`, without digests of weights if the weights are not on this machine;
            and lines that the user should know.

    Raises:
        UserError: a problem that would stop the run.
    """
    base = run.model.path, run.model.revision, run.model.variant
    _check_settings(run, objective, ds_config, world)
    check_base(*base, download=download)
    notes = [f"the export leaves out the base's {part.replace('_', ' ')}: {why}" for part, why in left_out(*base).items()]
    if download or are_here(*base[:2], encoder_files(*base)):
        _check_encoders(run, shards, held_out)
    else:
        notes.append(f"model.path {run.model.path}: not on this machine yet; whether the shards are of its VAE shows at the start")
    return base_identity(run.model, objective, download or are_here(*base[:2], unet_files(*base))), notes


def base_identity(model: ModelConfig, objective: Objective, weights: bool = True) -> dict[str, str]:
    """Return what tells one base from another, wherever it lies.

    These are SHA-256 digests of its UNet, of its VAE and text encoders, and of the objective's noise schedule.

    Args:
        weights: whether to include the digests of weights. Weights are read once, and their digests are remembered.
    """
    schedule = objective.schedule
    tables = hashlib.sha256(schedule.alphas_cumprod.cpu().numpy().tobytes() + schedule.prediction_type.encode()).hexdigest()
    if not weights:
        return {SCHEDULE: tables}
    where = model.path, model.revision, model.variant
    encoders = encoders_digests(*where)
    # Versions of transformers name these weights in two ways, with two digests. The smaller one is the same under every version.
    return {WEIGHTS: unet_digest(*where), ENCODERS: min(encoders.full, encoders.other_full), SCHEDULE: tables}


def require_writable(folder: Path) -> None:
    """Refuse a run folder that could not be made or written, without making it.

    Raises:
        UserError: the folder could not be made or written.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"output {folder}: not writable: {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"output {folder}: not writable: permission denied in {nearest}")


def _check_settings(run: RunConfig, objective: Objective, ds_config: dict, world: int) -> None:
    """Refuse settings that do not fit the base's UNet, the engine or the installed packages."""
    empty = build_empty(run.model.path, "unet", run.model.revision)
    if run.lora:
        check_targets(empty, run.lora.targets)
        if run.lora.init:
            read_adapters(empty, run.lora.init, run.lora.rank, run.lora.targets)
    sizes = {name: parameter.numel() for name, parameter in empty.named_parameters()}
    trained = None if run.lora else sum(sizes[name] for name in trained_names(empty, run.model.trained_patterns))
    check_engine(ds_config, trained, world, run.model.gradient_checkpointing == "selective")
    require_trackers(run)
    if run.samples.prompts and run.samples.inference_steps > objective.schedule.num_train_timesteps:
        raise UserError(
            f"samples.inference_steps is {run.samples.inference_steps}: the model has {objective.schedule.num_train_timesteps} timesteps"
        )


def _check_encoders(run: RunConfig, shards: Shards, held_out: Shards | None) -> None:
    """Refuse shards whose latents and embeddings mean something else to the base than to the model that encoded them.

    With ``data.allow_other_encoders``, this only compares the held-out shards with the training shards.
    """
    path, revision = run.model.path, run.model.revision
    factor = load_component_config(path, "vae", revision)["scaling_factor"]
    digests = encoders_digests(path, revision, run.model.variant)
    named = [(f"data.path {run.data.name}", shards)] + ([(f"evaluation.path {run.evaluation.path}", held_out)] if held_out else [])
    for name, one in named:
        settings = one.manifest["settings"]
        if run.data.allow_other_encoders:
            trained_on = shards.manifest["settings"]
            if settings.get("weights") != trained_on.get("weights") and not (digests.fit(settings) and digests.fit(trained_on)):
                raise UserError(
                    f"{name}: was encoded by {settings.get('model')!r} with other weights than data.path {run.data.name}"
                )
            continue
        hint = "shard the pairs with this model; or set data.allow_other_encoders to true, if you know that both encode alike and only the UNets differ"
        if not digests.fit(settings):
            raise UserError(
                f"{name}: was encoded by {settings.get('model')!r}, whose VAE or text encoders have other weights than those of model.path "
                f"{path}; {hint}"
            )
        if settings.get("scaling_factor") != factor:
            raise UserError(
                f"{name}: its latents are scaled by {settings.get('scaling_factor')}, those of model.path {path} by {factor}; {hint}"
            )
