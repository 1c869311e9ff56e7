"""Writing shards: each file appears under its name only when it is whole, and the same samples give the same bytes.

The format is described in :mod:`dde_ds.data.shards`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import webdataset
from torch import Tensor

from dde_ds.data.manifest import FORMAT, manifest_digest
from dde_ds.files import put_in_place, sha256_of, staged_path, write_atomically

# One timestamp for every member, so that the same pairs give the same bytes.
MTIME = 0  # whole: a float would add an extended header of 1 kB to every member


@dataclass(frozen=True)
class Sample:
    number: int
    """Of the pair among the decided ones, or of the prompt; the members are called by its nine digits."""
    tensors: dict[str, Tensor]
    description: dict


def write_shard(folder: Path, name: str, samples: Iterable[Sample], settings_digest: str, errors: list[dict]) -> dict:
    """Write one tar and then its index; give back its row of the manifest. Memory stays that of one sample.

    ``errors`` lists the rows left out. It may be filled by whatever makes ``samples``: it is read after the last of them.
    An empty shard is legal: it stands for a row range in which nothing could be kept.
    """
    path = folder / f"{name}.tar"
    for left in folder.glob(f".{name}.tar.*.partial"):  # by a process that was killed in this shard
        left.unlink(missing_ok=True)
    staged = staged_path(path)
    numbers, ends = [], []
    with staged.open("wb") as file:
        # TarWriter gets an open file: given a path it would go through webdataset's URL handlers.
        with webdataset.TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=MTIME) as tar:
            for sample in samples:
                payload = safetensors.torch.save(sample.tensors)
                description = json.dumps(sample.description, ensure_ascii=False, sort_keys=True).encode()
                tar.write({"__key__": f"{sample.number:09d}", "json": description, "safetensors": payload})
                numbers.append(sample.number)
                ends.append(tar.tarstream.offset)
        file.flush()
        os.fsync(file.fileno())
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    with staged.open("rb") as file:
        sums, sha256 = _checksums(file, sizes)
    members = [list(row) for row in zip(numbers, [0, *ends][:-1], sizes, sums, strict=True)] if numbers else []
    row = {"name": name, "samples": len(members), "bytes": staged.stat().st_size, "sha256": sha256}
    put_in_place(staged, path)
    index = (json.dumps({**row, "settings": settings_digest, "errors": errors, "members": members}) + "\n").encode()
    write_atomically(folder / f"{name}.json", index)
    return _row(row, index)


def finished_shard(folder: Path, name: str, settings_digest: str, verify: bool = True) -> tuple[dict, list[dict]] | None:
    """The manifest's row and the errors of a shard that is whole and was made with these settings, otherwise None.

    ``verify=False`` takes the tar's size for its checksum: for shards that another rank has just made and verified.
    """
    tar, path = folder / f"{name}.tar", folder / f"{name}.json"
    try:
        index = path.read_bytes()
        found = json.loads(index)
        row = {key: found[key] for key in ("name", "samples", "bytes", "sha256")}
        whole = tar.stat().st_size == row["bytes"] and (not verify or sha256_of(tar) == row["sha256"])
        if whole and found["settings"] == settings_digest and row["name"] == name:
            return _row(row, index), found["errors"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write ``manifest`` with the format's name in front and its own digest at the end."""
    whole = {"format": FORMAT, **{key: value for key, value in manifest.items() if key not in ("format", "digest")}}
    write_atomically(folder / "manifest.json", json_bytes({**whole, "digest": manifest_digest(whole)}))


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def _row(row: dict, index: bytes) -> dict:
    return {**row, "index": {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}}


def _checksums(file: io.BufferedReader, sizes: list[int]) -> tuple[list[int], str]:
    """crc32 of each of the consecutive ranges, and SHA-256 of the whole, in one pass."""
    digest, sums = hashlib.sha256(), []
    for size in sizes:
        data = file.read(size)
        digest.update(data)
        sums.append(zlib.crc32(data))
    while data := file.read(1 << 20):
        digest.update(data)
    return sums, digest.hexdigest()
