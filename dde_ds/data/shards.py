"""The shard format, and reading it: tars of encoded pairs, an index beside each, prompts stored once, a manifest last.

    shards/
      00000.tar          per pair KEY.json and KEY.safetensors; a WebDataset that any reader of those can read
      00000.json         commit mark and index: bytes, sha256, and [number, offset, bytes, crc32] of every pair's run in the tar
      prompts-00000.tar  the same for text embeddings, each distinct prompt once; prompt 0 is the empty one
      prompts-00000.json
      errors.jsonl       rows that were left out, and why
      settings.json      what the folder was begun with
      manifest.json      what the shards hold, the sha256 of each tar and index, and its own; its presence says that the set is whole

A pair's tensors: ``latents`` (2,C,H,W) float16, winner then loser, already scaled as the UNet takes them; ``prompt`` ()
int64; for SDXL ``time_ids`` (2,6) float32; where they were asked for, ``latents_flipped`` of the mirrored images and ``logvar``
of the VAE's posterior, scaled too, both of the latents' shape. A prompt's: ``prompt_embeds`` (S,D) and for SDXL ``pooled`` (P,), float16.

The manifest vouches for the indexes, an index for every byte of its tar's pairs: what comes back is what was written, or an
error. Reading runs no code: runs of bytes are taken by offset, must hold exactly those two members, and are never unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dde_ds.data.cache import Cache
from dde_ds.data.manifest import PROMPTS_PER_FILE, is_whole_manifest, pair_tensors, prompt_tensors, read_manifest
from dde_ds.data.storage import DamagedData, open_storage
from dde_ds.errors import UserError

# Indexes that a process keeps, as arrays: 32 bytes a sample.
OPEN_INDEXES = 2048
REMAKE = "delete it and its .json and run tools/shard_pickapic.py again: only that shard is made"


class ShardSet:
    """A folder of shards, opened for reading. Cheap to make and to pickle: files are opened on use, once a process.

    Args:
        folder: a local folder, or a URL (see :mod:`dde_ds.data.storage`).
        cache: where ranges of remote shards are kept.
        timeout: seconds that one attempt at a remote range may take.
        check_sizes: compare the sizes of local files with the manifest now. Turn it off where damage is to be met sample by sample.

    Raises:
        UserError: no manifest, another format, a missing file, or one whose size is not what the manifest says.
    """

    def __init__(self, folder: str | Path, cache: Cache | None = None, timeout: float = 60.0, check_sizes: bool = True):
        self.storage = open_storage(folder, cache, timeout)
        self.folder = folder if self.storage.is_remote else self.storage.folder
        if not self.storage.is_remote:
            if not self.folder.is_dir():
                raise UserError(f"data.path {self.folder}: no such folder; make shards with tools/shard_pickapic.py")
            if self.storage.size("manifest.json") is None:
                raise UserError(
                    f"data.path {self.folder}: no manifest.json; the sharding has not finished, run tools/shard_pickapic.py again"
                )
        try:
            # A transfer that was cut short is tried again; a local file is what it is.
            is_whole = is_whole_manifest if self.storage.is_remote else lambda data: True
            raw = self.storage.fetch("manifest.json", 0, None, is_whole)
        except DamagedData as error:
            raise UserError(f"data.path {folder}: manifest.json: {error}; is this a folder of shards?") from None
        self.manifest = read_manifest(raw, self.storage.where("manifest.json"))
        self.digest = hashlib.sha256(raw).hexdigest()
        """Of the manifest, and so of every byte of the set."""
        self.latent_shape: tuple[int, int, int] = tuple(self.manifest["latents"]["shape"])
        """(C,H,W) of one latent."""
        self.counts: list[int] = [row["samples"] for row in self.manifest["shards"]]
        """Samples of each shard."""
        if check_sizes and not self.storage.is_remote:
            self._check_sizes()
        self._indexes: OrderedDict[str, np.ndarray] = OrderedDict()
        self._empty_prompt: dict[str, Tensor] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_indexes": OrderedDict(), "_empty_prompt": None}

    @property
    def counters(self) -> dict[str, int]:
        """What this process has read: ``bytes``, ``cache_hits``, ``cache_misses``."""
        return self.storage.counters

    def read(self, shard: int, row: int) -> dict[str, Tensor]:
        """Tensors of one pair.

        Raises:
            DamagedData: bytes that are not those that were written, or not what the manifest promises; names shard and sample.
            UserError: they cannot be read.
        """
        file = self.manifest["shards"][shard]
        number, _, tensors = self._sample(file, row)
        _check_tensors(tensors, pair_tensors(self.manifest), self._where(file, number))
        if not 0 <= int(tensors["prompt"]) < self.manifest["prompts"]["distinct"]:
            raise DamagedData(f"{self._where(file, number)}: names prompt {int(tensors['prompt'])}, which no prompts file holds")
        return tensors

    def announce(self, shard: int, row: int) -> None:
        """Say that a pair will be read soon, so that a disk has several requests to work on. Whatever is wrong, reading says."""
        if self.storage.is_remote:  # there the loader's processes fetch side by side
            return
        file = self.manifest["shards"][shard]
        with contextlib.suppress(UserError):
            _, offset, size, _ = self.index(file)[row].tolist()
            self.storage.announce(f"{file['name']}.tar", offset, size)

    def describe(self, shard: int, row: int) -> dict:
        """What the sample says of itself in words: caption, source row, uids. Raises as :meth:`read`."""
        file = self.manifest["shards"][shard]
        number, description, _ = self._sample(file, row)
        try:
            found = json.loads(description)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise DamagedData(f"{self._where(file, number)}: its .json is no JSON object")
        return found

    def prompt(self, row: int) -> dict[str, Tensor]:
        """Embeddings of prompt ``row`` < distinct: ``prompt_embeds`` (S,D) and, for SDXL, ``pooled`` (P,). Raises as :meth:`read`."""
        if row == 0 and self._empty_prompt is not None:  # asked for at every dropped caption
            return self._empty_prompt
        number, line = divmod(row, PROMPTS_PER_FILE)
        file = self.manifest["prompts"]["files"][number]
        found, _, tensors = self._sample(file, line)
        _check_tensors(tensors, prompt_tensors(self.manifest), self._where(file, found))
        if row == 0:
            self._empty_prompt = tensors
        return tensors

    def following(self, shard: int, row: int) -> tuple[int, int]:
        """The place after this one, through all shards and round again: where a replacement for a bad sample is taken from."""
        row += 1
        while row >= self.counts[shard]:
            shard, row = (shard + 1) % len(self.counts), 0
        return shard, row

    def place(self, shard: int, row: int) -> str:
        """A sample's name for a message, without reading anything."""
        return f"{self.storage.where(self.manifest['shards'][shard]['name'] + '.tar')}, row {row}"

    def _sample(self, file: dict, row: int) -> tuple[int, bytes, dict[str, Tensor]]:
        """Number, description and tensors of the ``row``-th sample of a file."""
        number, offset, size, crc32 = self.index(file)[row].tolist()
        where = self._where(file, number)
        try:
            data = self.storage.fetch(
                f"{file['name']}.tar", offset, size, lambda data: zlib.crc32(data) == crc32, f"{file['sha256']} {offset} {size}"
            )
        except DamagedData as error:
            raise DamagedData(f"{where}: {error}: {REMAKE}") from None
        description, payload = unpack(data, number, where)
        try:
            return number, description, safetensors.torch.load(payload)
        # A file may well say what torch does not know, or a shape that its bytes do not fill.
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise DamagedData(f"{where}: not safetensors: {error}") from None

    def index(self, file: dict) -> np.ndarray:
        """Rows [number, offset, bytes, crc32] of a file's samples."""
        name = file["name"]
        if name not in self._indexes:
            self._indexes[name] = self._read_index(file)
            if len(self._indexes) > OPEN_INDEXES:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(name)
        return self._indexes[name]

    def _read_index(self, file: dict) -> np.ndarray:
        name, size, sha256 = f"{file['name']}.json", file["index"]["bytes"], file["index"]["sha256"]
        where = f"shard index {self.storage.where(name)}"
        try:
            data = self.storage.fetch(name, 0, size, lambda data: hashlib.sha256(data).hexdigest() == sha256, sha256)
        except DamagedData as error:
            raise DamagedData(f"{where}: does not belong to manifest.json: {error}: {REMAKE}") from None
        try:
            found = json.loads(data)
            members = np.array(found["members"]) if found["members"] else np.empty((0, 4), dtype=np.int64)
            if found["sha256"] != file["sha256"] or members.shape != (file["samples"], 4) or members.dtype != np.int64:
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise DamagedData(f"{where}: is not an index of {file['samples']} samples: {REMAKE}") from None
        # One run after another from the start of the tar, in the order of their numbers: nothing else has room between them.
        ends = np.cumsum(members[:, 2])
        ordered = (np.diff(members[:, 0]) > 0).all() and (members[:, 0] >= 0).all() and (members[:, 2] > 0).all()
        if not ordered or not (members[:, 1] == ends - members[:, 2]).all() or (len(ends) and ends[-1] > file["bytes"]):
            raise DamagedData(f"{where}: its samples are not one after another in the order of their keys: {REMAKE}")
        return members

    def _where(self, file: dict, number: int) -> str:
        return f"shard {self.storage.where(file['name'] + '.tar')}, sample {number:09d}"

    def _check_sizes(self) -> None:
        for file in [*self.manifest["shards"], *self.manifest["prompts"]["files"]]:
            for name, expected in ((f"{file['name']}.tar", file["bytes"]), (f"{file['name']}.json", file["index"]["bytes"])):
                size = self.storage.size(name)
                if size != expected:
                    found = "is missing" if size is None else f"has {size} bytes"
                    raise UserError(f"shard {self.storage.where(name)} {found}, manifest.json says {expected} bytes: {REMAKE}")


