"""The parts of a base that neither training nor drawing needs.

An export holds them if they exist and can be read without a pickle.
"""

from __future__ import annotations

from typing import Any

from dde_ds.errors import UserError
from dde_ds.models.base import (
    cached_folder,
    family_of,
    file_names,
    held_variant,
    local_folder,
    pipeline_index,
    unloadable,
    weight_files,
)
from dde_ds.models.family import OPTIONAL
from dde_ds.models.parts import load_part

SAFETY_CHECKER, FEATURE_EXTRACTOR = "safety_checker", "feature_extractor"


def left_out(path: str, revision: str | None = None, variant: str | None = None) -> dict[str, str]:
    """Return the reason for each optional part that ``model_index.json`` names and an export will not hold."""
    names, named, reasons = file_names(path, revision), _named(path, revision), {}
    for part in named:
        if part == FEATURE_EXTRACTOR:
            folder = cached_folder(path, revision)
            if folder is None or not (folder / part / "preprocessor_config.json").is_file():
                reasons[part] = "its files are missing"
            continue
        try:
            weight_files(path, part, revision, held_variant(path, part, revision, variant))
        except UserError:
            pickled = any(name.startswith(f"{part}/") and name.endswith(".bin") for name in names)
            reasons[part] = "its weights are a pickle" if pickled else "its files are missing"
    if SAFETY_CHECKER in named and (FEATURE_EXTRACTOR in reasons or FEATURE_EXTRACTOR not in named):
        reasons.setdefault(SAFETY_CHECKER, "it needs the feature extractor, which is not there")
    return reasons


def load_optional(path: str, revision: str | None = None, variant: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the optional parts of a base, and the reason for each part that an export will not hold.

    A part that the base lacks or that cannot be loaded is None.
    """
    from transformers import CLIPImageProcessor

    parts: dict[str, Any] = dict.fromkeys(family_of(path, revision).optional)
    reasons = left_out(path, revision, variant)
    for part in _named(path, revision):
        if part in reasons or part not in parts:
            continue
        try:
            if part == FEATURE_EXTRACTOR:
                folder = local_folder(path, revision, [f"{part}/*"])
                with unloadable(path, part):
                    parts[part] = CLIPImageProcessor.from_pretrained(folder, subfolder=part)
            else:
                parts[part] = load_part(path, part, revision, held_variant(path, part, revision, variant))
        except UserError as error:
            reasons[part] = str(error)
    if parts[FEATURE_EXTRACTOR] is None and parts.get(SAFETY_CHECKER) is not None:
        parts[SAFETY_CHECKER], reasons[SAFETY_CHECKER] = None, "it needs the feature extractor, which is not there"
    return parts, reasons


def _named(path: str, revision: str | None) -> list[str]:
    """Return the optional parts that ``model_index.json`` names."""
    index = pipeline_index(path, revision)
    return [part for part in OPTIONAL if isinstance(index.get(part), list) and None not in index[part]]
