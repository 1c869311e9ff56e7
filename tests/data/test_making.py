"""Making shards: many ranks, kills, every input, every option; the bytes are the same whoever makes them."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dde_ds import UserError
from dde_ds.data.inputs import find_pairs
from dde_ds.data.make import EncodingConfig, make_shards
from dde_ds.data.shards import ShardSet
from dde_ds.data.verify import verify
from dde_ds.models.encode import Encoder, prepare_image
from tests.conftest import ROOT
from tests.support.bases import copied, scaled
from tests.support.launching import LAUNCHER, PATIENCE, environment, free_port


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def encoder(sd_model):
    return Encoder(str(sd_model))


@pytest.fixture(scope="module")
def grouped(parquet, tmp_path_factory) -> list[str]:
    """Two files of ten rows in row groups of three; two rows of each are ties."""
    folder = tmp_path_factory.mktemp("grouped")
    table = pq.read_table(parquet)
    labels = [0.5 if row in (1, 4, 12, 19) else label for row, label in enumerate(table["label_0"].to_pylist())]
    table = table.set_column(table.schema.get_field_index("label_0"), "label_0", pa.array(labels))
    for number in range(2):
        pq.write_table(table.slice(10 * number, 10), folder / f"part-{number}.parquet", row_group_size=3)
    return [str(folder / "part-*.parquet")]


def make(source, output: Path, encoder, rank: int = 0, world: int = 1, **options):
    return make_shards(
        source,
        output,
        encoder,
        EncodingConfig(**{"model": "sd", "resolution": 16, "pairs_per_shard": 3, "batch": 2, **options}),
        rank,
        world,
    )


def in_a_process(*arguments, **options) -> int:
    process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(1)
        make(*arguments, **options)
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_ranks_give_the_bytes_of_one(grouped, encoder, tmp_path):
    source = find_pairs(grouped)
    manifest = make(source, tmp_path / "one", encoder)
    assert manifest["samples"] == 16
    assert [row["samples"] for row in manifest["shards"]] == [3, 3, 3, 3, 3, 1]
    whole = contents(tmp_path / "one")
    # One after another: all but the last find that the others are not done.
    for world in (2, 3, 8):
        output = tmp_path / f"{world}"
        found = [make(find_pairs(grouped), output, encoder, rank, world) for rank in range(world)]
        assert found[:-1] == [None] * (world - 1)
        assert contents(output) == whole
    # At once, in processes, with no word between them.
    processes = [in_a_process(source, tmp_path / "forked", encoder, rank, 3) for rank in range(3)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0, 0]
    assert contents(tmp_path / "forked") == whole
    errors = [json.loads(line) for line in (tmp_path / "one" / "errors.jsonl").read_text().splitlines()]
    assert [(error["source"], error["reason"]) for error in errors] == [
        *(("part-0.parquet:1", "tie"), ("part-0.parquet:4", "tie")),
        *(("part-1.parquet:2", "tie"), ("part-1.parquet:9", "tie")),
    ]


def test_killed_anywhere_and_started_again(grouped, encoder, tmp_path):
    """SIGKILL after random times, two ranks at once, until they come to their end."""
    source = find_pairs(grouped)
    make(source, tmp_path / "unbroken", encoder)
    whole = contents(tmp_path / "unbroken")
    rng, kills = random.Random(0), 0
    for attempt in range(2):
        output = tmp_path / f"{attempt}"
        allowed = 0.01  # seconds, in which nothing can be done
        while True:
            processes = [in_a_process(source, output, encoder, rank, 2) for rank in range(2)]
            time.sleep(allowed * rng.random())
            for process in processes:
                os.kill(process, signal.SIGKILL)
            ends = [os.waitpid(process, 0)[1] for process in processes]
            kills += ends.count(signal.SIGKILL)
            if (output / "manifest.json").exists():
                break
            allowed *= 1.2
        assert make(source, output, encoder) is not None
        assert {name: data for name, data in contents(output).items() if not name.endswith(".partial")} == whole
    assert kills >= 4


def test_the_folder_is_not_listed_for_each_shard(grouped, encoder, tmp_path):
    """Sixteen shards take as many listings as four: with one for each, a million pairs would be quadratic."""
    listings, output = Counter(), tmp_path / "out"

    def count(event: str, arguments: tuple) -> None:
        if event in ("os.listdir", "os.scandir") and str(arguments[0]) == str(output):
            listings[event] += 1

    counting.append(count)
    found = []
    for size in (4, 1):
        make(find_pairs(grouped), output, encoder, pairs_per_shard=size)
        assert len(list(output.glob("0*.tar"))) == 16 // size
        shutil.rmtree(output)
        found.append(listings.total())
        listings.clear()
    counting.clear()
    assert 1 <= found[0] == found[1] < 9


counting: list = []
# It cannot be taken back.
sys.addaudithook(lambda event, arguments: [count(event, arguments) for count in counting] and None)


def test_what_killed_processes_left_goes(grouped, encoder, tmp_path):
    """Delete only partial files of this rank's shards, because other ranks may be at work."""
    output = tmp_path / "out"
    make(find_pairs(grouped), output, encoder)
    for name in (".00001.tar.host-1.partial", ".00000.json.host-1.partial", ".00005.tar.host-2.partial"):
        (output / name).write_bytes(b"half")
    make(find_pairs(grouped), output, encoder, 0, 2)
    assert [path.name for path in output.glob(".*")] == [".00005.tar.host-2.partial"]


