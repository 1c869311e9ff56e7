"""The shard format, and its reader.

A set of shards consists of tars of encoded pairs, tars of prompts, an index beside each tar, and a manifest that is
written last. Each prompt is stored once.

    shards/
      00000.tar          per pair KEY.json and KEY.safetensors; any reader of WebDataset can read it
      00000.json         commit mark and index: bytes and sha256 of the tar; [number, offset, bytes] of every pair's run
                         of bytes in it; the SHA-256 of each run (``digests``, one hexadecimal text) and of the index
                         itself (``digest``)
      prompts-00000.tar  the same for text embeddings; each distinct prompt once; prompt 0 is the empty prompt
      prompts-00000.json
      errors.jsonl       rows that were left out, and why
      settings.json      the settings that the folder was begun with
      manifest.json      what the shards hold, the sha256 of each tar and index, and its own; if it exists, the set is
                         complete

A pair has the tensors ``latents`` (2,C,H,W) float16, winner before loser, already scaled as the UNet takes them;
``prompt`` () int64, the number of its prompt; and for SDXL ``time_ids`` (2,6) float32. On request it also has
``latents_flipped`` of the mirrored images and ``logvar`` of the VAE's posterior. Both are scaled too, and have the
shape of the latents. If the input has votes, ``soft_label`` () float32 is the share of them that the winner has, in
[0.5, 1]. A prompt has ``prompt_embeds`` (S,D) and, for SDXL, ``pooled`` (P,), both float16.

The manifest holds the SHA-256 of each index, and an index holds the SHA-256 of each pair's run of bytes. Every read
compares both, so a read returns what the manifest's author wrote, or fails. No checksum says who that author was. A run
therefore remembers the digest of its manifest, and refuses to continue with another manifest. Only ``verify`` looks at
bytes behind a tar's last pair.

Sets of the previous format (``dde_ds shards 2``, whose members are [number, offset, bytes, crc32]) are read too. For
their pairs, a read compares only the CRC32, which finds damage and can be forged. ``verify`` compares the SHA-256 of
their tars.

Reading runs no code. Runs of bytes are taken by offset, must hold exactly those two members, and are never unpickled.
Reading never waits for a pipe. It allocates no memory for sizes that the shapes in the manifest do not account for.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dde_ds.data.cache import Cache
from dde_ds.data.manifest import (
    CHECKSUMS,
    DESCRIPTION_BYTES,
    FORMAT,
    INDEX_BYTES,
    PROMPTS_PER_FILE,
    SOFT_LABEL,
    is_whole_manifest,
    largest_sample,
    pair_tensors,
    prompt_tensors,
    read_manifest,
)
from dde_ds.data.storage import DamagedData, LocalFolder, open_storage
from dde_ds.errors import UserError
from dde_ds.untrusted import parse_json

# Number of indexes that a process keeps, at 56 bytes a sample.
OPEN_INDEXES = 1024
REMAKE = "delete it and its .json and run tools/shard_pickapic.py again: only that shard is made"
REMAKE_OLDER = "make it again with the version that made the set, or shard the pairs again into another folder"


class Index(NamedTuple):
    """The places of a tar's samples, and the checksums of their bytes."""

    members: np.ndarray
    """Rows [number, offset, bytes] (N,3) int64."""
    checksums: bytes
    """The checksums of all samples' runs of bytes, one after another and of equal length."""

    def checksum(self, row: int) -> bytes:
        """Return the checksum of the sample in a row."""
        width = len(self.checksums) // len(self.members)
        return self.checksums[row * width : (row + 1) * width]


class Shards(Protocol):
    """The interface of shards that a reader needs.

    :class:`ShardSet` implements it for one set, and :class:`~dde_ds.data.mixture.MixedShards` for several.
    """

    @property
    def counters(self) -> dict[str, int]: ...

    def read(self, shard: int, row: int) -> dict[str, Tensor]: ...

    def prefetch(self, shard: int, row: int) -> None: ...

    def prompt(self, row: int) -> dict[str, Tensor]: ...

    def next_sample(self, shard: int, row: int) -> tuple[int, int]: ...


