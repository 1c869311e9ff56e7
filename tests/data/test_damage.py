"""Damaged and hostile shards: an error that says where, or exactly what was written. Never less, never something else."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from dde_ds import UserError
from dde_ds.cli import main
from dde_ds.data.manifest import manifest_digest
from dde_ds.data.order import Order
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset, RankSlices, ReadingTotals, micro_batches
from dde_ds.data.shards import ShardSet
from dde_ds.data.storage import DamagedData
from dde_ds.data.verify import verify
from dde_ds.data.writer import finished_shard, write_manifest, write_shard
from dde_ds.files import sha256_of
from tests.support.tiny import SETTINGS, as_format_2, pair, sign, write_tiny

MUTATIONS = 10_000
COUNTS = (3, 3, 2)


def everything(folder: Path, check_sizes: bool) -> list[dict[str, torch.Tensor]]:
    """Every pair and prompt, in order."""
    shards = ShardSet(folder, check_sizes=check_sizes)
    places = [(shard, row) for shard, count in enumerate(shards.counts) for row in range(count)]
    return [shards.read(*place) for place in places] + [shards.prompt(row) for row in range(shards.manifest["prompts"]["distinct"])]


def same(found: list[dict], expected: list[dict]) -> bool:
    return len(found) == len(expected) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(found, expected, strict=True)
    )


def mutate(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """One of the things that happen to files."""
    at = rng.randrange(len(data))
    long = rng.choice((1, 2, 8, 64, 512))
    kind = rng.randrange(8)
    if kind == 0:  # a flipped bit
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:  # a cut
        return data[:at]
    if kind == 2:  # a cut at a block
        return data[: at // 512 * 512]
    if kind == 3:  # a hole of zeros, as a lost block leaves
        return data[:at] + bytes(min(long, len(data) - at)) + data[at + long :]
    if kind == 4:  # bytes gone
        return data[:at] + data[at + long :]
    if kind == 5:  # bytes twice
        return data[:at] + data[at : at + long] + data[at:]
    if kind == 6:  # a piece of another file
        return data[:at] + other[at % len(other) :][:long] + data[at + long :]
    return data[:at] + rng.randbytes(long) + data[at + long :]  # noise


def test_ten_thousand_mutations(tmp_path):
    folder = write_tiny(tmp_path / "shards", (2, 1), prompts=2)
    expected = everything(folder, True)
    files = sorted(path for path in folder.iterdir())
    contents = [path.read_bytes() for path in files]
    rng = random.Random(0)
    refused = whole = 0
    for _ in range(MUTATIONS):
        number = rng.randrange(len(files))
        damaged = mutate(contents[number], rng, rng.choice(contents))
        files[number].write_bytes(damaged)
        try:
            found = everything(folder, check_sizes=rng.random() < 0.2)
            assert same(found, expected), f"{files[number].name} changed what is read"
            whole += 1
        except UserError as error:
            assert "\n" not in str(error)
            assert files[number].stem in str(error), f"{files[number]}: {error}"
            refused += 1
        finally:
            files[number].write_bytes(contents[number])
    # Not all damage matters to a reader: zeros over zeros, and what stands behind the last pair of a tar.
    assert refused + whole == MUTATIONS
    assert refused > MUTATIONS / 2


def leaves(value, path=()):
    """Paths of everything in a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


HOSTILE = (None, -1, 0, 1.5, 2**70, True, "", "../../etc/passwd", "pipe:touch x", [], [[]], {}, "00001", float("nan"), "\udc80")


