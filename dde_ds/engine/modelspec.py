"""Metadata for the header of a safetensors file, under the names that other programs look for.

``modelspec.…`` is Stability AI's ModelSpec 1.0.1. ``ss_…`` are the names that kohya's sd-scripts write into an adapter.
Programs list and filter adapters by them. Values are text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dde_ds.config import RunConfig
from dde_ds.models.base import family_of
from dde_ds.models.unet import load_scheduler_config, load_unet_config

ORIGINAL_CODE = "https://github.com/Stability-AI/generative-models"
LATENT_SCALE = 8
"""Pixels along an image's side for each element along its latent's side."""


def modelspec(run: RunConfig, adapter: bool = False) -> dict[str, str]:
    """Return the ``modelspec.…`` entries for a single file of the run's model, or for its adapters.

    Raises:
        UserError: the base's configuration cannot be read.
    """
    path, revision = run.model.path, run.model.revision
    family, velocity = family_of(path, revision), predicts_velocity(load_scheduler_config(path, revision))
    size = load_unet_config(path, revision).get("sample_size")
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.architectures[velocity] + ("/lora" if adapter else ""),
        "modelspec.implementation": "diffusers" if adapter and not family.original_adapters else ORIGINAL_CODE,
        "modelspec.title": f"{base_name(run)}, aligned with preference pairs",
        **({"modelspec.resolution": f"{LATENT_SCALE * size}x{LATENT_SCALE * size}"} if isinstance(size, int) else {}),
        "modelspec.prediction_type": "v" if velocity else "epsilon",
    }


def kohya_metadata(run: RunConfig) -> dict[str, str]:
    """Return the ``ss_…`` and ``modelspec.…`` entries for the run's adapters.

    Raises:
        UserError: as :func:`modelspec`.
    """
    assert run.lora is not None
    family = family_of(run.model.path, run.model.revision)
    velocity = predicts_velocity(load_scheduler_config(run.model.path, run.model.revision))
    return {
        "ss_v2": str(family.text_encoders[0].open_clip),
        "ss_base_model_version": family.kohya_bases[velocity],
        "ss_sd_model_name": base_name(run),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(run.lora.rank),
        "ss_network_alpha": f"{run.lora.alpha_or_rank:g}",
        **modelspec(run, adapter=True),
    }


def base_name(run: RunConfig) -> str:
    """Return the last part of the base's path or hub id."""
    return Path(run.model.path).resolve().name


def predicts_velocity(scheduler: Mapping) -> bool:
    """Return whether a model with this ``scheduler_config.json`` predicts v instead of the noise."""
    return scheduler.get("prediction_type") == "v_prediction"