class ShardSet:
    """A folder of shards, opened for reading.

    It is cheap to make and to pickle: each process opens a file when it first uses it.

    Args:
        folder: a local folder, or a URL (see :mod:`dde_ds.data.storage`).
        cache: keeps ranges of remote shards; None keeps none.
        timeout: seconds that one attempt at a remote range may take.
        check_sizes: compare the sizes of local files with the manifest now. Turn it off where damage is to be met
            sample by sample.
        key: the name of the folder in messages: a key of the configuration, or the word that a command uses.

    Raises:
        UserError: the manifest is missing, damaged or of another format; or a file is missing or does not have the size
            that the manifest says.
    """

    def __init__(
        self,
        folder: str | Path,
        cache: Cache | None = None,
        timeout: float = 60.0,
        check_sizes: bool = True,
        key: str = "data.path",
    ):
        self.storage = open_storage(folder, cache, timeout, key)
        self.folder = self.storage.folder if isinstance(self.storage, LocalFolder) else folder
        if isinstance(self.storage, LocalFolder):
            if not self.storage.folder.is_dir():
                raise UserError(f"{key} {self.folder}: no such folder; make shards with tools/shard_pickapic.py")
            if not (self.storage.folder / "manifest.json").exists():
                raise UserError(
                    f"{key} {self.folder}: no manifest.json; the sharding has not finished, run tools/shard_pickapic.py again"
                )
        try:
            # A transfer that was cut short is tried again. Another attempt at a local file would not change it.
            is_whole = is_whole_manifest if self.storage.is_remote else lambda data: True
            raw = self.storage.fetch("manifest.json", 0, None, is_whole)
        except DamagedData as error:
            raise UserError(f"{key} {folder}: manifest.json: {error}; is this a folder of shards?") from None
        self.manifest = read_manifest(raw, self.storage.where("manifest.json"))
        self._mend = REMAKE if self.manifest["format"] == FORMAT else REMAKE_OLDER
        self.digest = hashlib.sha256(raw).hexdigest()
        """SHA-256 of the manifest. Through the indexes it vouches for every pair and prompt of the set."""
        self.latent_shape: tuple[int, int, int] = tuple(self.manifest["latents"]["shape"])
        """(C,H,W) of one latent."""
        self.counts: list[int] = [row["samples"] for row in self.manifest["shards"]]
        """Number of samples in each shard."""
        if check_sizes and isinstance(self.storage, LocalFolder):
            self._check_sizes(self.storage)
        self._indexes: OrderedDict[str, Index] = OrderedDict()
        self._empty_prompt: dict[str, Tensor] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_indexes": OrderedDict(), "_empty_prompt": None}

    @property
    def counters(self) -> dict[str, int]:
        """Return what this process has read: ``bytes``, ``cache_hits``, ``cache_misses``."""
        return self.storage.counters

    def read(self, shard: int, row: int) -> dict[str, Tensor]:
        """Return the tensors of one pair.

        Raises:
            DamagedData: the bytes differ from those that were written, or their tensors from what the manifest says.
                The message names the shard and the sample.
            UserError: the bytes cannot be read.
        """
        file = self.manifest["shards"][shard]
        number, _, tensors = self._sample(file, row)
        _check_tensors(tensors, pair_tensors(self.manifest), self._where(file, number))
        if SOFT_LABEL in tensors and not 0.5 <= float(tensors[SOFT_LABEL]) <= 1:
            raise DamagedData(f"{self._where(file, number)}: {SOFT_LABEL} is {float(tensors[SOFT_LABEL])}, expected 0.5 to 1")
        if not 0 <= int(tensors["prompt"]) < self.manifest["prompts"]["distinct"]:
            raise DamagedData(f"{self._where(file, number)}: names prompt {int(tensors['prompt'])}, which no prompts file holds")
        return tensors

    def prefetch(self, shard: int, row: int) -> None:
        """Announce that a pair will be read soon, so that a disk has several requests to work on.

        Errors are ignored here: :meth:`read` will raise them.
        """
        if not isinstance(self.storage, LocalFolder):  # for remote shards, the loader's processes already fetch in parallel
            return
        file = self.manifest["shards"][shard]
        with contextlib.suppress(UserError):
            _, offset, size = self.index(file).members[row].tolist()
            self.storage.prefetch(f"{file['name']}.tar", offset, size)

    def describe(self, shard: int, row: int) -> dict:
        """Return the description of a sample: caption, source row, uids. Raises what :meth:`read` raises."""
        file = self.manifest["shards"][shard]
        number, description, _ = self._sample(file, row)
        try:
            record = parse_json(description, DESCRIPTION_BYTES)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise DamagedData(f"{self._where(file, number)}: its .json is no JSON object")
        return record

    def prompt(self, row: int) -> dict[str, Tensor]:
        """Return the embeddings of prompt ``row`` < distinct: ``prompt_embeds`` (S,D) and, for SDXL, ``pooled`` (P,).

        Raises what :meth:`read` raises.
        """
        if row == 0 and self._empty_prompt is not None:  # needed for every dropped caption
            return self._empty_prompt
        number, line = divmod(row, PROMPTS_PER_FILE)
        file = self.manifest["prompts"]["files"][number]
        prompt_number, _, tensors = self._sample(file, line)
        _check_tensors(tensors, prompt_tensors(self.manifest), self._where(file, prompt_number))
        if row == 0:
            self._empty_prompt = tensors
        return tensors

    def next_sample(self, shard: int, row: int) -> tuple[int, int]:
        """Return the place of the next sample, from which a replacement for a bad sample is taken.

        The first sample follows the last.
        """
        row += 1
        while row >= self.counts[shard]:
            shard, row = (shard + 1) % len(self.counts), 0
        return shard, row

    def place(self, shard: int, row: int) -> str:
        """Return a sample's name for messages, without reading anything."""
        return f"{self.storage.where(self.manifest['shards'][shard]['name'] + '.tar')}, row {row}"

    def _sample(self, file: dict, row: int) -> tuple[int, bytes, dict[str, Tensor]]:
        """Return the number, description and tensors of the ``row``-th sample of a file."""
        index, checksum = self.index(file), CHECKSUMS[self.manifest["format"]]
        number, offset, size = index.members[row].tolist()
        where, expected = self._where(file, number), index.checksum(row)
        try:
            data = self.storage.fetch(
                f"{file['name']}.tar", offset, size, lambda data: checksum(data) == expected, f"{file['sha256']} {offset} {size}"
            )
        except DamagedData as error:
            raise DamagedData(f"{where}: {error}: {self._mend}") from None
        description, payload = unpack(data, number, where)
        try:
            return number, description, safetensors.torch.load(payload)
        # A file may name a type that torch does not know, or a shape that its bytes do not fill.
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise DamagedData(f"{where}: not safetensors: {error}") from None

    def index(self, file: dict) -> Index:
        """Return the index of one of the manifest's files.

        Raises:
            DamagedData: the file is not the index that the manifest names, or not an index.
            UserError: the file cannot be read.
        """
        name = file["name"]
        if name not in self._indexes:
            self._indexes[name] = self._read_index(file)
            if len(self._indexes) > OPEN_INDEXES:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(name)
        return self._indexes[name]

    def _read_index(self, file: dict) -> Index:
        name, size, sha256 = f"{file['name']}.json", file["index"]["bytes"], file["index"]["sha256"]
        where = f"shard index {self.storage.where(name)}"
        try:
            data = self.storage.fetch(name, 0, size, lambda data: hashlib.sha256(data).hexdigest() == sha256, sha256)
        except DamagedData as error:
            raise DamagedData(f"{where}: does not belong to manifest.json: {error}: {self._mend}") from None
        try:
            document = parse_json(data, INDEX_BYTES)
            members, checksums = _numbers(document, self.manifest["format"])
            if document["sha256"] != file["sha256"] or len(members) != file["samples"]:
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError):
            raise DamagedData(f"{where}: is not an index of {file['samples']} samples: {self._mend}") from None
        largest = largest_sample((prompt_tensors if name.startswith("prompts-") else pair_tensors)(self.manifest))
        if (members[:, 2] > largest).any():
            raise DamagedData(
                f"{where}: a sample has {members[:, 2].max()} bytes, manifest.json says at most {largest}: {self._mend}"
            )
        # The runs must follow each other without a gap from the start of the tar, in the order of their numbers. So
        # nothing else has room between them.
        ends = np.cumsum(members[:, 2])
        ordered = (np.diff(members[:, 0]) > 0).all() and (members[:, 0] >= 0).all() and (members[:, 2] > 0).all()
        if not ordered or not (members[:, 1] == ends - members[:, 2]).all() or (len(ends) and ends[-1] > file["bytes"]):
            raise DamagedData(f"{where}: its samples are not one after another in the order of their keys: {self._mend}")
        return Index(members, checksums)

    def _where(self, file: dict, number: int) -> str:
        return f"shard {self.storage.where(file['name'] + '.tar')}, sample {number:09d}"

    def _check_sizes(self, storage: LocalFolder) -> None:
        for file in [*self.manifest["shards"], *self.manifest["prompts"]["files"]]:
            for name, expected in ((f"{file['name']}.tar", file["bytes"]), (f"{file['name']}.json", file["index"]["bytes"])):
                size = storage.size(name)
                if size != expected:
                    state = "is missing, or no regular file" if size is None else f"has {size} bytes"
                    raise UserError(f"shard {self.storage.where(name)} {state}, manifest.json says {expected} bytes: {self._mend}")


