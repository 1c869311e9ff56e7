"""The parts of a base that neither training nor drawing needs: an export holds them if they are there and can be read without a pickle."""

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
    """Return those optional parts that ``model_index.json`` names and an export will not hold, each with the reason."""
    names, named, found = file_names(path, revision), _named(path, revision), {}
    for part in named:
        if part == FEATURE_EXTRACTOR:
            folder = cached_folder(path, revision)
            if folder is None or not (folder / part / "preprocessor_config.json").is_file():
                found[part] = "its files are missing"
            continue
        try:
            weight_files(path, part, revision, held_variant(path, part, revision, variant))
        except UserError:
            pickled = any(name.startswith(f"{part}/") and name.endswith(".bin") for name in names)
            found[part] = "its weights are a pickle" if pickled else "its files are missing"
    if SAFETY_CHECKER in named and (FEATURE_EXTRACTOR in found or FEATURE_EXTRACTOR not in named):
        found.setdefault(SAFETY_CHECKER, "it needs the feature extractor, which is not there")
    return found


def load_optional(path: str, revision: str | None = None, variant: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the optional parts of a base, None for those that it has not or that cannot be loaded; and the latter's reasons."""
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
    index = pipeline_index(path, revision)
    return [part for part in OPTIONAL if isinstance(index.get(part), list) and None not in index[part]]
