"""The shard format: WebDataset tars of encoded pairs, an index beside each, prompts stored once, a manifest last.

    shards/
      00000.tar                 per sample KEY.safetensors and KEY.json; readable by stock webdataset
      00000.json                commit mark and index: samples, bytes, sha256, and offset, size and crc32 of every member
      prompts-00000.safetensors text embeddings, each distinct prompt once; row 0 of the first is the empty prompt
      manifest.json             what the shards hold and how they were made; its presence says that the set is whole

A sample's tensors: ``latents`` (2,C,H,W) float16, winner then loser, already scaled as the UNet takes them; ``prompt`` ()
int64, a row of the prompts; for SDXL ``time_ids`` (2,6) float32. Captions and uids are in the ``.json``, for people.

Every file appears under its name only when it is whole: written aside, fsynced, renamed. Reading runs no code: members are
read by offset, as safetensors, never unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import webdataset
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dde_ds.errors import UserError

FORMAT = "dde_ds shards 1"
PROMPTS_PER_FILE = 4096
# One timestamp for every member, so that the same pairs give the same bytes.
MTIME = 0.0
# Files and indexes that a process keeps open: room for the tars and indexes of two blocks of 16 shards.
OPEN_FILES = 64


@dataclass(frozen=True)
class Sample:
    key: str
    tensors: dict[str, Tensor]
    description: dict


def write_atomically(path: Path, data: bytes) -> None:
    """``path`` holds either all of ``data`` or what it held before, whenever the machine stops."""
    staged = path.with_name(f".{path.name}.partial")
    with staged.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def write_shard(folder: Path, number: int, samples: Iterable[Sample], settings_digest: str, errors: list[dict]) -> dict:
    """Write one tar and then its index; give back its row of the manifest. Memory stays that of one sample.

    ``errors`` lists the rows left out. It may be filled by whatever makes ``samples``: it is read after the last of them.
    An empty shard is legal: it stands for a row range in which nothing could be kept.
    """
    name = f"{number:05d}"
    staged = folder / f".{name}.tar.partial"
    members = []
    with staged.open("wb") as file:
        # TarWriter gets an open file: given a path it would go through webdataset's URL handlers.
        with webdataset.TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=MTIME) as tar:
            for sample in samples:
                payload = safetensors.torch.save(sample.tensors)
                description = json.dumps(sample.description, ensure_ascii=False, sort_keys=True).encode()
                tar.write({"__key__": sample.key, "json": description, "safetensors": payload})
                # The data ends where the tar stands, padded to blocks of 512 bytes.
                offset = tar.tarstream.offset - -(-len(payload) // 512) * 512
                members.append({"key": sample.key, "offset": offset, "bytes": len(payload), "crc32": zlib.crc32(payload)})
        file.flush()
        os.fsync(file.fileno())
    row = {"name": name, "samples": len(members), "bytes": staged.stat().st_size, "sha256": sha256_of(staged)}
    staged.replace(folder / f"{name}.tar")
    write_atomically(folder / f"{name}.json", _json({**row, "settings": settings_digest, "errors": errors, "members": members}))
    return row


def finished_shard(folder: Path, number: int, settings_digest: str) -> tuple[dict, list[dict]] | None:
    """The manifest's row and the errors of a shard that is whole and was made with these settings, otherwise None."""
    tar, index = folder / f"{number:05d}.tar", folder / f"{number:05d}.json"
    try:
        found = json.loads(index.read_bytes())
        row = {key: found[key] for key in ("name", "samples", "bytes", "sha256")}
        if found["settings"] == settings_digest and sha256_of(tar) == row["sha256"]:
            return row, found["errors"]
    except (OSError, ValueError, KeyError):
        pass
    return None


def write_prompts(folder: Path, number: int, tensors: Mapping[str, Tensor]) -> dict:
    """Write one file of prompt embeddings, each tensor (rows, …); give back its row of the manifest."""
    name = f"prompts-{number:05d}.safetensors"
    data = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()})
    write_atomically(folder / name, data)
    rows = len(next(iter(tensors.values())))
    return {"name": name, "prompts": rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_manifest(folder: Path, manifest: dict) -> None:
    write_atomically(folder / "manifest.json", _json({"format": FORMAT, **manifest}))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: io.BufferedReader) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