def _numbers(index: dict, form: str) -> tuple[np.ndarray, bytes]:
    """Return the members and checksums of an index of the format ``form``.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: the document is not such an index.
    """
    rows, columns = index["members"], 3 if form == FORMAT else 4
    # This check comes before numpy's conversion, since an array of texts would be as wide as its longest text.
    if not all(isinstance(row, list) and len(row) == columns and all(type(value) is int for value in row) for row in rows):
        raise ValueError
    members = np.array(rows, dtype=np.int64).reshape(-1, columns)
    if form != FORMAT:
        if ((members[:, 3] < 0) | (members[:, 3] >= 2**32)).any():
            raise ValueError
        return members[:, :3].copy(), members[:, 3].astype(">u4").tobytes()
    checksums = bytes.fromhex(index["digests"])
    if len(checksums) != 32 * len(members):
        raise ValueError
    return members, checksums


def _check_tensors(tensors: dict[str, Tensor], expected: dict, where: str) -> None:
    """Compare tensors with the shapes and types that the manifest says, and refuse NaN and infinity."""
    for name, (shape, dtype) in expected.items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            have = "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            raise DamagedData(f"{where}: {name} have shape {have}, manifest.json says {shape} {dtype}".replace("torch.", ""))
        if dtype.is_floating_point and not _is_finite(tensor):
            raise DamagedData(
                f"{where}: {name} hold NaN or infinity: encode again with --vae-dtype float32 and --text-dtype float32"
            )
    if len(tensors) > len(expected):
        raise DamagedData(f"{where}: holds {sorted(set(tensors) - set(expected))} that manifest.json does not speak of")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype != torch.float16:
        return bool(np.isfinite(tensor.numpy()).all())
    # NaN and infinity have all exponent bits set. On the CPU, torch's isfinite takes 20 times as long for a float16
    # latent.
    return int((tensor.view(torch.int16).numpy() & 0x7C00).max()) < 0x7C00


