"""``manifest.json``: the description of a set of shards, and the checks that a reader relies on.

A manifest may come from anywhere, so nothing in it is trusted before it is checked, least of all a file name.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib

import torch

from dde_ds.data.storage import WHOLE_BYTES
from dde_ds.errors import UserError
from dde_ds.models.family import LAYOUTS
from dde_ds.shape import COUNT, require_shape
from dde_ds.untrusted import parse_json

FORMAT = "dde_ds shards 3"
CHECKSUMS = {
    FORMAT: lambda data: hashlib.sha256(data).digest(),
    "dde_ds shards 2": lambda data: zlib.crc32(data).to_bytes(4, "big"),
}
"""The formats that are read.

Each function computes what an index holds of a sample's run of bytes. CRC32 finds damage, but it can be forged.
"""
PROMPTS_PER_FILE = 1024
SOFT_LABEL = "soft_label"
"""Name of the optional tensor of a pair, () float32: the share in [0.5, 1] of the votes that its winner has."""
NAMES = re.compile(r"(prompts-)?[0-9]{5,9}")

# Limits on the numbers in a manifest, far above those of real sets. Memory is allocated by these numbers before any
# byte has been read that confirms them.
MOST_FILES = 50_000
"""Limit on the files of one set."""
MOST_SAMPLES = 2**19
"""Limit on the samples of one file."""
INDEX_BYTES = 128 * 2**20
"""Limit on the bytes of one index."""
DESCRIPTION_BYTES = 4 * 2**20
"""Limit on the bytes of a sample's .json, which holds caption, source and uids."""
TENSOR_BYTES = 256 * 2**20
"""Limit on the bytes of a sample's tensors."""
MEMBER_BYTES = 2**16
"""Limit on the other bytes of a sample in a tar.

They are the headers of its two members, the padding of their last blocks, and the header of safetensors.
"""
LARGEST_SAMPLE = TENSOR_BYTES + DESCRIPTION_BYTES + MEMBER_BYTES


_FILE = {"name": str, "samples": COUNT, "bytes": COUNT, "sha256": str, "index": {"bytes": COUNT, "sha256": str}}
SHAPE = {
    "settings": {"family": str, "latents": str, "flip": bool},
    "latents": {"shape": [COUNT], "dtype": str, "scaled": bool},
    "prompts": {"tensors": ([COUNT],), "distinct": COUNT, "files": [_FILE]},
    "samples": COUNT,
    "shards": [_FILE],
}


def pair_tensors(manifest: dict) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and type of every tensor that each pair of this set has."""
    latents = (2, *manifest["latents"]["shape"])
    expected = {"latents": (latents, torch.float16), "prompt": ((), torch.int64)}
    expected |= {name: (shape, torch.float32) for name, shape in LAYOUTS[manifest["settings"]["family"]].pair.items()}
    if manifest["settings"]["flip"]:
        expected["latents_flipped"] = (latents, torch.float16)
    if manifest["settings"]["latents"] == "mean+logvar":
        expected["logvar"] = (latents, torch.float16)
    if manifest["settings"].get(SOFT_LABEL):
        expected[SOFT_LABEL] = ((), torch.float32)
    return expected


def prompt_tensors(manifest: dict) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and type of every tensor that each prompt of this set has."""
    return {name: (tuple(shape), torch.float16) for name, shape in manifest["prompts"]["tensors"].items()}