PYTHONS_WORDS = re.compile(
    "NoneType|TypeError|KeyError|ValueError|object is not|has no attribute|indices must|unhashable|not supported"
)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("shards",), None, "shards is null, expected a list"),
        (("shards", 1), [], "shards[1] is a list, expected an object"),
        (("shards", 1, "bytes"), "7", "shards[1].bytes is '7', expected a whole number from 0"),
        (("shards", 0, "index"), None, "shards[0].index is null, expected an object"),
        (("prompts", "files"), {}, "prompts.files is an object, expected a list"),
        (("prompts", "tensors", "prompt_embeds"), None, "prompts.tensors['prompt_embeds'] is null, expected a list"),
        (("settings", "flip"), 1, "settings.flip is 1, expected true or false"),
        (("latents", "shape"), "1x2x2", "latents.shape is '1x2x2', expected a list"),
    ],
)
def test_a_wrong_type_is_said_in_plain_words(tmp_path, place, value, said):
    folder = write_tiny(tmp_path / "shards")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    write_manifest(folder, manifest)
    with pytest.raises(UserError) as caught:
        ShardSet(folder)
    assert str(caught.value) == f"{folder}/manifest.json: {said}"


def test_what_is_shown_of_a_manifest_is_checked_too(tmp_path, capsys):
    folder = write_tiny(tmp_path / "shards")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    write_manifest(folder, manifest | {"rows": {"decided": "many"}})
    assert main(["inspect", str(folder)]) == 1
    said = "manifest.json does not say what is shown here: rows['decided'] is 'many', expected a whole number from 0"
    assert capsys.readouterr().err == f"error: {folder}: {said}\n"


def test_hostile_manifests_and_indexes(tmp_path):
    """Whatever a document with the right digests says, the answer is one line; and no name leads out of the folder."""
    folder = write_tiny(tmp_path / "shards", COUNTS)
    expected = everything(folder, True)
    original = json.loads((folder / "manifest.json").read_bytes())
    index = json.loads((folder / "00001.json").read_bytes())
    rng, refused = random.Random(1), 0
    for target, document in (("manifest.json", original), ("00001.json", index)):
        paths = [path for path in leaves(document) if path]
        for path in paths:
            for value in rng.sample(HOSTILE, 5):
                changed = json.loads(json.dumps(document))
                inner = changed
                for key in path[:-1]:
                    inner = inner[key]
                inner[path[-1]] = value
                if target == "manifest.json":
                    changed["digest"] = manifest_digest(changed)
                    (folder / target).write_text(json.dumps(changed))
                else:
                    data = json.dumps(changed).encode()
                    (folder / target).write_bytes(data)
                    write_manifest(folder, vouch(original, 1, data))
                try:
                    found = everything(folder, check_sizes=rng.random() < 0.5)
                    assert same(found, expected) or path[0] in ("members", "samples", "settings"), (target, path, value)
                except UserError as error:
                    refused += 1
                    assert "root:" not in str(error)
                    assert not PYTHONS_WORDS.search(str(error)), error
        write_manifest(folder, original)
        (folder / "00001.json").write_bytes(json.dumps(index).encode() + b"\n")
    assert refused > 300
    assert same(everything(folder, True), expected)


