"""Damaged and hostile shards: an error that says where, or exactly what was written. Never less, never something else."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from dde_ds import UserError
from dde_ds.data.draws import Draws
from dde_ds.data.manifest import manifest_digest
from dde_ds.data.order import Order
from dde_ds.data.reader import PairDataset, RankSlices, ReadingTotals, micro_batches
from dde_ds.data.shards import ShardSet
from dde_ds.data.storage import DamagedData
from dde_ds.data.verify import verify
from dde_ds.data.writer import write_manifest
from dde_ds.files import sha256_of
from tests.data.tiny import write_tiny

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
        write_manifest(folder, original)
        (folder / "00001.json").write_bytes(json.dumps(index).encode() + b"\n")
    assert refused > 300
    assert same(everything(folder, True), expected)


def vouch(manifest: dict, shard: int, index: bytes, **row) -> dict:
    """The manifest with a shard's index replaced by another, as its author would have written it."""
    import hashlib

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
    rows, offset, taken = [], 0, iter(members)
    for number, run in enumerate(runs):
        size = sum(512 + -(-len(next(taken)[1]) // 512) * 512 for _ in range(run))
        rows.append([3 + number, offset, size, zlib.crc32(data[offset : offset + size])])
        offset += size
    name = f"{shard:05d}"
    (folder / f"{name}.tar").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    row = {"name": name, "samples": len(rows), "bytes": len(data), "sha256": sha256_of(folder / f"{name}.tar")}
    index = json.dumps({**row, "settings": "digest", "errors": [], "members": rows}).encode()
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
    with pytest.raises(UserError, match="format is 'dde_ds shards 1', this version reads 'dde_ds shards 2'"):
        ShardSet(folder)


# Substitution


def dataset(folder: Path, max_bad: int, **draws) -> PairDataset:
    shards = ShardSet(folder, check_sizes=not max_bad)
    return PairDataset(shards, Order(shards.counts, 0, 2), Draws(0, torch.ones(10), **draws), max_bad)


def break_pair(folder: Path, shard: int, row: int) -> None:
    path = folder / f"{shard:05d}.tar"
    _, offset, size, _ = json.loads((folder / f"{shard:05d}.json").read_bytes())["members"][row]
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
    """What is not damaged is trained on at its own position."""
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