def test_a_damaged_index_is_made_again(grouped, encoder, tmp_path):
    """Whatever a digit or a letter of it became, a second run gives the bytes of the first."""
    whole, rng = tmp_path / "out", random.Random(0)
    source = find_pairs(grouped)
    make(source, whole, encoder)
    expected = contents(whole)
    for name in ("00003.json", "prompts-00000.json"):
        data = expected[name]
        fields = [
            data.index(b'"%s": ' % field) + len(field) + 4 for field in (b"settings", b"errors", b"members", b"digests", b"samples")
        ]
        for at in [*fields, *(rng.randrange(len(data)) for _ in range(5))]:
            (whole / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert make(source, whole, encoder) is not None
            assert contents(whole) == expected, f"{name}, byte {at}"


def test_settings_that_are_no_json(grouped, encoder, tmp_path):
    output = tmp_path / "out"
    make(find_pairs(grouped), output, encoder)
    settings = json.loads((output / "settings.json").read_bytes())
    for damaged in ("[" * 100_000, "[]", '{"model": "\\ud800"}'):
        (output / "settings.json").write_text(damaged)
        with pytest.raises(UserError, match=r"its settings\.json is damaged"):
            make(find_pairs(grouped), output, encoder)
    del settings["format"]
    (output / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"begun with other settings \(format None, now 'dde_ds shards 3'\)"):
        make(find_pairs(grouped), output, encoder)


def test_a_model_may_lie_elsewhere_in_a_second_run(grouped, encoder, sd_model, tmp_path):
    """It is known by its weights: the folder keeps the name that it was begun with, and what is made again has the same bytes."""
    output = tmp_path / "out"
    make(find_pairs(grouped), output, encoder)
    first = contents(output)
    for name in ("00001.tar", "00001.json", "manifest.json"):
        (output / name).unlink()
    moved = copied(sd_model, tmp_path / "moved")
    assert make(find_pairs(grouped), output, Encoder(str(moved)), model=str(moved))["settings"]["model"] == "sd"
    assert contents(output) == first
    other = Encoder(str(scaled(moved, "vae")))
    with pytest.raises(UserError, match=r"begun with other settings \(weights '"):
        make(find_pairs(grouped), output, other)


def test_a_rank_reads_no_row_group_of_another(grouped, monkeypatch):
    source = find_pairs(grouped)
    read, original = [], pq.ParquetFile.iter_batches

    def counting(self, *arguments, row_groups=None, **options):
        read.append(row_groups)
        return original(self, *arguments, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    rows = source.survey().rows
    assert read == [None, None]  # labels and captions of both files
    read.clear()
    assert [pair.row for pair in source.read(rows[3:6])] == rows[3:6].tolist() == [5, 6, 7]
    assert read == [[1], [2]]


def test_other_settings_or_files_are_refused(grouped, encoder, tmp_path):
    make(find_pairs(grouped), tmp_path / "out", encoder)
    for options, named in (
        ({"pairs_per_shard": 4}, "pairs_per_shard 3, now 4"),
        ({"latents": "sample"}, "latents 'mean', now 'sample'"),
        ({"flip": True}, "flip False, now True"),
        ({"min_side": 9}, "min_side 4, now 9"),
    ):
        with pytest.raises(UserError, match=named):
            make(find_pairs(grouped), tmp_path / "out", encoder, **options)
    with pytest.raises(UserError, match=r"input .*part-1"):
        make(find_pairs([grouped[0].replace("*", "0")]), tmp_path / "out", encoder)
    # Fewer pairs at a time are the same shards.
    assert make(find_pairs(grouped), tmp_path / "out", encoder, batch=1) is not None


def test_what_is_stored_of_the_posterior(grouped, encoder, tmp_path):
    source = find_pairs(grouped)
    sets = {}
    for name in ("mean", "sample", "mean+logvar"):
        make(source, tmp_path / name, encoder, latents=name, flip=True)
        sets[name] = ShardSet(tmp_path / name)
        assert verify(tmp_path / name) == []
    (pair,) = source.read(source.survey().rows[4:5])
    pixels = torch.stack([prepare_image(data, 16).pixels for data in (pair.winner, pair.loser)])
    with torch.no_grad():
        expected = encoder.pipeline.vae.encode(pixels).latent_dist
        mirrored = encoder.pipeline.vae.encode(pixels.flip(-1)).latent_dist.mean
    scale = encoder.scaling_factor
    mean, sample, both = (sets[name].read(1, 1) for name in sets)
    torch.testing.assert_close(mean["latents"].float(), expected.mean * scale, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(mean["latents_flipped"].float(), mirrored * scale, rtol=2e-3, atol=1e-3)
    assert torch.equal(mean["latents"], both["latents"])
    torch.testing.assert_close((0.5 * both["logvar"].float()).exp(), expected.std * scale, rtol=2e-2, atol=1e-3)
    draws = torch.cat(
        [
            (
                (sets["sample"].read(s, r)["latents"] - sets["mean"].read(s, r)["latents"]).float()
                / (0.5 * sets["mean+logvar"].read(s, r)["logvar"].float()).exp()
            ).flatten()
            for s, count in enumerate(sets["mean"].counts)
            for r in range(count)
        ]
    )
    assert draws.mean().abs() < 5 / len(draws) ** 0.5
    assert draws.std().item() == pytest.approx(1, abs=5 / (2 * len(draws)) ** 0.5 + 0.01)
    assert sample["latents"].dtype == torch.float16


def test_empty_prompt_follows_the_pipeline(sdxl_shards, sd_shards):
    sdxl, sd = ShardSet(sdxl_shards), ShardSet(sd_shards)
    assert sdxl.manifest["settings"]["empty_prompt"] == "zeros"
    assert all(not value.any() for value in sdxl.prompt(0).values())
    assert sd.manifest["settings"]["empty_prompt"] == "encoded"
    assert sd.prompt(0)["prompt_embeds"].any()


def test_pairs_of_ones_own(grouped, encoder, tmp_path):
    """pairs.jsonl and images give the latents that the same images give from parquet."""
    pairs = list(find_pairs(grouped).read(find_pairs(grouped).survey().rows))
    lines = []
    for number, pair in enumerate(pairs):
        for role, data in (("w", pair.winner), ("l", pair.loser)):
            (tmp_path / f"{number}{role}.jpg").write_bytes(data)
        lines.append({"winner": f"{number}w.jpg", "loser": f"{number}l.jpg", "caption": pair.caption})
    (tmp_path / "5l.jpg").unlink()
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make(find_pairs([str(tmp_path)]), tmp_path / "own", encoder)
    make(find_pairs(grouped), tmp_path / "parquet", encoder)
    own, parquet = ShardSet(tmp_path / "own"), ShardSet(tmp_path / "parquet")
    assert own.manifest["rows"] == {"decided": 16, "missing image": 1}
    assert own.counts == [3, 2, 3, 3, 3, 1]
    assert torch.equal(own.read(3, 1)["latents"], parquet.read(3, 1)["latents"])
    assert own.describe(3, 1)["winner"] == "10w.jpg"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 2: expected"),
        ('{"winner": "a.png", "loser": "b.png"}', "line 2: expected"),
        ('{"winner": 1, "loser": "b.png", "caption": ""}', "line 2: expected"),
        (
            '{"winner": "a.png", "loser": "../../etc/passwd", "caption": ""}',
            "lies outside of the folder of pairs.jsonl; name the folder that paths may point into as root",
        ),
        (
            '{"winner": "/etc/passwd", "loser": "b.png", "caption": ""}',
            "lies outside of the folder of pairs.jsonl; name the folder that paths may point into as root",
        ),
        ('{"winner": "a.png", "loser": "b.png", "caption": "\\udc80"}', r"line 2: expected .*half a surrogate pair: '\\udc80'"),
        ('{"winner": "a.png", "loser": "b.png", "caption": "a", "label": 0}', "line 2: label 0 prefers the loser; swap"),
        ('{"winner": "a.png", "loser": "b.png", "caption": "a", "label": []}', r"line 2: label is \[\], expected 1"),
        ('{"winner": "a.png", "loser": "b.png", "caption": "a", "tie": 1}', "line 2: tie is 1, expected true or false"),
    ],
)
def test_pairs_that_are_none(tmp_path, line, named):
    (tmp_path / "pairs.jsonl").write_text('{"winner": "a.png", "loser": "b.png", "caption": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=named):
        find_pairs([str(tmp_path / "pairs.jsonl")])


def test_a_folder_that_datasets_saved(grouped, encoder, tmp_path):
    datasets = pytest.importorskip("datasets")
    tables = pa.concat_tables([pq.read_table(path) for path in sorted(Path(grouped[0]).parent.iterdir())])
    datasets.DatasetDict({"train": datasets.Dataset(tables)}).save_to_disk(tmp_path / "saved")
    source = find_pairs([str(tmp_path / "saved")])
    make(source, tmp_path / "own", encoder)
    make(find_pairs(grouped), tmp_path / "parquet", encoder)
    names = [f"{number:05d}.tar" for number in range(6)]
    own, parquet = ShardSet(tmp_path / "own"), ShardSet(tmp_path / "parquet")
    for number in range(len(names)):
        assert torch.equal(own.read(number, 0)["latents"], parquet.read(number, 0)["latents"])
    with pytest.raises(UserError, match=r"split validation: .*saved has train"):
        find_pairs([str(tmp_path / "saved")], "validation")
    with pytest.raises(UserError, match="no file, and no data set to be had"):
        find_pairs(["nobody/nothing"])


def test_damaged_parquet_is_one_line(grouped, encoder, tmp_path):
    """Bytes of a column chunk, not of the footer: met while shards are being made. The whole file's start over gives the same bytes."""
    path = Path(grouped[0].replace("*", "0"))
    copy = tmp_path / "part-0.parquet"
    metadata = pq.ParquetFile(path).metadata
    last = metadata.row_group(metadata.num_row_groups - 1)
    column = next(last.column(i) for i in range(last.num_columns) if last.column(i).path_in_schema == "jpg_0")
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = bytes(40)
    copy.write_bytes(data)
    with pytest.raises(UserError, match=r"part-0\.parquet: not readable as parquet: .*a second run goes on"):
        make(find_pairs([str(copy)]), tmp_path / "out", encoder)
    assert (tmp_path / "out" / "00000.json").exists()
    shutil.copy(path, copy)
    assert make(find_pairs([str(copy)]), tmp_path / "out", encoder) is not None
    make(find_pairs([str(path)]), tmp_path / "whole", encoder)
    assert {n: d for n, d in contents(tmp_path / "out").items() if not n.endswith(".partial")} == contents(tmp_path / "whole")


def images() -> list[bytes]:
    import io

    from PIL import Image

    rng = np.random.default_rng(0)
    found = []
    for kind in ("JPEG", "PNG", "WEBP"):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8)).save(data, kind)
        found.append(data.getvalue())
    return found