def _check_tensors(tensors: dict[str, Tensor], expected: dict, where: str) -> None:
    for name, (shape, dtype) in expected.items():
        found = tensors.get(name)
        if found is None or tuple(found.shape) != shape or found.dtype != dtype:
            have = "missing" if found is None else f"{tuple(found.shape)} {found.dtype}"
            raise DamagedData(f"{where}: {name} have shape {have}, manifest.json says {shape} {dtype}".replace("torch.", ""))
        if dtype.is_floating_point and not _is_finite(found):
            raise DamagedData(
                f"{where}: {name} hold NaN or infinity: encode again with --vae-dtype float32 and --text-dtype float32"
            )
    if len(tensors) > len(expected):
        raise DamagedData(f"{where}: holds {sorted(set(tensors) - set(expected))} that manifest.json does not speak of")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype != torch.float16:
        return bool(np.isfinite(tensor.numpy()).all())
    # NaN and infinity have all exponent bits set. On the CPU torch's isfinite takes 20 times as long for a float16 latent.
    return int((tensor.view(torch.int16).numpy() & 0x7C00).max()) < 0x7C00


def unpack(data: bytes, number: int, where: str) -> tuple[bytes, bytes]:
    """The .json and the .safetensors of a sample's run of bytes in its tar; nothing else may be there.

    Raises:
        DamagedData: any other member, name, type or order.
    """
    found, offset = [], 0
    for name in (f"{number:09d}.json", f"{number:09d}.safetensors"):
        header = data[offset : offset + 512]
        own = header[:100].rstrip(b"\0").decode("utf-8", "replace")
        # A plain member (type 0) of exactly this name: not a link, not a device, not another path.
        if len(header) < 512 or own != name or header[156:157] not in (b"0", b"\0") or header[345:500].strip(b"\0"):
            raise DamagedData(f"{where}: expected the tar member {name}, found {own[:80]!r}")
        digits = header[124:136].strip(b" \0")
        size = int(digits, 8) if re.fullmatch(rb"[0-7]{1,11}", digits) else len(data)
        start, offset = offset + 512, offset + 512 + -(-size // 512) * 512
        if offset > len(data):
            raise DamagedData(f"{where}: tar member {name} is longer than the index says")
        found.append(data[start : start + size])
    if offset != len(data):
        raise DamagedData(f"{where}: holds more than its .json and its .safetensors")
    return found[0], found[1]
