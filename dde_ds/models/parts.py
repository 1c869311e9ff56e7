"""The parts of a base pipeline: load them in float32, or build them without weights to see their names and shapes."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch

from dde_ds.errors import UserError
from dde_ds.models.base import (
    family_of,
    file_names,
    find_variant,
    local_folder,
    pipeline_index,
    read_object,
    unloadable,
    weight_files,
)
from dde_ds.models.family import OPTIONAL, PARTS, TRAINED_AND_DRAWN

# float32 must be named: otherwise transformers takes the type in which a part was saved, diffusers takes float32, and
# the types mix.
# Only safetensors are read: weights in a .bin file are a pickle, which runs code.
# low_cpu_mem_usage needs accelerate, and does not help with parts that are trained.
LOADING = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False, "use_safetensors": True}
# Real models have at most 32 layers in a row. Building a configuration with millions of layers would take hours.
MOST_LAYERS = 256


def required_parts(path: str, revision: str | None = None) -> dict[str, str]:
    """Return the class of each part that must exist, by the part's name.

    Raises:
        UserError: ``model_index.json`` lacks a part, or names a class that this project cannot train with.
    """
    index = pipeline_index(path, revision)
    classes_of = {}
    for part in (*family_of(path, revision).parts, "scheduler"):
        value = index.get(part)
        library, name = value if isinstance(value, list) and len(value) == 2 else (None, None)
        known = PARTS.get(part)
        known_library, classes = (known.library, known.classes) if known else ("diffusers", (name,))
        expected = " or ".join(known.classes) if known else "a scheduler of diffusers"
        if library != known_library or not isinstance(name, str) or name not in classes:
            raise UserError(f"model.path {path}: its model_index.json says that {part} is {value!r}, expected {expected}")
        classes_of[part] = name
    return classes_of


def load_part(
    path: str, part: str, revision: str | None = None, variant: str | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """Return a part with weights on the CPU, in ``dtype``.

    Args:
        path: a diffusers folder or a hub id.
        part: name of the part.
        revision: revision on the hub.
        variant: variant of its weights, as :func:`dde_ds.models.base.find_variant` returned it.
        dtype: type of the loaded weights.

    Raises:
        UserError: the part cannot be loaded, or its files lack some of its weights, which would then be random.
    """
    variant, files = weight_files(path, part, revision, variant)
    index = [name for name in file_names(path, revision) if name.startswith(f"{part}/") and ".safetensors.index" in name]
    folder = local_folder(path, revision, [f"{part}/config.json", *index, *(f"{part}/{name}" for name in files)])
    kind = _class(path, part, revision)
    build_empty(path, part, revision)  # this refuses a configuration of a million layers
    with unloadable(path, part):
        model, info = kind.from_pretrained(
            folder, subfolder=part, variant=variant, output_loading_info=True, **LOADING | {"torch_dtype": dtype}
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model.path {path}: {part} not loadable: its files hold no {missing[0]} ({len(missing)} of its tensors are missing)"
        )
    return model


def build_empty(path: str, part: str, revision: str | None = None) -> Any:
    """Return a part as its ``config.json`` describes it, on the meta device: names and shapes without data.

    Raises:
        UserError: the configuration cannot be read, or no model can be made from it.
    """
    config = read_object(path, f"{part}/config.json", revision)
    return _built(path, part, _class(path, part, revision).__name__, json.dumps(config))


@lru_cache(maxsize=8)
def _built(path: str, part: str, kind: str, config: str) -> Any:
    """Build a part from the JSON text of its configuration, and check the numbers that are used outside of the model."""
    values = json.loads(config)
    _check_layers(path, part, values)
    with unloadable(path, f"{part}/config.json"), torch.device("meta"):
        cls = _named(kind)
        made = cls(cls.config_class.from_dict(values)) if hasattr(cls, "config_class") else cls.from_config(values)
    for key, most in (PARTS | OPTIONAL)[part].numbers.items():
        value = getattr(made.config, key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise UserError(f"model.path {path}: {part}/config.json: {key} is {value!r}: expected a whole number from 1 to {most}")
    if part == "vae":
        factor = made.config.scaling_factor
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < 1e6:
            raise UserError(f"model.path {path}: vae/config.json: scaling_factor is {factor!r}: expected a number above 0")
    return made


def _check_layers(path: str, part: str, config: dict) -> None:
    """Refuse a configuration with more than :data:`MOST_LAYERS` layers in a row."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_layers(path, part, value)
        flat = [value]
        while any(isinstance(item, list) for item in flat):
            flat = [inner for item in flat for inner in (item if isinstance(item, list) else [item])]
        if "layers" in key and any(isinstance(item, (int, float)) and item > MOST_LAYERS for item in flat):
            raise UserError(f"model.path {path}: {part}/config.json: {key} is {value!r}: above {MOST_LAYERS}")


def _class(path: str, part: str, revision: str | None) -> type:
    return _named(OPTIONAL[part].classes[0] if part in OPTIONAL else required_parts(path, revision)[part])


def _named(kind: str) -> type:
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion import safety_checker

    return next(getattr(place, kind) for place in (diffusers, transformers, safety_checker) if hasattr(place, kind))


def load_pipeline(path: str, revision: str | None = None, variant: str | None = None, **replaced: Any) -> Any:
    """Return the pipeline in float32, without the parts that neither drawing nor training needs.

    Args:
        path: a diffusers folder or a hub id.
        revision: revision on the hub.
        variant: as ``model.variant``; None finds it.
        replaced: parts to use instead of the pipeline's own; ``unet=None`` loads none.

    Raises:
        UserError: a part cannot be loaded.
    """
    family, needed = family_of(path, revision), required_parts(path, revision)
    variant = find_variant(path, revision, variant)
    loaded = {
        part: load_part(path, part, revision, variant) for part in needed if part in TRAINED_AND_DRAWN and part not in replaced
    }
    small = [f"{part}/*" for part in needed if part not in TRAINED_AND_DRAWN]
    folder = local_folder(path, revision, ["model_index.json", *small])
    with unloadable(path, "the pipeline"):
        return family.pipeline_class().from_pretrained(folder, **LOADING, **dict.fromkeys(family.optional) | loaded | replaced)