def unpack(data: bytes, number: int, where: str) -> tuple[bytes, bytes]:
    """Return the .json and the .safetensors in a sample's run of bytes. Nothing else may be in it.

    Args:
        data: the run, from the sample's tar.
        number: number of the sample, which its members are named by.
        where: name of the sample for messages.

    Raises:
        DamagedData: a member has another name or type, the order differs, or the run holds more.
    """
    contents, offset = [], 0
    for name in member_names(number):
        size = member_size(data[offset : offset + 512], name, where)
        start, offset = offset + 512, offset + 512 + -(-size // 512) * 512
        if offset > len(data):
            raise DamagedData(f"{where}: tar member {name} is longer than the index says")
        contents.append(data[start : start + size])
    if offset != len(data):
        raise DamagedData(f"{where}: holds more than its .json and its .safetensors")
    return contents[0], contents[1]


def member_names(number: int) -> tuple[str, str]:
    """Return the names of the two members of a sample."""
    return f"{number:09d}.json", f"{number:09d}.safetensors"


def member_size(header: bytes, name: str, where: str) -> int:
    """Return the size in bytes of a tar member from its header of 512 bytes.

    Raises:
        DamagedData: the header belongs to another member, or its size is not a plain octal number (a negative size is
            not).
    """
    actual_name = header[:100].rstrip(b"\0").decode("utf-8", "replace")
    # Only a plain member (type 0) of exactly this name is accepted: no link, no device and no other path.
    if len(header) < 512 or actual_name != name or header[156:157] not in (b"0", b"\0") or header[345:500].strip(b"\0"):
        raise DamagedData(f"{where}: expected the tar member {name}, found {actual_name[:80]!r}")
    digits = header[124:136].strip(b" \0")
    if not re.fullmatch(rb"[0-7]{1,11}", digits):
        raise DamagedData(f"{where}: tar member {name} has no size that can be")
    return int(digits, 8)
