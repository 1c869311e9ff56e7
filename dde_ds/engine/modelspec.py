"""What a safetensors file says of itself in its header, in the words that other programs look for.

``modelspec.…`` is Stability AI's ModelSpec 1.0.1; ``ss_…`` is what kohya's sd-scripts write into an adapter, by which programs list and
filter them. Values are text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dde_ds.config import RunConfig
from dde_ds.models.unet import family, load_scheduler_config, load_unet_config

ARCHITECTURES = {"sd": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
KOHYA_BASES = {"sd": "sd_v1", "sdxl": "sdxl_base_v1-0"}
"""sd-scripts' names of the base that an adapter is for. Programs tell SDXL's by the beginning."""
ORIGINAL_CODE = "https://github.com/Stability-AI/generative-models"
LATENT_SCALE = 8
"""Pixels of an image's side for one of its latent's."""


def modelspec(run: RunConfig, adapter: bool = False) -> dict[str, str]:
    """Return the ``modelspec.…`` entries of a single file of the run's model, or of its adapters.

    Raises:
        UserError: the base's configuration cannot be read.
    """
    path, revision = run.model.path, run.model.revision
    kind = family(path, revision)
    size = load_unet_config(path, revision).get("sample_size")
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURES[kind] + ("/lora" if adapter else ""),
        # sd-scripts' rule: its adapters of Stable Diffusion 1 have diffusers' names of the layers.
        "modelspec.implementation": "diffusers" if adapter and kind == "sd" else ORIGINAL_CODE,
        "modelspec.title": f"{base_name(run)}, aligned with preference pairs",
        **({"modelspec.resolution": f"{LATENT_SCALE * size}x{LATENT_SCALE * size}"} if isinstance(size, int) else {}),
        "modelspec.prediction_type": "v" if predicts_velocity(load_scheduler_config(path, revision)) else "epsilon",
    }


def kohya_metadata(run: RunConfig) -> dict[str, str]:
    """Return the ``ss_…`` and ``modelspec.…`` entries of the run's adapters. Raises as :func:`modelspec`."""
    assert run.lora is not None
    kind = family(run.model.path, run.model.revision)
    velocity = kind == "sd" and predicts_velocity(load_scheduler_config(run.model.path, run.model.revision))
    return {
        "ss_v2": "False",
        "ss_base_model_version": KOHYA_BASES[kind] + ("_v" if velocity else ""),
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