class ShardSet:
    """A folder of shards, opened for reading. Cheap to make and to pickle: files are opened on use, once a process.

    Raises:
        UserError: no manifest, another format, a missing file, or one whose size is not what the manifest says.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not self.folder.is_dir():
            raise UserError(f"data.path {self.folder}: no such folder; make shards with tools/shard_pickapic.py")
        if not path.is_file():
            raise UserError(
                f"data.path {self.folder}: no manifest.json; the sharding has not finished, run tools/shard_pickapic.py again"
            )
        try:
            raw = path.read_bytes()
            self.manifest = json.loads(raw)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable: {error}") from None
        if self.manifest.get("format") != FORMAT:
            raise UserError(f"{path}: format is {self.manifest.get('format')!r}, this version reads {FORMAT!r}")
        self.digest = hashlib.sha256(raw).hexdigest()
        """Of the manifest, and so of every byte of the set."""
        for row, name in self._files():
            file = self.folder / name
            size = file.stat().st_size if file.is_file() else None
            if size != row["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(
                    f"shard {file} {found}, manifest.json says {row['bytes']} bytes: delete it and run tools/shard_pickapic.py again"
                )
        self._owner = os.getpid()
        self._open: OrderedDict[str, Any] = OrderedDict()

    def _files(self):
        for row in self.manifest["shards"]:
            yield row, f"{row['name']}.tar"
        for row in self.manifest["prompts"]["files"]:
            yield row, row["name"]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [row["samples"] for row in self.manifest["shards"]]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C,H,W) of one latent."""
        return tuple(self.manifest["latents"]["shape"])

    def read(self, shard: int, row: int) -> dict[str, Tensor]:
        """Tensors of one sample.

        Raises:
            UserError: bytes that are not those that were written, naming the shard and the sample.
        """
        name = self.manifest["shards"][shard]["name"]
        member = self._members(name)[row]
        payload = os.pread(self._handle(name).fileno(), member["bytes"], member["offset"])
        where = f"shard {self.folder / name}.tar, sample {member['key']}"
        if len(payload) != member["bytes"] or zlib.crc32(payload) != member["crc32"]:
            raise UserError(
                f"{where}: checksum differs from the index, the file was damaged: delete it and run tools/shard_pickapic.py again"
            )
        try:
            tensors = safetensors.torch.load(payload)
        except SafetensorError as error:
            raise UserError(f"{where}: not safetensors: {error}") from None
        latents = tensors.get("latents")
        if latents is None or tuple(latents.shape) != (2, *self.latent_shape):
            found = None if latents is None else tuple(latents.shape)
            raise UserError(f"{where}: latents have shape {found}, manifest.json says {(2, *self.latent_shape)}")
        if not bool(latents.isfinite().all()):
            raise UserError(f"{where}: latents hold NaN or infinity; the VAE overflowed: encode again with --vae-dtype float32")
        return tensors

    def prompt(self, row: int) -> dict[str, Tensor]:
        """Embeddings of one distinct prompt: ``prompt_embeds`` (S,D) and, for SDXL, ``pooled`` (P,)."""
        files = self.manifest["prompts"]["files"]
        number, line = divmod(row, PROMPTS_PER_FILE)
        if not 0 <= number < len(files) or line >= files[number]["prompts"]:
            raise UserError(f"{self.folder}: a sample names prompt {row}, which no prompts file holds")
        file = self._cached(files[number]["name"], lambda: self._open_prompts(files[number]))
        tensors = {key: file.get_slice(key)[line] for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise UserError(
                f"{self.folder / files[number]['name']}: embedding {line} holds NaN or infinity; encode again in float32"
            )
        return tensors

    # File handles belong to the process that opened them: loader workers are forked with the parent's.
    def _cached(self, name: str, open_it):
        if self._owner != os.getpid():
            self._owner, self._open = os.getpid(), OrderedDict()
        if name not in self._open:
            self._open[name] = open_it()
        self._open.move_to_end(name)
        while len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return self._open[name]

    def _handle(self, name: str):
        return self._cached(f"{name}.tar", lambda: (self.folder / f"{name}.tar").open("rb"))

    def _members(self, name: str) -> list[dict]:
        return self._cached(f"{name}.json", lambda: self._read_index(name))

    def _open_prompts(self, row: dict):
        path = self.folder / row["name"]
        if sha256_of(path) != row["sha256"]:
            raise UserError(
                f"{path}: checksum differs from manifest.json, the file was damaged: delete it and run tools/shard_pickapic.py again"
            )
        return safe_open(path, framework="pt")

    def _read_index(self, name: str) -> list[dict]:
        path = self.folder / f"{name}.json"
        try:
            index = json.loads(path.read_bytes())
            members, samples = index["members"], index["samples"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"shard index {path}: not readable: {error}") from None
        if len(members) != samples or index["sha256"] != next(r["sha256"] for r in self.manifest["shards"] if r["name"] == name):
            raise UserError(
                f"shard index {path}: does not belong to manifest.json: delete it and run tools/shard_pickapic.py again"
            )
        return members