def vouch(manifest: dict, shard: int, index: bytes, **row) -> dict:
    """The manifest with a shard's index replaced by another, as its author would have written it."""
    changed = json.loads(json.dumps(manifest))
    changed["shards"][shard].update(row)
    changed["shards"][shard]["index"] = {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    return changed


class Executed(Exception):
    pass


class Bomb:
    def __reduce__(self):
        return (exec, ("raise __import__('tests.data.test_damage').data.test_damage.Executed",))


def replace_tar(folder: Path, shard: int, members: list[tuple[str, bytes]], runs: list[int], change=None) -> None:
    """A hostile author's tar with an index and a manifest that vouch for it; ``runs``: members of each sample."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change:
                change(info)
            tar.addfile(info, io.BytesIO(data))
    data = stream.getvalue()
    rows, digests, offset, taken = [], "", 0, iter(members)
    for number, run in enumerate(runs):
        size = sum(512 + -(-len(next(taken)[1]) // 512) * 512 for _ in range(run))
        rows.append([3 + number, offset, size])
        digests += hashlib.sha256(data[offset : offset + size]).hexdigest()
        offset += size
    name = f"{shard:05d}"
    (folder / f"{name}.tar").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    row = {"name": name, "samples": len(rows), "bytes": len(data), "sha256": sha256_of(folder / f"{name}.tar")}
    index = json.dumps({**row, "settings": "digest", "errors": [], "members": rows, "digests": digests}).encode()
    (folder / f"{name}.json").write_bytes(index)
    write_manifest(folder, vouch(manifest, shard, index, **row))


def good(number: int) -> list[tuple[str, bytes]]:
    tensors = {"latents": torch.full((2, 1, 2, 2), number).half(), "prompt": torch.tensor(number % 3)}
    return [(f"{number:09d}.json", b"{}"), (f"{number:09d}.safetensors", safetensors.torch.save(tensors))]


PICKLE = pickle.dumps(Bomb())
WRONG = safetensors.torch.save({"latents": torch.zeros(2, 1, 2, 3).half(), "prompt": torch.tensor(0)})
NO_SUCH_PROMPT = safetensors.torch.save({"latents": torch.zeros(2, 1, 2, 2).half(), "prompt": torch.tensor(99)})


@pytest.mark.parametrize(
    ("second", "runs", "named"),
    [
        (
            [("000000004.json", b"{}"), ("000000004.pkl", PICKLE)],
            2,
            "expected the tar member 000000004.safetensors, found '000000004.pkl'",
        ),
        ([("000000004.json", b"{}"), ("000000004.safetensors", PICKLE)], 2, "not safetensors"),
        ([*good(4), ("000000004.pyd", PICKLE)], 3, "holds more than its .json and its .safetensors"),
        ([("../../../tmp/x.json", b"{}"), good(4)[1]], 2, "found '../../../tmp/x.json'"),
        ([("pipe:touch x.json", b"{}"), good(4)[1]], 2, "found 'pipe:touch x.json'"),
        (good(4)[::-1], 2, "expected the tar member 000000004.json"),
        (good(7), 2, "expected the tar member 000000004.json"),
        (
            [good(4)[0], ("000000004.safetensors", WRONG)],
            2,
            r"latents have shape (2, 1, 2, 3) float16, manifest.json says (2, 1, 2, 2)",
        ),
        ([good(4)[0], ("000000004.safetensors", NO_SUCH_PROMPT)], 2, "names prompt 99, which no prompts file holds"),
        ([good(4)[0], ("000000004.safetensors", b"\xff" * 64)], 2, "not safetensors"),
    ],
    ids=["pkl", "pickle-inside", "stowaway", "traversal", "pipe", "order", "name", "shape", "prompt", "garbage"],
)
def test_hostile_members_vouched_for(tmp_path, second, runs, named):
    folder = write_tiny(tmp_path / "shards", COUNTS)
    replace_tar(folder, 1, [*good(3), *second, *good(5)], [2, runs, 2])
    shards = ShardSet(folder)
    assert shards.read(1, 0)["latents"].unique().item() == 3
    with pytest.raises(DamagedData) as caught:
        shards.read(1, 1)
    assert named in str(caught.value)
    assert f"shard {folder}/00001.tar, sample 000000004" in str(caught.value)
    assert shards.read(1, 2)["latents"].unique().item() == 5
    (problem,) = {problem.file for problem in verify(folder)}
    assert problem == "00001.tar"


def test_a_link_is_no_member(tmp_path):
    folder = write_tiny(tmp_path / "shards", COUNTS)

    def link(info):
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"

    replace_tar(folder, 1, [(name, b"") for name, _ in [*good(3), *good(4), *good(5)]], [2, 2, 2], link)
    with pytest.raises(DamagedData, match="expected the tar member"):
        ShardSet(folder).read(1, 0)


def test_gzipped_tar_and_swapped_shards(tmp_path):
    folder = write_tiny(tmp_path / "shards", COUNTS)
    tar = folder / "00000.tar"
    data = tar.read_bytes()
    tar.write_bytes(gzip.compress(data))
    with pytest.raises(UserError, match=r"00000\.tar has \d+ bytes, manifest\.json says"):
        ShardSet(folder)
    with pytest.raises(DamagedData, match=r"00000\.tar, sample 000000000: checksum differs"):
        ShardSet(folder, check_sizes=False).read(0, 0)
    tar.write_bytes((folder / "00001.tar").read_bytes())  # of the same size, and whole
    with pytest.raises(DamagedData, match=r"00000\.tar, sample 000000000: checksum differs"):
        ShardSet(folder).read(0, 0)


@pytest.mark.parametrize(
    "path", ["pipe:touch executed", "simplecache::s3://bucket/x", "ftp://host/x", "memory://x", "s3://bucket/x?y"]
)
def test_other_urls_are_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data\.path .*: expected"):
        ShardSet(path)
    assert not list(tmp_path.iterdir())


def test_another_format_is_refused(tmp_path):
    folder = write_tiny(tmp_path / "shards")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": "dde_ds shards 1"}))
    with pytest.raises(UserError, match="format is 'dde_ds shards 1', this version reads 'dde_ds shards 2' and 'dde_ds shards 3'"):
        ShardSet(folder)


# Substitution


def dataset(folder: Path, max_bad: int, **draws) -> PairDataset:
    shards = ShardSet(folder, check_sizes=not max_bad)
    return PairDataset(shards, Order(shards.counts, 0, 2), PairRng(0, torch.ones(10), **draws), max_bad)


def break_pair(folder: Path, shard: int, row: int) -> None:
    path = folder / f"{shard:05d}.tar"
    _, offset, size = json.loads((folder / f"{shard:05d}.json").read_bytes())["members"][row]
    data = bytearray(path.read_bytes())
    data[offset + size - 500] ^= 16
    path.write_bytes(data)


def trained_on(
    data: PairDataset, world: int, micro: int, workers: int, steps=(0, 6)
) -> tuple[dict[int, float], list[ReadingTotals]]:
    """Position → the pair's latents, which are its number."""
    found, totals = {}, []
    for rank in range(world):
        totals.append(ReadingTotals())
        for batch in micro_batches(data, RankSlices(4, micro, rank, world, *steps), workers, False, totals[-1]):
            for i, position in enumerate(batch["positions"].tolist()):
                found[position] = batch["latents"][i].unique().item()
    return found, totals


def test_bad_samples_are_replaced_by_their_neighbours(tmp_path, capsys):
    folder = write_tiny(tmp_path / "shards", COUNTS)
    good, _ = trained_on(dataset(folder, 0), 1, 4, 0)
    break_pair(folder, 0, 2)
    break_pair(folder, 2, 1)
    with pytest.raises(UserError, match="checksum differs"):
        trained_on(dataset(folder, 0), 1, 4, 0)
    # Pair 2 is the last of its shard: the next is the first of the following one. Pair 7 is the last of all.
    expected = {position: {2: 3, 7: 0}.get(pair, pair) for position, pair in good.items()}
    assert expected != good
    for world, micro, workers in ((1, 4, 0), (2, 1, 2), (4, 1, 1)):
        found, totals = trained_on(dataset(folder, 2), world, micro, workers)
        assert found == expected
        assert set().union(*(one.bad for one in totals)) == {(0, 2), (2, 1)}
        assert sum(one.counters["pairs"] for one in totals) == 24
    assert "00000.tar, sample 000000002: checksum differs" in capsys.readouterr().err
    resumed, _ = trained_on(dataset(folder, 2), 2, 2, 0, steps=(3, 6))
    assert resumed == {position: pair for position, pair in expected.items() if position >= 12}
    with pytest.raises(UserError, match=r"checksum differs.*\(data\.max_bad_samples 1 is used up\)"):
        trained_on(dataset(folder, 1), 1, 4, 0)


def test_a_missing_shard_is_replaced_or_refused(tmp_path):
    folder = write_tiny(tmp_path / "shards", COUNTS)
    (folder / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"00001\.tar is missing"):
        dataset(folder, 0)
    found, totals = trained_on(dataset(folder, 3), 1, 4, 0)
    assert set(found.values()) == {0, 1, 2, 6, 7}
    assert set(totals[0].bad) == {(1, 0), (1, 1), (1, 2)}
    with pytest.raises(UserError, match=r"the file is missing.*max_bad_samples 2 is used up"):
        trained_on(dataset(folder, 2), 1, 4, 0)


def test_a_damaged_empty_prompt_ends_in_an_error(tmp_path):
    folder = write_tiny(tmp_path / "shards", COUNTS)
    (folder / "prompts-00000.tar").unlink()
    with pytest.raises(UserError, match=r"prompts-00000\.tar, sample 00000000\d: the file is missing"):
        trained_on(dataset(folder, 100, caption_dropout=0.5), 1, 4, 0)


def test_random_positions_are_unmoved_by_damage(tmp_path):
    """Samples that are not damaged keep their own positions."""
    folder = write_tiny(tmp_path / "shards", (5, 5, 5, 5))
    good, _ = trained_on(dataset(folder, 0), 1, 4, 0, steps=(0, 10))
    rng = np.random.default_rng(0)
    bad = set(rng.choice(20, 6, replace=False).tolist())
    for k in bad:
        break_pair(folder, *divmod(k, 5))
    found, _ = trained_on(dataset(folder, 6), 1, 4, 0, steps=(0, 10))
    assert {p for p in good if found[p] != good[p]} == {p for p, pair in good.items() if pair in bad}
    assert not bad & set(found.values())


def test_verify_finds_each(tmp_path):
    folder = write_tiny(tmp_path / "shards", COUNTS)
    assert verify(folder) == verify(folder, quick=True) == []
    break_pair(folder, 1, 0)
    assert [problem.file for problem in verify(folder)] == ["00001.tar"]
    assert verify(folder, quick=True) == []
    (folder / "00002.tar").unlink()
    assert [problem.file for problem in verify(folder, quick=True)] == ["00002.tar"]
    shutil.copy(folder / "00001.json", folder / "00000.json")
    found = {problem.file for problem in verify(folder)}
    assert found == {"00000.json", "00001.tar", "00002.tar"}


# Checksums


def forge(data: bytes, at: int, crc32: int) -> bytes:
    """The same bytes but the four at ``at``, chosen so that their CRC32 is this one: it is linear in each bit."""
    base = zlib.crc32(data)
    effects = []
    for bit in range(32):
        changed = bytearray(data)
        changed[at + bit // 8] ^= 1 << bit % 8
        effects.append((zlib.crc32(changed) ^ base, 1 << bit))
    wanted, chosen = base ^ crc32, 0
    for column in range(31, -1, -1):
        pivot = next(i for i, (effect, _) in enumerate(effects) if effect >> column & 1)
        effect, bits = effects.pop(pivot)
        effects = [(e ^ effect, b ^ bits) if e >> column & 1 else (e, b) for e, b in effects]
        if wanted >> column & 1:
            wanted, chosen = wanted ^ effect, chosen ^ bits
    forged = bytearray(data)
    forged[at : at + 4] = (int.from_bytes(data[at : at + 4], "little") ^ chosen).to_bytes(4, "little")
    assert zlib.crc32(forged) == crc32
    return bytes(forged)


@pytest.mark.parametrize("older", [False, True])
def test_a_forged_pair(tmp_path, older):
    """Other latents, with bytes behind them that give the CRC32 of the true ones."""
    folder = write_tiny(tmp_path / "shards", COUNTS)
    _, offset, size = json.loads((folder / "00001.json").read_bytes())["members"][1]
    if older:
        as_format_2(folder)
    tar = bytearray((folder / "00001.tar").read_bytes())
    run = bytes(tar[offset : offset + size])
    true = pair(4, 0.0, 3, SETTINGS).tensors
    payload = safetensors.torch.save(true)
    start = run.index(payload)
    changed = bytearray(run)
    changed[start : start + len(payload)] = safetensors.torch.save(true | {"latents": torch.full((2, 1, 2, 2), 99.0).half()})
    tar[offset : offset + size] = forge(bytes(changed), size - 4, zlib.crc32(run))
    (folder / "00001.tar").write_bytes(tar)
    if older:  # which is why sets made today hold a SHA-256
        assert ShardSet(folder).read(1, 1)["latents"].unique().item() == 99
    else:
        with pytest.raises(DamagedData, match=r"00001\.tar, sample 000000004: checksum differs"):
            ShardSet(folder).read(1, 1)
    assert [problem.file for problem in verify(folder)] == ["00001.tar"]


def test_sets_of_the_format_before_are_read(tmp_path):
    expected = everything(write_tiny(tmp_path / "now", COUNTS), True)
    folder = as_format_2(write_tiny(tmp_path / "before", COUNTS))
    assert same(everything(folder, True), expected)
    assert verify(folder) == []
    found, _ = trained_on(dataset(folder, 0), 1, 4, 2)
    assert found == trained_on(dataset(tmp_path / "now", 0), 1, 4, 0)[0]
    break_pair(tmp_path / "now", 1, 0)
    shutil.copy(tmp_path / "now" / "00001.tar", folder)
    with pytest.raises(DamagedData, match=r"00001\.tar, sample 000000003: checksum differs.* with the version that made the set"):
        ShardSet(folder).read(1, 0)
    index = json.loads((folder / "00000.json").read_bytes())
    index["members"][0][3] = -1
    data = json.dumps(index).encode()
    (folder / "00000.json").write_bytes(data)
    sign(folder, vouch(json.loads((folder / "manifest.json").read_bytes()), 0, data))
    with pytest.raises(DamagedData, match="is not an index of 3 samples"):
        ShardSet(folder).read(0, 0)


def test_a_damaged_index_is_not_taken_for_whole(tmp_path):
    """Neither by its own digest nor, signed anew, beside its tar: the next run of the sharding tool makes that shard again."""
    samples = [pair(k, 0.0, 3, SETTINGS) for k in range(4)]
    errors = [{"row": 7, "source": "tiny:7", "image": "winner", "reason": "undecodable image: broken"}]
    row = write_shard(tmp_path, "00000", samples, "digest", errors)
    assert finished_shard(tmp_path, "00000", "digest") == (row, errors)
    index, tar = (tmp_path / "00000.json").read_bytes(), (tmp_path / "00000.tar").read_bytes()
    rng, refused = random.Random(0), 0
    for number in range(2000):
        data = mutate(index, rng, tar)
        (tmp_path / "00000.json").write_bytes(data)
        for check in (True, False):
            found = finished_shard(tmp_path, "00000", "digest", verify=check)
            assert found is None or data == index, f"mutation {number}: {data!r}"
        refused += found is None
    assert refused > 1900
    document = json.loads(index)
    for path in leaves(document):
        for value in HOSTILE if path else ():
            changed = json.loads(index)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if inner[path[-1]] == value:
                continue
            inner[path[-1]] = value
            if path[0] != "digest":
                changed["digest"] = manifest_digest(changed)
            (tmp_path / "00000.json").write_bytes((json.dumps(changed) + "\n").encode())
            # What was left out, no tar says: the index alone does, and whoever signs it anew is its author.
            if path[0] != "errors":
                assert finished_shard(tmp_path, "00000", "digest") is None, (path, value)


# Files that are none, and sizes that cannot be


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Whatever waits for ever is ended."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["manifest.json", "00001.json", "00001.tar", "prompts-00000.json", "prompts-00000.tar"])
def test_a_pipe_or_a_device_is_not_waited_for(tmp_path, name, kind):
    folder = write_tiny(tmp_path / "shards", COUNTS)
    (folder / name).unlink()
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    with at_most(20):
        for check_sizes in (True, False):
            with pytest.raises(UserError, match=r"no manifest\.json|not a regular file|no regular file"):
                everything(folder, check_sizes)
        if name != "manifest.json":
            assert [problem.file for problem in verify(folder)] == [name]
            stem, settings = name.partition(".")[0], "digest"
            assert finished_shard(folder, stem, settings) is None


def test_a_member_of_negative_size(tmp_path):
    """On which some versions of tarfile go round for ever."""
    folder = write_tiny(tmp_path / "shards", COUNTS)
    replace_tar(folder, 1, [*good(3), *good(4), *good(5)], [2, 2, 2])
    data = bytearray((folder / "00001.tar").read_bytes())
    data[124:136] = (-512).to_bytes(12, "big", signed=True)
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    (folder / "00001.tar").write_bytes(data)
    with at_most(20):
        for quick in (True, False):
            (problem,) = verify(folder, quick)
            assert (problem.file, problem.what) == (
                "00001.tar",
                "sample 000000003: tar member 000000003.json has no size that can be",
            )


def test_members_behind_the_last_pair(tmp_path):
    folder = write_tiny(tmp_path / "shards", COUNTS)
    replace_tar(folder, 1, [*good(3), *good(4), *good(5), ("stowaway", b"x")], [2, 2, 2])
    assert [(one.file, one.what) for one in verify(folder, quick=True)] == [
        ("00001.tar", "holds more than the 3 samples of its index")
    ]


def test_sizes_that_no_memory_holds(tmp_path):
    """Signed by their author, so that only the sizes speak against them."""
    folder = write_tiny(tmp_path / "shards", COUNTS)
    original = json.loads((folder / "manifest.json").read_bytes())
    index = json.loads((folder / "00001.json").read_bytes())
    huge = 2**45
    for change, named in (
        (lambda m: m["shards"][1].update(bytes=huge), None),
        (lambda m: m["shards"][1]["index"].update(bytes=huge), "an index of 35184372088832 bytes"),
        (lambda m: (m["shards"][1].update(samples=huge), m.update(samples=huge + 5)), "has 35184372088832 samples"),
        (lambda m: m["latents"].update(shape=[2**19] * 3), "a pair's tensors take"),
        (lambda m: m["prompts"]["tensors"].update(prompt_embeds=[2**19] * 2), "a prompt's tensors take"),
    ):
        changed = json.loads(json.dumps(original))
        change(changed)
        sign(folder, changed)
        if named:
            with pytest.raises(UserError, match=named):
                ShardSet(folder, check_sizes=False)
    # A sparse file takes no room on the disk, and has every size that is said of it.
    changed = json.loads(json.dumps(original))
    index["members"], index["bytes"] = [[3, 0, 2**40], [4, 2**40, 2**40], [5, 2**41, 2**40]], 2**42
    data = (json.dumps(index | {"digest": manifest_digest(index)}) + "\n").encode()
    (folder / "00001.json").write_bytes(data)
    os.truncate(folder / "00001.tar", 2**42)
    sign(folder, vouch(changed, 1, data, bytes=2**42))
    with pytest.raises(DamagedData, match=r"00001\.json: a sample has \d+ bytes, manifest\.json says at most"):
        ShardSet(folder).read(1, 0)
    assert finished_shard(folder, "00001", "digest") is None
    # A table of texts would be as wide as its widest cell.
    index["members"] = [["x" * 2**20, 0, 1]] + [["y", 0, 1]] * 2**16
    data = json.dumps(index).encode()
    (folder / "00001.json").write_bytes(data)
    sign(folder, vouch(changed, 1, data))
    with pytest.raises(DamagedData, match="is not an index of 3 samples"):
        ShardSet(folder, check_sizes=False).read(1, 0)


def test_a_manifest_has_a_limit(tmp_path):
    folder = write_tiny(tmp_path / "shards", COUNTS)
    os.truncate(folder / "manifest.json", 2**40)
    with pytest.raises(UserError, match=r"manifest\.json: larger than 33,554,432 bytes"):
        ShardSet(folder)
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"manifest\.json: not readable: nested deeper than 64 levels"):
        ShardSet(folder)
