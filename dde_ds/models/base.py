"""Find the files of a base pipeline, in a folder or under a hub id, and tell in one line what is wrong with them.

Weights are read from safetensors alone: a ``.bin`` file is a pickle, which can run code. Many repositories name their
files after the type of their weights, such as ``diffusion_pytorch_model.fp16.safetensors``. diffusers calls this part
of the name the variant. This module finds the variant by itself.
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
from dde_ds.shape import described
from dde_ds.untrusted import read_json

DIFFUSERS = "diffusion_pytorch_model"
WEIGHTS = {name: part.weights for name, part in (PARTS | OPTIONAL).items() if part.weights}
"""The parts with weights, and the name that their library gives the file, before the variant and ``.safetensors``."""
GUIDE = "launchers/recipes/README.md, Models that are taken"


def check_path(path: str) -> None:
    """Refuse a single file as ``model.path``.

    Raises:
        UserError: ``path`` is a file, where a pipeline's folder or a hub id is needed.
    """
    if Path(path).is_file():
        raise UserError(
            f"model.path {path}: is a single file, expected a diffusers folder or a hub id; convert it: "
            f"{conversion_of(path)}; see {GUIDE}"
        )


def pipeline_index(path: str, revision: str | None = None) -> dict:
    """Return the ``model_index.json`` of a diffusers folder or hub id.

    Raises:
        UserError: the file cannot be read, or names a pipeline that this project does not train.
    """
    index = read_object(path, "model_index.json", revision)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise UserError(f"model.path {path}: is a {kind}, expected one of {', '.join(PIPELINES)}; see {GUIDE}")
    return index


def family_of(path: str, revision: str | None = None) -> Family:
    """Return the family of a diffusers folder or hub id.

    Raises:
        UserError: as :func:`pipeline_index` raises; or the text encoder's configuration cannot be read.
    """
    kind = pipeline_index(path, revision)["_class_name"]
    return find_family(kind, read_object(path, "text_encoder/config.json", revision))


def file_names(path: str, revision: str | None = None) -> frozenset[str]:
    """Return the names, ``part/name``, of all files in the pipeline's parts.

    Raises:
        UserError: the folder cannot be read, or the hub and the cache do not have the pipeline.
    """
    if not Path(path).is_dir():
        return _hub_names(path, revision)
    names = set()
    for part in WEIGHTS:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), unreadable(path):
            names |= {f"{part}/{entry.name}" for entry in os.scandir(Path(path) / part) if entry.is_file()}
    return frozenset(names)


def find_variant(path: str, revision: str | None = None, wanted: str | None = None) -> str | None:
    """Return the variant in which to read the pipeline's weights; None stands for files without a variant.

    Args:
        wanted: the variant to read. None chooses files without a variant if every part has them, and otherwise the only
            variant.

    Raises:
        UserError: ``wanted`` does not exist, or there are several variants to choose from.
    """
    names = file_names(path, revision)
    variants_of = {part: _variants(names, part) for part in TRAINED_AND_DRAWN}
    variants_of = {part: variants for part, variants in variants_of.items() if variants}
    named = sorted({variant for variants in variants_of.values() for variant in variants if variant})
    if wanted:
        if wanted not in named:
            raise UserError(f"model.variant is {wanted!r}: model.path {path} holds {', '.join(named) or 'no variant'}")
        return wanted
    if all(None in variants for variants in variants_of.values()):
        return None
    whole = [variant for variant in named if all({variant, None} & variants for variants in variants_of.values())]
    if len(whole) > 1:
        raise UserError(f"model.path {path}: holds its weights as {' and '.join(whole)}: choose one by model.variant")
    return whole[0] if whole else None


def weight_files(path: str, part: str, revision: str | None = None, variant: str | None = None) -> tuple[str | None, list[str]]:
    """Return the variant in which a part is read, and its weight files in the part's folder.

    If the part has files of ``variant``, they are read. Otherwise its files without a variant are read.

    Raises:
        UserError: the part has no safetensors, or an index that names missing files. The message says how to convert
            the part.
    """
    names = file_names(path, revision)
    for chosen in (variant, None) if variant else (None,):
        dotted, name = f".{chosen}" if chosen else "", WEIGHTS[part]
        whole, index = f"{name}{dotted}.safetensors", f"{name}.safetensors.index{dotted}.json"
        # If both exist, each library has its own order of preference.
        for file in (index, whole) if name == DIFFUSERS else (whole, index):
            if f"{part}/{file}" in names:
                return chosen, [whole] if file == whole else _indexed(path, part, file, names, revision)
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
    """Return the variant in which to read one part, regardless of the other parts.

    The first that exists is chosen: ``wanted``, then files without a variant, then any variant.
    """
    variants = _variants(file_names(path, revision), part)
    return next((variant for variant in (wanted, None) if variant in variants), min(filter(None, variants), default=None))


def local_folder(path: str, revision: str | None, names: Iterable[str]) -> Path:
    """Return a local folder that holds the pipeline's files ``names``: the pipeline's own folder, or the cache after
    they were downloaded.

    Raises:
        UserError: the hub does not have them.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    with _hub(path):
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(names)))


