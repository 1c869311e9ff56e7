from __future__ import annotations

import io
import json
import shutil
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import webdataset
from PIL import Image

from dde_ds import UserError
from dde_ds.data.inputs import find_pairs
from dde_ds.data.order import Order
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset, RankSlices, micro_batches
from dde_ds.data.shards import ShardSet
from dde_ds.models.encode import Encoder, prepare_image
from tests.conftest import shard
from tests.support.tiny import write_tiny


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rewritten(parquet: Path, target: Path, **changes) -> Path:
    """A copy of a parquet with some columns replaced: ``name=(row, value)``, or ``name=None`` to drop it."""
    table = pq.read_table(parquet)
    for name, change in changes.items():
        index = table.schema.get_field_index(name)
        if change is None:
            table = table.remove_column(index)
        else:
            values = table.column(name).to_pylist()
            values[change[0]] = change[1]
            table = table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))
    pq.write_table(table, target)
    return target


def test_latents_are_those_of_the_pipeline(sd_shards, sd_model, parquet):
    """Decoded from the parquet by hand, encoded by diffusers, winner first, scaled."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(sd_model / "vae")
    shards = ShardSet(sd_shards)
    assert shards.counts == [6, 6, 6, 2]
    rows = pq.read_table(parquet).to_pylist()
    for number in (0, 7, 19):
        row = rows[number]
        winner = row["jpg_0"] if row["label_0"] == 1 else row["jpg_1"]
        image = Image.open(io.BytesIO(winner)).convert("RGB").resize((16, 16), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = vae.encode(pixels).latent_dist.mean[0] * vae.config.scaling_factor
        found = shards.read(number // 6, number % 6)["latents"][0]
        torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_prompts_are_stored_once_and_are_those_of_the_pipeline(family, request):
    shards, model = ShardSet(request.getfixturevalue(f"{family}_shards")), request.getfixturevalue(f"{family}_model")
    encoder = Encoder(str(model))
    captions = {"": 0}
    for sample in webdataset.WebDataset([str(shards.folder / f"{i:05d}.tar") for i in range(4)], shardshuffle=False):
        description, tensors = json.loads(sample["json"]), safetensors.torch.load(sample["safetensors"])
        captions[description["caption"]] = int(tensors["prompt"])
    assert sorted(captions.values()) == list(range(shards.manifest["prompts"]["distinct"]))
    for caption in ("", "dagger"):
        for key, expected in encoder.prompts([caption]).items():
            torch.testing.assert_close(shards.prompt(captions[caption])[key].float(), expected[0], rtol=2e-3, atol=1e-3)


def test_stock_webdataset_reads_every_sample(sd_shards):
    urls = [str(path) for path in sorted(sd_shards.glob("[0-9]*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    ours = ShardSet(sd_shards)
    places = [(shard, row) for shard, count in enumerate(ours.counts) for row in range(count)]
    assert len(samples) == len(places) == 20
    for sample, place in zip(samples, places, strict=True):
        assert torch.equal(safetensors.torch.load(sample["safetensors"])["latents"], ours.read(*place)["latents"])


def test_same_bytes_again_and_after_a_stop(sd_shards, sd_model, parquet, tmp_path):
    whole = contents(sd_shards)
    part = tmp_path / "part"
    shutil.copytree(sd_shards, part)
    for name in ("manifest.json", "errors.jsonl", "00003.json", "00002.tar", "prompts-00000.json"):
        (part / name).unlink()  # as a kill in the third shard leaves it, and worse
    (part / ".00003.tar.host-1.partial").write_bytes(b"half")
    kept = (part / "00001.tar").stat().st_mtime_ns
    shard(parquet, sd_model, part)
    assert contents(part) == whole
    assert (part / "00001.tar").stat().st_mtime_ns == kept, "a whole shard is not made again"


def test_other_settings_on_the_same_folder_are_refused(sd_shards, sd_model, parquet, tmp_path):
    shutil.copytree(sd_shards, tmp_path / "copy")
    with pytest.raises(UserError, match="pairs_per_shard 6, now 5"):
        shard(parquet, sd_model, tmp_path / "copy", pairs_per_shard=5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        shard(parquet, sd_model, tmp_path / "other")


def picture(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(data, "PNG")
    return data.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes whose header speaks of 13,000 x 13,000 pixels: below PIL's own limit."""
    header = struct.pack(">IIBBBBB", 13000, 13000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def test_every_row_is_kept_or_counted(sd_model, parquet, tmp_path):
    broken = rewritten(parquet, tmp_path / "broken.parquet", jpg_0=(3, b"\xff\xd8not a jpeg"), jpg_1=(9, None), label_0=(5, 0.5))
    broken = rewritten(broken, tmp_path / "broken.parquet", label_0=(6, None), jpg_0=(2, bomb()), jpg_1=(11, picture(3, 200)))
    folder = shard(broken, sd_model, tmp_path / "shards")
    manifest = ShardSet(folder).manifest
    assert manifest["rows"] == {
        **{"decided": 18, "missing image": 1, "no label": 1, "tie": 1},
        **{"undecodable image": 1, "decompression bomb": 1, "too small image": 1},
    }
    assert manifest["samples"] == 14
    errors = [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]
    assert [error["source"] for error in errors] == [f"broken.parquet:{row}" for row in (2, 3, 5, 6, 9, 11)]
    reasons = ["decompression bomb", "undecodable image", "tie", "no label", "missing image", "too small image"]
    assert [error["reason"].partition(":")[0] for error in errors] == reasons


def test_winner_first_whatever_the_label(parquet, tmp_path):
    source = find_pairs([str(parquet)])
    survey = source.survey()
    captions = [survey.captions[number] for number in survey.caption_of]
    pairs = list(source.read(survey.rows))
    assert survey.counts == {"decided": len(pairs)}
    rows = pq.read_table(parquet).to_pylist()
    assert {row["label_0"] for row in rows} == {0.0, 1.0}
    for row, pair, caption in zip(rows, pairs, captions, strict=True):
        assert pair.caption == caption == row["caption"]
        assert (pair.winner, pair.loser) == ((row["jpg_0"], row["jpg_1"]) if row["label_0"] == 1 else (row["jpg_1"], row["jpg_0"]))


def test_prepare_image_crops_the_centre():
    wide = np.zeros((32, 64, 3), dtype=np.uint8)
    wide[:, 16:48] = 255  # exactly the centre square
    data = io.BytesIO()
    Image.fromarray(wide).save(data, "PNG")
    prepared = prepare_image(data.getvalue(), 32)
    assert prepared.pixels.shape == (3, 32, 32)
    assert prepared.pixels.min() == 1.0
    assert (prepared.original_size, prepared.crop) == ((32, 64), (0, 16))


def _dataset(folder: Path, **draws) -> PairDataset:
    shards = ShardSet(folder)
    return PairDataset(shards, Order(shards.counts, 0, 2), PairRng(0, torch.ones(1000), **draws))


def test_workers_outlive_the_signals_that_stop_a_run(tmp_path):
    """Launchers send them to whole process groups: a worker that died of one would break the step that is to be saved."""
    shards = ShardSet(write_tiny(tmp_path / "shards"))
    dataset = PairDataset(shards, Order(shards.counts, 0, 1), PairRng(0, torch.ones(10)))
    batches = micro_batches(dataset, RankSlices(4, 4, 0, 1, 0, 40), 2, pin_memory=False)
    others = psutil.Process().children()
    first = [next(batches), next(batches)]  # one of each worker: both are up
    workers = [child for child in psutil.Process().children() if child not in others]
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for worker in workers:
            worker.send_signal(number)
    assert len([*first, *batches]) == 40


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_batches_do_not_depend_on_workers_ranks_or_micro_batches(family, request):
    dataset = _dataset(request.getfixturevalue(f"{family}_shards"), caption_dropout=0.3)
    expected = {}
    for world, micro, workers in ((1, 8, 0), (1, 2, 2), (2, 2, 1)):
        found: dict[int, dict] = {}
        for rank in range(world):
            for batch in micro_batches(dataset, RankSlices(8, micro, rank, world, 0, 4), workers, pin_memory=False):
                assert len(batch["latents"]) == 2 * micro
                for i, position in enumerate(batch["positions"].tolist()):
                    halves = {key: (value[i], value[i + micro]) for key, value in batch.items() if len(value) == 2 * micro}
                    found[position] = halves | {key: (value[i],) for key, value in batch.items() if len(value) == micro}
        assert sorted(found) == list(range(32))  # over the end of the epoch of 20
        expected = expected or found
        for position, tensors in expected.items():
            for key, parts in tensors.items():
                assert all(torch.equal(a, b) for a, b in zip(parts, found[position][key], strict=True)), (position, key)


def damage(folder: Path, change, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def alter(path: Path, old: bytes, new: bytes) -> None:
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))


