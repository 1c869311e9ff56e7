"""Write shards. A file appears under its name only when it is whole, and the same samples give the same bytes.

:mod:`dde_ds.data.shards` describes the format.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from webdataset.writer import TarWriter

from dde_ds.data.manifest import CHECKSUMS, DESCRIPTION_BYTES, FORMAT, INDEX_BYTES, LARGEST_SAMPLE, manifest_digest
from dde_ds.data.shards import unpack
from dde_ds.errors import UserError
from dde_ds.files import put_in_place, staged_path, write_atomically
from dde_ds.untrusted import open_regular, parse_json, read_regular

# Every member has the same timestamp, so that the same pairs give the same bytes.
MTIME = 0  # an integer: a float would add an extended header of 1 kB to every member


@dataclass(frozen=True)
class Sample:
    """A pair or a prompt, encoded."""

    number: int
    """Number of the pair among the decided pairs, or of the prompt.

    The names of its members are this number with nine digits.
    """
    tensors: dict[str, Tensor]
    description: dict
    """Caption, source row and uids, for the sample's .json."""


def write_shard(folder: Path, name: str, samples: Iterable[Sample], settings_digest: str, errors: list[dict]) -> dict:
    """Write one tar and then its index, and return the shard's row of the manifest. Memory stays that of one sample.

    An empty shard is legal: it stands for a range of rows of which none could be kept.

    Args:
        folder: the folder of the set.
        name: name of the shard, without ``.tar``.
        samples: its samples, in ascending order of their numbers.
        settings_digest: digest of the settings of the set.
        errors: rows that were left out. The code that makes ``samples`` may still add to it: it is read after the last
            sample.

    Raises:
        UserError: a description is longer than readers allow.
    """
    path = folder / f"{name}.tar"
    staged = staged_path(path)
    numbers, ends = [], []
    with staged.open("wb") as file:
        # TarWriter gets an open file. A path would go through webdataset's URL handlers.
        with TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=MTIME) as tar:
            for sample in samples:
                payload = safetensors.torch.save(sample.tensors)
                description = json.dumps(sample.description, ensure_ascii=False, sort_keys=True).encode()
                if len(description) > DESCRIPTION_BYTES:
                    raise UserError(
                        f"sample {sample.number}: caption and source take {len(description)} bytes, at most {DESCRIPTION_BYTES}"
                    )
                tar.write({"__key__": f"{sample.number:09d}", "json": description, "safetensors": payload})
                numbers.append(sample.number)
                ends.append(tar.tarstream.offset)
        file.flush()
        os.fsync(file.fileno())
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    with staged.open("rb") as file:
        document = _document(file, name, numbers, sizes, settings_digest, errors)
    put_in_place(staged, path)
    index = _index_bytes(document)
    write_atomically(folder / f"{name}.json", index)
    return _row(document, index)


def finished_shard(folder: Path, name: str, settings_digest: str, verify: bool = True) -> tuple[dict, list[dict]] | None:
    """Return the manifest's row and the errors of a shard that is whole and was made with these settings, or None.

    A shard is whole if the index that would be written of its tar now is, byte by byte, the index that exists. The
    index's own digest vouches for ``errors``, which the tar does not hold.

    Args:
        folder: the folder of the set.
        name: name of the shard, without ``.tar``.
        settings_digest: digest of the settings of the set.
        verify: read the tar. With False, only its size is compared, for shards that another rank has just made and
            verified.
    """
    tar, path = folder / f"{name}.tar", folder / f"{name}.json"
    try:
        index = read_regular(path, INDEX_BYTES)
        document = parse_json(index, INDEX_BYTES)
        if (
            document["digest"] != manifest_digest(document)
            or document["settings"] != settings_digest
            or index != _index_bytes(document)
        ):
            return None
        with open_regular(tar) as file:
            if os.fstat(file.fileno()).st_size != document["bytes"] or document["name"] != name:
                return None
            if verify:
                numbers, _, sizes = zip(*document["members"], strict=True) if document["members"] else ((), (), ())
                if any(not 0 < size <= LARGEST_SAMPLE for size in sizes):
                    return None
                again = _document(file, name, numbers, sizes, settings_digest, document["errors"])
                if index != _index_bytes(again):
                    return None
        return _row(document, index), document["errors"]
    # The file is missing, not a regular file, not JSON, or JSON of another form.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def remove_partials(folder: Path, names: Container[str]) -> None:
    """Remove the partial files that killed processes left of these shards.

    Pass all names at once: each call lists the whole folder.
    """
    for path in folder.iterdir():
        if path.suffix == ".partial" and path.name[1:].partition(".")[0] in names:
            path.unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write ``manifest`` with the format's name in front and its own digest at the end."""
    whole = {"format": FORMAT, **{key: value for key, value in manifest.items() if key not in ("format", "digest")}}
    write_atomically(folder / "manifest.json", json_bytes({**whole, "digest": manifest_digest(whole)}))


def json_bytes(value: Any) -> bytes:
    """Return ``value`` as indented JSON in UTF-8."""
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def _row(document: dict, index: bytes) -> dict:
    """Return a shard's row of the manifest from its index."""
    row = {key: document[key] for key in ("name", "samples", "bytes", "sha256")}
    return {**row, "index": {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}}


def _document(
    file: io.BufferedReader, name: str, numbers: Sequence[int], sizes: Sequence[int], settings_digest: str, errors: list[dict]
) -> dict:
    """Return the index of an opened tar, which is read once.

    Args:
        file: the tar.
        name: name of the shard.
        numbers: the numbers of its samples.
        sizes: the sizes in bytes of the samples' consecutive runs.
        settings_digest: digest of the settings of the set.
        errors: rows that were left out.

    Raises:
        ValueError: a run does not hold the members of its sample.
    """
    whole, digests, members, offset = hashlib.sha256(), [], [], 0
    for number, size in zip(numbers, sizes, strict=True):
        data = file.read(size)
        unpack(data, number, f"sample {number}")
        whole.update(data)
        digests.append(CHECKSUMS[FORMAT](data).hex())
        members.append([number, offset, size])
        offset += size
    while data := file.read(2**20):
        whole.update(data)
        offset += len(data)
    row = {"name": name, "samples": len(members), "bytes": offset, "sha256": whole.hexdigest()}
    document = {**row, "settings": settings_digest, "errors": errors, "members": members, "digests": "".join(digests)}
    return {**document, "digest": manifest_digest(document)}


def _index_bytes(document: dict) -> bytes:
    return (json.dumps(document) + "\n").encode()