def largest_sample(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Return how many bytes a sample of these tensors may take in its tar."""
    return tensor_bytes(tensors) + DESCRIPTION_BYTES + MEMBER_BYTES


def tensor_bytes(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Return how many bytes tensors of these shapes and types take."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())


def manifest_digest(manifest: dict) -> str:
    """Return the SHA-256 of a manifest or an index, without its own ``digest``."""
    plain = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def is_whole_manifest(data: bytes) -> bool:
    """Return False if the bytes are damaged or cut short: they are not JSON, or the digest in their manifest is wrong.

    JSON that is not a manifest of a known format counts as whole, since another attempt at the transfer would not
    change it.
    """
    try:
        manifest = parse_json(data, WHOLE_BYTES)
        if not isinstance(manifest, dict) or manifest.get("format") not in CHECKSUMS:
            return True
        return manifest["digest"] == manifest_digest(manifest)
    except (ValueError, KeyError, TypeError):
        return False


def read_manifest(data: bytes, where: str) -> dict:
    """Return a manifest after checking every part of it that reading relies on.

    Args:
        data: the bytes of the file.
        where: name of the file for messages.

    Raises:
        UserError: the bytes are not a manifest, or one of another format, damaged, or with impossible contents.
    """
    try:
        manifest = parse_json(data, WHOLE_BYTES)
    except ValueError as error:
        raise UserError(f"{where}: not readable: {error}") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{where}: not a manifest of shards")
    if not isinstance(manifest.get("format"), str) or manifest["format"] not in CHECKSUMS:
        known = " and ".join(map(repr, sorted(CHECKSUMS)))
        raise UserError(
            f"{where}: format is {manifest.get('format')!r}, this version reads {known}: shard the pairs again into another folder"
        )
    if manifest.get("digest") != manifest_digest(manifest):
        raise UserError(f"{where}: was changed or damaged after it was written: delete it and run tools/shard_pickapic.py again")
    try:
        require_shape(manifest, SHAPE)
        problem = _problem_of(manifest)
    except ValueError as error:  # another shape
        problem = str(error)
    if problem:
        raise UserError(f"{where}: {problem}")
    return manifest


def _problem_of(manifest: dict) -> str | None:
    """Return what is wrong with a manifest, or None."""
    settings, latents, prompts = manifest["settings"], manifest["latents"], manifest["prompts"]
    if settings["family"] not in LAYOUTS:
        return f"settings.family is {settings['family']!r}, expected {' or '.join(map(repr, LAYOUTS))}"
    if settings["latents"] not in ("mean", "sample", "mean+logvar"):
        return f"settings.latents is {settings['latents']!r}, expected 'mean', 'sample' or 'mean+logvar'"
    if (
        not _is_shape(latents["shape"])
        or len(latents["shape"]) != 3
        or latents["dtype"] != "float16"
        or latents["scaled"] is not True
    ):
        return f"latents are {latents!r}, expected a shape [C,H,W], float16, scaled"
    names = LAYOUTS[settings["family"]].prompt
    if {name: len(shape) for name, shape in prompts["tensors"].items()} != names or not all(
        map(_is_shape, prompts["tensors"].values())
    ):
        return f"prompts.tensors are {prompts['tensors']!r}"
    for what, tensors in (("pair", pair_tensors(manifest)), ("prompt", prompt_tensors(manifest))):
        if tensor_bytes(tensors) > TENSOR_BYTES:
            return f"a {what}'s tensors take {tensor_bytes(tensors)} bytes: at most {TENSOR_BYTES} are read"
    for file in [*manifest["shards"], *prompts["files"]]:
        if not NAMES.fullmatch(file["name"]):
            return f"a shard is called {file['name']!r}: expected digits only"
        if file["samples"] > MOST_SAMPLES or file["index"]["bytes"] > INDEX_BYTES:
            return (
                f"shard {file['name']} has {file['samples']} samples and an index of {file['index']['bytes']} bytes: "
                f"at most {MOST_SAMPLES} and {INDEX_BYTES} are read"
            )
        if not all(len(digest) == 64 for digest in (file["sha256"], file["index"]["sha256"])):
            return f"shard {file['name']} has no sha256"
    if not 0 < manifest["samples"] == sum(file["samples"] for file in manifest["shards"]):
        return f"samples is {manifest['samples']!r}, not the sum of its shards"
    files = [file["name"] for file in [*manifest["shards"], *prompts["files"]]]
    if len(set(files)) < len(files):
        return "two shards have the same name"
    distinct, last = prompts["distinct"], len(prompts["files"]) - 1
    per_file = [PROMPTS_PER_FILE] * last + [distinct - PROMPTS_PER_FILE * last]
    if [file["samples"] for file in prompts["files"]] != per_file or not 0 < per_file[-1] <= PROMPTS_PER_FILE:
        return f"prompts.distinct is {distinct!r}, not {PROMPTS_PER_FILE} in each prompts file but the last"
    return None


def _is_shape(shape) -> bool:
    return isinstance(shape, list) and all(type(side) is int and 0 < side < 1 << 20 for side in shape)