def test_damaged_images_have_a_reason():
    """Whatever a decoder makes of two thousand damaged images: pixels, or one of four reasons."""
    rng, reasons = random.Random(0), set()
    for _ in range(2000):
        data = bytearray(rng.choice(images_cache))
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        try:
            assert prepare_image(bytes(data), 16, 4).pixels.shape == (3, 16, 16)
        except ValueError as error:
            assert "\n" not in str(error)
            assert " at 0x" not in str(error)
            reasons.add(str(error).partition(":")[0])
    assert reasons <= {"undecodable image", "too small image", "decompression bomb"}
    assert "undecodable image" in reasons


images_cache = images()


def test_no_program_is_run_for_an_image(tmp_path):
    postscript = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({tmp_path}/executed) (w) file closefile showpage\n".encode()
    with pytest.raises(ValueError, match="undecodable image"):
        prepare_image(postscript, 16)
    assert not list(tmp_path.iterdir())


# The command lines


@pytest.fixture
def tool(monkeypatch, capsys):
    """A script of ``tools/`` in this process: what it printed, and its exit code."""

    def run(name: str, *arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"tools/{name}", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err

    return run


@pytest.mark.slow
def test_many_ranks_dry_run_verify_and_inspect(grouped, sd_model, tmp_path, tool):
    output = tmp_path / "shards"
    options = ["--input", *grouped, "--model", sd_model, "--output", output, "--pairs-per-shard", "3", "--batch", "2"]
    code, dry = tool("shard_pickapic.py", *options, "--dry-run", "--resolution", "72")
    assert code == 0, dry
    assert not output.exists()
    assert "a run would encode 16 pairs into 6 shards" in dry
    assert "of 32 images looked at, 100.0% are smaller than 72 pixels" in dry
    launched = subprocess.run(
        [LAUNCHER, "--num_gpus", "2", "--master_port", str(free_port()), "launchers/encode.py", *map(str, options)],
        **{"cwd": ROOT, "env": environment(), "capture_output": True, "text": True, "timeout": PATIENCE},
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert "16 pairs in 6 shards" in launched.stdout
    code, checked = tool("verify_shards.py", output)
    assert code == 0, checked
    assert "6 shards and 1 prompts files are whole" in checked
    code, inspected = tool("inspect_shards.py", output, "--model", sd_model, "--sheet", tmp_path / "sheet.html", "--pairs", "3")
    assert code == 0, inspected
    sheet = (tmp_path / "sheet.html").read_text()
    assert sheet.count("data:image/png;base64,") == 6
    caption = ShardSet(output).describe(0, 0)["caption"]
    assert caption in sheet
    (output / "00002.tar").write_bytes(b"")
    code, broken = tool("verify_shards.py", output, "--quick")
    assert code == 1
    assert "00002.tar" in broken
    assert "rm" in broken