def test_truncated_tar(sd_shards, tmp_path):
    copy = damage(sd_shards, lambda f: (f / "00001.tar").write_bytes((f / "00001.tar").read_bytes()[:5000]), tmp_path)
    with pytest.raises(UserError, match=r"00001\.tar has 5000 bytes, manifest\.json says"):
        ShardSet(copy)


def test_flipped_bit(sd_shards, tmp_path):
    def flip(folder):
        data = bytearray((folder / "00002.tar").read_bytes())
        member = json.loads((folder / "00002.json").read_bytes())["members"][4]
        data[member[1] + member[2] - 7] ^= 1
        (folder / "00002.tar").write_bytes(data)

    shards = ShardSet(damage(sd_shards, flip, tmp_path))
    shards.read(2, 3)
    with pytest.raises(UserError, match=r"00002\.tar, sample 000000016: checksum"):
        shards.read(2, 4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
        (lambda f: (f / "manifest.json").write_text('{"format": "wids"}'), "format is 'wids'"),
        (lambda f: (f / "00000.tar").unlink(), r"00000\.tar is missing"),
        (lambda f: (f / "prompts-00000.tar").unlink(), r"prompts-00000\.tar is missing"),
        (lambda f: (f / "00002.json").unlink(), r"00002\.json is missing"),
        (lambda f: (f / "00002.json").write_text("{}"), r"00002\.json has 2 bytes, manifest\.json says"),
        (lambda f: alter(f / "manifest.json", b'"mean"', b'"meam"'), "was changed or damaged"),
    ],
)
def test_incomplete_folder(sd_shards, tmp_path, change, named):
    with pytest.raises(UserError, match=named):
        ShardSet(damage(sd_shards, change, tmp_path))


def test_index_of_another_run(sd_shards, tmp_path):
    copy = damage(sd_shards, lambda f: shutil.copy(f / "00001.json", f / "00000.json"), tmp_path)
    with pytest.raises(UserError, match=r"00000\.json: does not belong"):
        ShardSet(copy, check_sizes=False).read(0, 0)


def test_parquet_problems(parquet, tmp_path):
    without = rewritten(parquet, tmp_path / "without.parquet", jpg_0=None)
    with pytest.raises(UserError, match="no column jpg_0"):
        find_pairs([str(without)])
    with pytest.raises(UserError, match="no file matches"):
        find_pairs([str(tmp_path / "*.parquets")])
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(UserError, match="not readable as parquet"):
        find_pairs([str(tmp_path / "text.parquet")])
