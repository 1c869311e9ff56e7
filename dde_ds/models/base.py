"""The files of a base pipeline, in a folder or of a hub id: which of them are read, and what is wrong with them in one line.

Weights are read from safetensors alone: a ``.bin`` file is a pickle, which can run code. Many repositories name theirs after what they
hold, such as ``diffusion_pytorch_model.fp16.safetensors``. diffusers calls that name the variant; here it is found.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from dde_ds.errors import UserError
from dde_ds.models.family import OPTIONAL, PARTS, PIPELINES, TRAINED_AND_DRAWN, Family, conversion_of, find_family
from dde_ds.untrusted import read_json

DIFFUSERS = "diffusion_pytorch_model"
WEIGHTS = {name: part.weights for name, part in (PARTS | OPTIONAL).items() if part.weights}
"""Parts with weights, and what their library calls the file, before the variant and ``.safetensors``."""
GUIDE = "launchers/recipes/README.md, Models that are taken"


def check_path(path: str) -> None:
    """Raises:
    UserError: ``path`` is a file, where a pipeline's folder or a hub id is needed.
    """
    if Path(path).is_file():
        raise UserError(
            f"model.path {path}: is a single file, expected a diffusers folder or a hub id; convert it: "
            f"{conversion_of(path)}; see {GUIDE}"
        )


def pipeline_index(path: str, revision: str | None = None) -> dict:
    """``model_index.json`` of a diffusers folder or hub id.

    Raises:
        UserError: it cannot be had, or names a pipeline that this project does not train.
    """
    index = read_object(path, "model_index.json", revision)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise UserError(f"model.path {path}: is a {kind}, expected one of {', '.join(PIPELINES)}; see {GUIDE}")
    return index


def family_of(path: str, revision: str | None = None) -> Family:
    """Return the family of a diffusers folder or hub id.

    Raises:
        UserError: as :func:`pipeline_index`; or its text encoder's configuration cannot be had.
    """
    kind = pipeline_index(path, revision)["_class_name"]
    return find_family(kind, read_object(path, "text_encoder/config.json", revision))


def file_names(path: str, revision: str | None = None) -> frozenset[str]:
    """Return the names, ``part/name``, of all files in the pipeline's parts."""
    if not Path(path).is_dir():
        return _hub_names(path, revision)
    found = set()
    for part in WEIGHTS:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), unreadable(path):
            found |= {f"{part}/{entry.name}" for entry in os.scandir(Path(path) / part) if entry.is_file()}
    return frozenset(found)


def find_variant(path: str, revision: str | None = None, wanted: str | None = None) -> str | None:
    """Return the variant to read the pipeline's weights in: None for files without one.

    Args:
        wanted: read this one. None takes files without a variant where each part has them, and otherwise the one variant there is.

    Raises:
        UserError: ``wanted`` is not there, or there are several to choose from.
    """
    names = file_names(path, revision)
    held = {part: _variants(names, part) for part in TRAINED_AND_DRAWN}
    held = {part: variants for part, variants in held.items() if variants}
    named = sorted({variant for variants in held.values() for variant in variants if variant})
    if wanted:
        if wanted not in named:
            raise UserError(f"model.variant is {wanted!r}: model.path {path} holds {', '.join(named) or 'no variant'}")
        return wanted
    if all(None in variants for variants in held.values()):
        return None
    whole = [variant for variant in named if all({variant, None} & variants for variants in held.values())]
    if len(whole) > 1:
        raise UserError(f"model.path {path}: holds its weights as {' and '.join(whole)}: choose one by model.variant")
    return whole[0] if whole else None


def weight_files(path: str, part: str, revision: str | None = None, variant: str | None = None) -> tuple[str | None, list[str]]:
    """Return the variant that a part is read in, and its weight files, in the part's folder: those of ``variant`` if the part has it,
    otherwise those without one.

    Raises:
        UserError: it has no safetensors, or an index that names files which are not there; the message says how to convert it.
    """
    names = file_names(path, revision)
    for own in (variant, None) if variant else (None,):
        dotted, name = f".{own}" if own else "", WEIGHTS[part]
        whole, index = f"{name}{dotted}.safetensors", f"{name}.safetensors.index{dotted}.json"
        # Each library's own order, where both are there.
        for found in (index, whole) if name == DIFFUSERS else (whole, index):
            if f"{part}/{found}" in names:
                return own, [whole] if found == whole else _indexed(path, part, found, names, revision)
    variants = sorted(filter(None, _variants(names, part)))
    pickles = sorted(name for name in names if name.startswith(f"{part}/") and name.endswith((".bin", ".ckpt", ".pt", ".pth")))
    if pickles:
        raise UserError(
            f"model.path {path}: {pickles[0]} is a pickle, which can run code, and {part} holds no {WEIGHTS[part]}.safetensors; if you trust "
            f"it, convert it: DiffusionPipeline.from_pretrained({path!r}).save_pretrained('base'); see {GUIDE}"
        )
    raise UserError(
        f"model.path {path}: {part} holds no {WEIGHTS[part]}.safetensors"
        + (f", but {', '.join(variants)}, which other parts lack; choose by model.variant" if variants else "")
    )