def cached_folder(path: str, revision: str | None = None) -> Path | None:
    """Return the folder that holds what this machine has of a pipeline, without a download.

    Return None if it has nothing.
    """
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
        UserError: the file cannot be downloaded or read, or does not hold an object.
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
        value = read_json(file)
    except FileNotFoundError:
        raise UserError(f"model.path {path}: no {name} in it; expected a diffusers pipeline folder or a hub id") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.path {path}: {name} is not readable: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"model.path {path}: {name} holds {described(value)}, expected an object")
    return value


@contextlib.contextmanager
def unloadable(path: str, part: str) -> Iterator[None]:
    """Turn anything that a library raises while it loads somebody's files into a one-line error.

    diffusers and transformers use values of a configuration unchecked. A wrong value may raise any exception, anywhere
    in them.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        if isinstance(error, TypeError | AttributeError | LookupError):  # Python's words are no help to whoever wrote the file
            why = f"a value in its configuration is missing or of the wrong type ({why})"
        raise UserError(f"model.path {path}: {part} not loadable: {why}") from error


@contextlib.contextmanager
def called(option: str) -> Iterator[None]:
    """Replace ``model.path`` in a message by the option of the command line that names the model."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if not text.startswith("model.path "):
            raise
        raise UserError(option + text.removeprefix("model.path")) from None


def one_line(error: Exception) -> str:
    """Return what an error says in one line of at most 500 characters."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def _variants(names: frozenset[str], part: str) -> set[str | None]:
    """Return the variants in which a part's weights exist. None stands for files without a variant."""
    pattern = re.compile(
        rf"{part}/{WEIGHTS[part]}(?:(?:\.(?P<one>[\w-]+))?\.safetensors|\.safetensors\.index(?:\.(?P<many>[\w-]+))?\.json)"
    )
    matches = [match for name in names if (match := pattern.fullmatch(name))]
    # The name of one file of several looks like a variant, but is not a whole part.
    variants = {match["one"] or match["many"] for match in matches}
    return {variant for variant in variants if not variant or not re.search(r"-\d+-of-\d+$", variant)}


def _indexed(path: str, part: str, index: str, names: frozenset[str], revision: str | None) -> list[str]:
    """Return the weight files that an index names.

    Raises:
        UserError: the index names no files, missing files, or files other than safetensors.
    """
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
    """Return the names of all files of a hub id. If the hub cannot be reached, return those in the cache."""
    from huggingface_hub import HfApi

    check_path(path)
    try:
        return frozenset(HfApi().list_repo_files(path, revision=revision))
    except Exception as error:  # the network library's exceptions differ between versions of the hub's library
        folder = cached_folder(path, revision)  # without the hub, what the cache has will do
        if folder is None:
            raise UserError(
                f"model.path {path}: neither a diffusers folder nor to be had from the hub: {one_line(error)}"
            ) from None
        return frozenset(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


@contextlib.contextmanager
def _hub(path: str) -> Iterator[None]:
    """Turn errors of the hub into a one-line error."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"model.path {path}: neither a diffusers folder nor to be had from the hub: {one_line(error)}") from None


@contextlib.contextmanager
def unreadable(path: str) -> Iterator[None]:
    """Turn a file or folder of the pipeline that this process may not read into a one-line error.

    A missing file is left to the caller.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"model.path {path}: not readable: {one_line(error)}") from None