def held_variant(path: str, part: str, revision: str | None = None, wanted: str | None = None) -> str | None:
    """Return the variant in which to read a part whatever the others are in: ``wanted``, else none, else what there is."""
    held = _variants(file_names(path, revision), part)
    return next((variant for variant in (wanted, None) if variant in held), min(filter(None, held), default=None))


def local_folder(path: str, revision: str | None, names: Iterable[str]) -> Path:
    """Return a folder that holds the pipeline's files ``names``: its own, or the cache's after a download of those."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    with _hub(path):
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(names)))


def cached_folder(path: str, revision: str | None = None) -> Path | None:
    """Return the folder that holds what there is of a pipeline on this machine, without a download; None where nothing is."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def are_here(path: str, revision: str | None, names: Iterable[str]) -> bool:
    """Return whether the pipeline's files ``names`` are on this machine."""
    folder = cached_folder(path, revision)
    return folder is not None and all((folder / name).is_file() for name in names)


def read_object(path: str, name: str, revision: str | None = None) -> dict:
    """Return the JSON object in the file ``name`` of a pipeline.

    Raises:
        UserError: it cannot be had or read, or holds something else.
    """
    check_path(path)
    file = Path(path) / name
    if not Path(path).is_dir():
        if path.startswith((".", "/")):
            raise UserError(f"model.path {path}: no model_index.json in it; expected a diffusers pipeline folder or a hub id")
        from huggingface_hub import hf_hub_download

        with _hub(path):
            file = Path(hf_hub_download(path, name, revision=revision))
    try:
        found = read_json(file)
    except FileNotFoundError:
        raise UserError(f"model.path {path}: no {name} in it; expected a diffusers pipeline folder or a hub id") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.path {path}: {name} is not readable: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"model.path {path}: {name} holds a {type(found).__name__}, expected an object")
    return found


@contextlib.contextmanager
def unloadable(path: str, part: str) -> Iterator[None]:
    """Whatever a library raises while it takes in somebody's files becomes one line.

    diffusers and transformers take values from a configuration unchecked: a wrong one may raise anything, anywhere in them.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"model.path {path}: {part} not loadable: {type(error).__name__}: {one_line(error)}") from error


@contextlib.contextmanager
def called(option: str) -> Iterator[None]:
    """Whatever is said here of ``model.path`` is said of the option of the command line that names the model."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if not text.startswith("model.path "):
            raise
        raise UserError(option + text.removeprefix("model.path")) from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _variants(names: frozenset[str], part: str) -> set[str | None]:
    """Return the variants that a part's weights are there in, None among them for files without one."""
    pattern = re.compile(
        rf"{part}/{WEIGHTS[part]}(?:(?:\.(?P<one>[\w-]+))?\.safetensors|\.safetensors\.index(?:\.(?P<many>[\w-]+))?\.json)"
    )
    matches = [match for name in names if (match := pattern.fullmatch(name))]
    # A file of several is not a whole part.
    found = {match["one"] or match["many"] for match in matches}
    return {variant for variant in found if not variant or not re.search(r"-\d+-of-\d+$", variant)}


def _indexed(path: str, part: str, index: str, names: frozenset[str], revision: str | None) -> list[str]:
    weight_map = read_object(path, f"{part}/{index}", revision).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"model.path {path}: {part}/{index} names no files: its weight_map must be an object of file names")
    files = sorted(set(weight_map.values()))
    for name in files:
        if f"{part}/{name}" not in names:
            raise UserError(f"model.path {path}: {part} holds no {name}, which {index} names")
        if not name.endswith(".safetensors"):
            raise UserError(f"model.path {path}: {part}/{index} names {name}, expected safetensors")
    return files


@lru_cache
def _hub_names(path: str, revision: str | None) -> frozenset[str]:
    from huggingface_hub import HfApi

    check_path(path)
    try:
        return frozenset(HfApi().list_repo_files(path, revision=revision))
    except Exception as error:  # of the network's library, another one in each version of the hub's; what the cache has will do
        folder = cached_folder(path, revision)
        if folder is None:
            raise UserError(
                f"model.path {path}: neither a diffusers folder nor to be had from the hub: {one_line(error)}"
            ) from None
        return frozenset(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


@contextlib.contextmanager
def _hub(path: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"model.path {path}: neither a diffusers folder nor to be had from the hub: {one_line(error)}") from None


@contextlib.contextmanager
def unreadable(path: str) -> Iterator[None]:
    """A file or folder of the pipeline that may not be read becomes one line; one that is not there is for the caller."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"model.path {path}: not readable: {one_line(error)}") from None
