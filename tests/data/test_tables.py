"""Tables of any columns and kind: presets, votes, rankings, archives, and every row kept or counted."""

from __future__ import annotations

import csv
import json
import shlex
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch

from dde_ds import UserError
from dde_ds.cli.inspect_shards import summary
from dde_ds.cli.parsing import Parser
from dde_ds.cli.shard import _recipe, add_commands, input_pairs
from dde_ds.cli.verify_shards import remake
from dde_ds.data.columns import PRESETS
from dde_ds.data.inputs import TableOptions, find_pairs
from dde_ds.data.make import EncodingConfig, make_shards
from dde_ds.data.mixture import MixedShards, open_sources, order_of
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset
from dde_ds.data.shards import ShardSet
from dde_ds.data.storage import DamagedData
from dde_ds.data.tables import json_records, open_tables
from dde_ds.data.verify import verify
from dde_ds.models.encode import Encoder
from dde_ds.training.batches import Batch
from tests.support.tiny import write_tiny


@pytest.fixture(scope="module")
def encoder(sd_model):
    return Encoder(str(sd_model))


@pytest.fixture(scope="module")
def images(parquet) -> list[bytes]:
    rows = pq.read_table(parquet).slice(0, 6).to_pylist()
    return [row[name] for row in rows for name in ("jpg_0", "jpg_1")]


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory) -> Path:
    """``images/0.jpg`` … ``images/11.jpg``."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "images").mkdir()
    for number, image in enumerate(images):
        (folder / "images" / f"{number}.jpg").write_bytes(image)
    return folder


def make(source, output: Path, encoder, rank: int = 0, world: int = 1, **options):
    recipe = EncodingConfig("sd", **{"resolution": 16, "pairs_per_shard": 2, "batch": 2, **options})
    return make_shards(source, output, encoder, recipe, rank, world)


def open_with(path: Path | str, *columns: str, root=None, **options):
    return find_pairs([str(path)], root=root, table=TableOptions(columns, **options))


def pairs_of(source, images: list[bytes]) -> list[tuple[str, int, int]]:
    """(caption, number of the winner's picture, of the loser's) of every decided pair."""
    found = source.read(source.survey().rows)
    return [(pair.caption, images.index(pair.winner), images.index(pair.loser)) for pair in found]


def record(image: bytes, name: str = "a.jpg") -> dict:
    return {"bytes": image, "path": name}


def written(path: Path, rows: list[dict]) -> Path:
    """The same rows in the kind of file that the name ends in."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(
                {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
            )
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(pa.Table.from_pylist(rows), path, chunksize=2)
    elif path.suffix == ".arrow":  # a stream, as `datasets` keeps them
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


# A small file in each public schema: preset, kind of file, rows by the pictures' bytes, and (caption, winner, loser) of its pairs.


def pickapic(images):
    return [
        {"caption": "kite", "jpg_0": images[0], "jpg_1": images[1], "label_0": 1.0, "best_image_uid": "u"},
        {"caption": "boat", "jpg_0": images[2], "jpg_1": images[3], "label_0": 0.0, "best_image_uid": "v"},
        {"caption": "door", "jpg_0": images[4], "jpg_1": images[5], "label_0": 0.5, "best_image_uid": None},
    ]


def hpdv2_train(images):
    return [
        {"human_preference": [0, 1], "prompt": "kite", "file_path": ["images/0.jpg", "images/1.jpg"]},
        {"human_preference": [1, 0], "prompt": "boat", "file_path": ["images/2.jpg", "images/3.jpg"]},
    ]


def hpdv2_test(images):
    paths = [f"images/{number}.jpg" for number in range(3)]
    raw = [{"rank": [1, 2, 3], "user_hash": "x"}]
    return [{"prompt": "kite", "image_path": paths, "rank": [2, 1, 3], "raw_annotations": raw}]


def hpdv2_loaded(images):
    return [{"prompt": "kite", "image": [record(image) for image in images[:3]], "rank": [2, 1, 3], "human_preference": None}]


def hpdv3(images):
    more = {"confidence": 0.98, "choice_dist": [12, 7], "model1": "a", "model2": "b"}
    return [{"prompt": "kite", "path1": "images/1.jpg", "path2": "images/0.jpg", **more}]


def imagereward(images):
    more = {"classification": "People", "image_amount_in_total": 3, "overall_rating": 4}
    ranks = [("000864-0061", 0, 2), ("000864-0061", 1, 1), ("000864-0061", 2, 3), ("7", 4, 1), ("7", 5, 1)]
    return [
        {"image_path": f"images/{n}.jpg", "prompt_id": key, "prompt": f"text {key}", "rank": rank, **more} for key, n, rank in ranks
    ]


def rapidata(images):
    models = {"model1": "a", "model2": "b"}
    return [
        {
            "prompt": "kite",
            "image1": record(images[0]),
            "image2": record(images[1]),
            "votes_image1": 3,
            "votes_image2": 9,
            **models,
        },
        {
            "prompt": "boat",
            "image1": record(images[2]),
            "image2": record(images[3]),
            "votes_image1": 8,
            "votes_image2": 2,
            **models,
        },
    ]


def rapidata_weighted(images):
    names = {"votes_image1": "weighted_results_image1_preference", "votes_image2": "weighted_results_image2_preference"}
    return [{names.get(key, key): value for key, value in row.items()} for row in rapidata(images)]


def chosen(images):
    return [{"prompt": "kite", "chosen": record(images[1]), "rejected": record(images[0]), "model_chosen": "a"}]


def conversation(images):
    ask = [{"role": "user", "content": "kite"}]
    return [{"prompt": ask, "chosen": [record(images[1])], "rejected": [record(images[0])]}]


ORDERED = [("kite", 1, 0), ("kite", 1, 2), ("kite", 0, 2)]
SCHEMAS = [
    ("pickapic", pickapic, "parquet", [("kite", 0, 1), ("boat", 3, 2)]),
    ("hpdv2", hpdv2_train, "json", [("kite", 1, 0), ("boat", 2, 3)]),
    ("hpdv2", hpdv2_test, "json", ORDERED),
    ("hpdv2", hpdv2_loaded, "parquet", ORDERED),
    ("hpdv3", hpdv3, "json", [("kite", 1, 0)]),
    ("imagereward", imagereward, "json", [(f"text {'000864-0061'}", winner, loser) for _, winner, loser in ORDERED]),
    ("imagereward", imagereward, "parquet", [(f"text {'000864-0061'}", winner, loser) for _, winner, loser in ORDERED]),
    ("rapidata", rapidata, "parquet", [("kite", 1, 0), ("boat", 2, 3)]),
    ("rapidata", rapidata_weighted, "parquet", [("kite", 1, 0), ("boat", 2, 3)]),
    ("open-image-preferences", chosen, "parquet", [("kite", 1, 0)]),
    ("trl", chosen, "parquet", [("kite", 1, 0)]),
    ("trl", conversation, "parquet", [("kite", 1, 0)]),
]


def test_every_preset_has_a_schema():
    assert {name for name, *_ in SCHEMAS} == set(PRESETS)


@pytest.mark.parametrize(
    ("preset", "rows", "kind", "pairs"), SCHEMAS, ids=lambda value: getattr(value, "__name__", str(value))[:24]
)
def test_presets_through_real_sharding(preset, rows, kind, pairs, images, folder, encoder, tmp_path):
    path = written(tmp_path / f"train.{kind}", rows(images))
    source = open_with(path, preset=preset, root=folder)
    assert pairs_of(source, images) == pairs
    manifest = make(source, tmp_path / "out", encoder)
    assert manifest["samples"] == len(pairs) == manifest["rows"]["decided"]
    assert not verify(tmp_path / "out")
    # The latents are those of the same pairs in Pick-a-Pic's columns.
    plain = [{"caption": text, "jpg_0": images[w], "jpg_1": images[loser], "label_0": 1} for text, w, loser in pairs]
    make(find_pairs([str(written(tmp_path / "plain.parquet", plain))]), tmp_path / "plain", encoder)
    ours, theirs = ShardSet(tmp_path / "out"), ShardSet(tmp_path / "plain")
    for number in range(len(pairs)):
        place = divmod(number, 2)
        assert torch.equal(ours.read(*place)["latents"], theirs.read(*place)["latents"])
        assert ours.describe(*place)["caption"] == theirs.describe(*place)["caption"]


KINDS = ["parquet", "feather", "arrow", "csv", "json", "jsonl"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_shards(kind, images, folder, encoder, tmp_path):
    """Rankings as lists too: in CSV they are JSON text."""
    pairs = [
        {"text": "kite", "a": "images/0.jpg", "b": "images/1.jpg", "for_a": 3, "for_b": 1},
        {"text": "boat\nhouse", "a": "images/2.jpg", "b": "images/3.jpg", "for_a": 1, "for_b": 1},
        {"text": 'a "door", open', "a": "images/4.jpg", "b": "images/5.jpg", "for_a": 0, "for_b": 2},
        {"text": "größer 狐", "a": "images/6.jpg", "b": "images/7.jpg", "for_a": 2, "for_b": 3},
        {"text": None, "a": "images/6.jpg", "b": "images/7.jpg", "for_a": 2, "for_b": 3},
    ]
    columns = ("caption=text", "image_0=a", "image_1=b", "votes_0=for_a", "votes_1=for_b")
    source = open_with(written(folder / f"pairs.{kind}", pairs), *columns)
    assert pairs_of(source, images) == [("kite", 0, 1), ('a "door", open', 5, 4), ("größer 狐", 7, 6)]
    manifest = make(source, tmp_path / "out", encoder)
    assert manifest["rows"] == {"decided": 3, "tie": 1, "no caption": 1}
    shards = ShardSet(tmp_path / "out")
    assert [float(shards.read(*place)["soft_label"]) for place in ((0, 0), (0, 1), (1, 0))] == [0.75, 1.0, pytest.approx(0.6)]
    assert shards.describe(1, 0)["source"] == f"pairs.{kind}:3"
    # Any ranks, in any order: rows are found again by their numbers.
    other = open_with(folder / f"pairs.{kind}", *columns)
    assert make(other, tmp_path / "two", encoder, 1, 2) is None
    assert make(open_with(folder / f"pairs.{kind}", *columns), tmp_path / "two", encoder, 0, 2) == manifest
    lists = [{"text": "kite", "all": ["images/0.jpg", "images/1.jpg", "images/2.jpg"], "good": [1, 3, 2]}]
    ranking = open_with(written(folder / f"ranking.{kind}", lists), "caption=text", "images=all", "scores=good")
    assert pairs_of(ranking, images) == [("kite", 1, 2), ("kite", 1, 0), ("kite", 2, 0)]


@pytest.mark.parametrize("kind", KINDS)
def test_another_label_is_another_input(kind, folder):
    """Inputs of the same size with other labels have other identities. So settings and scorers' labels are never used for another input."""
    rows = [{"c": "kite", "w": "a.jpg", "l": "b.jpg", "v": 0.25}, {"c": "boat", "w": "a.jpg", "l": "b.jpg", "v": 0.75}]
    found = []
    for value in (0.25, 0.75, 0.25):
        (table,) = open_tables([str(written(folder / f"id.{kind}", [{**rows[0], "v": value}, rows[1]]))])
        found.append(table.identity)
    assert found[0] == found[2] != found[1]


def test_soft_labels_reach_the_batch_and_the_mixture(images, encoder, tmp_path):
    path = written(tmp_path / "votes.parquet", rapidata(images))
    make(open_with(path, preset="rapidata"), tmp_path / "soft", encoder)
    make(open_with(written(tmp_path / "hard.parquet", chosen(images)), preset="trl"), tmp_path / "hard", encoder)
    soft = ShardSet(tmp_path / "soft")
    assert soft.manifest["settings"]["soft_label"] is True
    assert "soft_label" not in ShardSet(tmp_path / "hard").manifest["settings"]
    draws = PairRng(0, torch.full((10,), 0.1), True, 0.0, False)

    def batch(shards) -> dict:
        dataset = PairDataset(shards, order_of(shards, 0, 4), draws)
        return dataset.collate([dataset.pair(position) for position in range(4)])

    labels = batch(soft)["soft_label"]
    assert labels.dtype == torch.float32 and labels.shape == (4,)
    assert sorted(set(labels.tolist())) == pytest.approx([0.75, 0.8])
    assert "soft_label" not in batch(ShardSet(tmp_path / "hard"))
    moved = Batch(**batch(soft)).to(torch.device("cpu"))
    assert moved.soft_label is not None and torch.equal(moved.soft_label, labels)
    assert "soft: the winner's share of the votes" in map(str, summary(soft.manifest).columns[1].cells)
    mixed = open_sources([(str(tmp_path / "soft"), 1), (str(tmp_path / "hard"), 1)])
    assert isinstance(mixed, MixedShards)
    assert sorted(float(mixed.read(shard, 0)["soft_label"]) for shard in range(2)) == [0.75, 1.0]


@pytest.mark.parametrize("value", [0.25, 1.5])
def test_a_soft_label_out_of_range_is_damage(tmp_path, value, monkeypatch):
    from tests.support import tiny

    made = tiny.pair

    def pair(*arguments):
        sample = made(*arguments)
        sample.tensors["soft_label"] = torch.tensor(value)
        return sample

    monkeypatch.setattr(tiny, "pair", pair)
    shards = ShardSet(write_tiny(tmp_path / "s", soft_label=True))
    with pytest.raises(DamagedData, match=rf"soft_label is {value}, expected 0.5 to 1"):
        shards.read(0, 0)


def test_margin(images, tmp_path):
    votes = [(9, 1), (6, 4), (5, 5), (0, 0), (1, 9)]
    rows = [{"c": "x", "a": images[0], "b": images[1], "v": list(vote)} for vote in votes]
    path = written(tmp_path / "v.parquet", rows)
    columns = ("caption=c", "image_0=a", "image_1=b", "votes=v")
    assert open_with(path, *columns).survey().counts == {"decided": 3, "tie": 1, "no label": 1}
    source = open_with(path, *columns, min_margin=0.3)
    assert source.survey().counts == {"decided": 2, "below the margin": 1, "tie": 1, "no label": 1}
    assert [pair.soft_label for pair in source.read(source.survey().rows)] == pytest.approx([0.9, 0.9])
    shares = written(tmp_path / "p.jsonl", [{"c": "x", "a": "1", "b": "2", "p": p} for p in (0.9, 0.1, 0.5, None)])
    assert open_with(shares, *columns[:3], "preference_0=p").survey().counts == {"decided": 2, "tie": 1, "no label": 1}


def test_rankings_become_the_pairs_that_are_asked_for(images, folder, encoder, tmp_path):
    rows = [{"prompt": "kite", "image_path": [f"images/{n}.jpg" for n in range(4)], "rank": [3, 1, 2, 2]}]
    rows.append({"prompt": "boat", "image_path": ["images/5.jpg"], "rank": [1]})
    path = written(folder / "four.json", rows)
    found = {}
    for pairs in ("all", "adjacent", "best-worst"):
        source = open_with(path, preset="hpdv2", pairs=pairs)
        found[pairs] = pairs_of(source, images), source.survey().noted, dict(source.survey().counts)
    alone = {"one picture alone": 1}
    tie = [("kite", 1, 2), ("kite", 1, 3), ("kite", 1, 0), ("kite", 2, 0), ("kite", 3, 0)]
    assert found["all"] == (tie, {"pairs of rankings": 6}, {"decided": 5, "tie": 1, **alone})
    assert found["adjacent"] == ([("kite", 1, 2), ("kite", 3, 0)], {"pairs of rankings": 3}, {"decided": 2, "tie": 1, **alone})
    assert found["best-worst"] == ([("kite", 1, 0)], {"pairs of rankings": 1}, {"decided": 1, **alone})
    source = open_with(path, preset="hpdv2", pairs="best-worst")
    assert (source.name(0), source.name(1)) == ("four.json:0/1>0", "four.json:1")
    manifest = make(source, tmp_path / "out", encoder)
    assert manifest["noted"]["pairs of rankings"] == 1
    with pytest.raises(UserError, match=r"begun with other settings .reading"):
        make(open_with(path, preset="hpdv2"), tmp_path / "out", encoder)


def test_the_printed_command_reads_the_same_pairs(images, folder, encoder, tmp_path):
    path = written(tmp_path / "v.parquet", rapidata(images))
    settings = make(open_with(path, preset="rapidata", min_margin=0.25), tmp_path / "out", encoder)["settings"]
    parser = Parser()
    add_commands(parser.add_subparsers(parser_class=Parser))
    args = parser.parse_args(shlex.split(remake(settings, tmp_path / "out"))[1:])
    assert args.input == ["v.parquet"]
    args.input = [str(path)]
    assert _recipe(args, args.resolution).settings(encoder, input_pairs(args)) == settings
    evil = {**settings, "reading": {"columns": {"--output": "/elsewhere", "caption": "$(rm x)"}}}
    words = shlex.split(remake(evil, tmp_path / "out"))
    assert "--output=/elsewhere" not in words and "caption=$(rm x)" in words


def test_rows_of_a_ranking_are_together(images, folder, tmp_path):
    def row(key, number, rank, text=None):
        return {"id": key, "text": text or f"t{key}", "file": f"images/{number}.jpg", "rank": rank}

    columns = ("caption=text", "image=file", "rank=rank", "group=id")
    rows = [row(1, 3, 9), row(1, 0, 2), row(1, 5, 1), row(2, 1, "x"), row(2, 2, 1), row(2, 4, 0.5), row(2, 6, 3, "other")]
    source = open_with(written(folder / "rows.csv", rows), *columns)
    assert pairs_of(source, images) == [("t1", 5, 0), ("t1", 5, 3), ("t1", 0, 3), ("t2", 4, 2)]
    assert source.survey().counts == {"decided": 4, "rank out of range": 1, "caption differs in its group": 1}
    assert [source.name(row) for row in source.survey().rows] == ["rows.csv:2>1", "rows.csv:2>0", "rows.csv:1>0", "rows.csv:5>4"]
    apart = open_with(written(folder / "apart.csv", [*rows[:4], row(1, 7, 4)]), *columns)
    with pytest.raises(UserError, match=r"the pictures of id '1' are not together; sort the table by id"):
        apart.survey()


def test_what_is_out_of_range_is_counted_with_its_row(images, folder, encoder, tmp_path):
    labels = [1, "7", -1, [1], "tie", None, "0"]
    rows = [{"c": "x", "a": "images/0.jpg", "b": "images/1.jpg", "l": label} for label in labels]
    rows += [{**rows[0], "c": 5}, {**rows[0], "a": "images/none.jpg"}, {**rows[0], "b": "bad.jpg"}, {**rows[0], "a": None}]
    (folder / "bad.jpg").write_bytes(b"no picture")
    source = open_with(written(folder / "odd.jsonl", rows), "caption=c", "image_0=a", "image_1=b", "label_0=l")
    manifest = make(source, tmp_path / "out", encoder)
    assert manifest["rows"] == {
        **{"decided": 5, "label out of range": 3, "tie": 1, "no label": 1, "caption is no text": 1},
        **{"missing image": 2, "undecodable image": 1},
    }
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [(error["source"], error["reason"].partition(":")[0]) for error in errors] == [
        *[(f"odd.jsonl:{row}", "label out of range") for row in (1, 2, 3)],
        *[("odd.jsonl:4", "tie"), ("odd.jsonl:5", "no label"), ("odd.jsonl:7", "caption is no text")],
        *[("odd.jsonl:8", "missing image"), ("odd.jsonl:9", "undecodable image"), ("odd.jsonl:10", "missing image")],
    ]
    votes = [(1, -1), (float("nan"), 2), ("many", 2), (None, 2), (3, 1)]
    rows = [{"c": "x", "w": "a", "l": "b", "v0": a, "v1": b} for a, b in [*votes, (1, 3)]]
    columns = ("caption=c", "winner=w", "loser=l", "votes_0=v0", "votes_1=v1")
    counts = open_with(written(folder / "votes.jsonl", rows), *columns).survey().counts
    assert counts == {"decided": 1, "vote out of range": 4, "votes against the winner": 1}
    ranks = [[1, 2], [1, float("inf")], [1], [], "[2, 1]", "[2"]
    rows = [{"c": "x", "i": ["a", "b"], "r": rank} for rank in ranks]
    counts = open_with(written(folder / "ranks.jsonl", rows), "caption=c", "images=i", "ranks=r").survey().counts
    assert counts == {"decided": 2, "rank out of range": 2, "not as many ranks as pictures": 1, "no ranks": 1}


def test_columns_of_every_storage(images, tmp_path):
    """Dictionaries, views, truth values, decimals and text."""
    captions = pa.array(["kite", "boat", "kite"])
    labels = [pa.array([True, False, True]), pa.array(["1", "0", "true"]).dictionary_encode(), pa.array([1, 0, 1], pa.int8())]
    kinds = [captions.dictionary_encode(), captions.cast(pa.large_string())]
    kinds += [captions.cast(pa.string_view())] if hasattr(pa, "string_view") else []
    for number, (caption, label) in enumerate(zip([*kinds, captions][:3], labels, strict=True)):
        table = pa.table({"c": caption, "a": images[0:6:2], "b": pa.array(images[1:6:2], pa.large_binary()), "l": label})
        pq.write_table(table, tmp_path / f"{number}.parquet")
        source = open_with(tmp_path / f"{number}.parquet", "caption=c", "image_0=a", "image_1=b", "label_0=l")
        assert pairs_of(source, images) == [("kite", 0, 1), ("boat", 3, 2), ("kite", 4, 5)]


def test_archives_folders_and_urls_in_cells(images, folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(4):
            archive.write(folder / "images" / f"{number}.jpg", f"images/{number}.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder / "images", "images")
    paths = [f"images/{number}.jpg" for number in range(4)]
    urls = [f"https://host.example/bucket/{path}?x=1" for path in paths]
    full = [f"https://host.example/{path}" for path in paths]
    expected = [("x", 0, 1), ("x", 3, 2)]
    for name, cells in {"paths": paths, "full": full, "urls": urls}.items():
        rows = [{"c": "x", "w": cells[0], "l": cells[1]}, {"c": "x", "w": cells[3], "l": cells[2]}]
        table = written(tmp_path / f"{name}.csv", rows)
        roots = [folder / "images"] if name == "urls" else [folder, tmp_path / "a.zip", tmp_path / "a.tar"]
        for root in roots:
            assert pairs_of(open_with(table, "caption=c", "winner=w", "loser=l", root=root), images) == expected
    columns = ("caption=c", "winner=w", "loser=l")
    source = open_with(tmp_path / "full.csv", *columns)
    with pytest.raises(UserError, match=r"its pictures are URLs .*name their folder or archive as root"):
        pairs_of(source, images)
    escaping = written(tmp_path / "e.csv", [{"c": "x", "w": "../../etc/passwd", "l": "images/0.jpg"}])
    with pytest.raises(UserError, match=r"input e\.csv:0: '\.\./\.\./etc/passwd' lies outside of"):
        pairs_of(open_with(escaping, *columns), images)
    (tmp_path / "out.jpg").symlink_to(folder / "images" / "0.jpg")
    (tmp_path / "1.jpg").write_bytes(images[1])
    linked = written(tmp_path / "l.csv", [{"c": "x", "w": "out.jpg", "l": "1.jpg"}])
    with pytest.raises(UserError, match="behind a link that leads out"):
        pairs_of(open_with(linked, *columns), images)
    followed = find_pairs([str(linked)], follow_links=True, table=TableOptions(columns))
    assert pairs_of(followed, images) == [("x", 0, 1)]
    for name, content in (("b.tar", b"no archive"), ("nowhere", None)):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"root .*{name}"):
            open_with(tmp_path / "paths.csv", *columns, root=tmp_path / name)


def test_data_sets_that_datasets_saved(images, tmp_path):
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_list(chosen(images) * 3)
    found.save_to_disk(str(tmp_path / "saved"))
    source = open_with(tmp_path / "saved", preset="open-image-preferences")
    assert pairs_of(source, images) == [("kite", 1, 0)] * 3
    assert source.name(2) == "saved/train:2"


def test_columns_that_cannot_be(images, tmp_path):
    path = written(tmp_path / "p.parquet", chosen(images))
    for columns, message in (
        (
            ["caption=promt", "winner=chosen", "loser=rejected"],
            r"no column 'promt' \(for caption\); did you mean 'prompt'\?; its columns: ",
        ),
        (["caption=prompt", "winner=chosen"], "the pictures are winner and loser, or image_0"),
        (["winner=chosen", "loser=rejected"], "caption is missing"),
        (["caption=prompt", "wnner=chosen"], r"'wnner' is no role; did you mean 'winner'\?"),
        (["caption"], "expected ROLE=NAME"),
        (["caption=prompt", "caption=x"], "caption is given twice"),
        (
            ["caption=prompt", "winner=chosen", "loser=rejected", "ranks=prompt"],
            "ranks beside winner and loser; expected votes_0 and",
        ),
        (["caption=prompt", "image=chosen"], "nothing beside image; expected rank, or score"),
    ):
        with pytest.raises(UserError, match=message) as error:
            open_with(path, *columns)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"preset 'hpd3'; did you mean 'hpdv3'"):
        open_with(path, preset="hpd3")
    with pytest.raises(UserError, match=r"pairs all: is for rankings"):
        open_with(path, preset="trl", pairs="all")
    with pytest.raises(UserError, match=r"min_margin 0.5: is for votes_0"):
        open_with(path, preset="trl", min_margin=0.5)
    with pytest.raises(UserError, match=r"min_margin: is for tables"):
        find_pairs([str(path)], table=TableOptions(min_margin=0.5))
    votes = written(tmp_path / "v.parquet", rapidata(images))
    with pytest.raises(UserError, match=r"min_margin 2: must be 0 to 1"):
        open_with(votes, preset="rapidata", min_margin=2)
    with pytest.raises(UserError, match=r"v.parquet: no column 'chosen'.*|no column"):
        find_pairs([str(path), str(votes)], table=TableOptions(preset="trl"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", 'c,w,l\n"x",1\n', r"a.csv, line 2: has not as many values"),
        ("a.csv", 'c,w,l\n"x"y,1,2\n', r"a.csv: not readable as CSV: "),
        ("a.jsonl", '{"c": "x", "w": "1", "l": "2"}\n{"c": \n', r"a.jsonl, line 2: no JSON: "),
        ("a.jsonl", "[1]\n", r"a.jsonl, line 1: expected an object"),
        ("a.json", '[{"c": "x", "w": "1", "l": "2"}, {"c"', r"a.json, record 1: "),
        ("a.json", "[1, 2]", r"a.json, record 0: expected an object"),
        ("a.json", '[{"c": "x", "w": "1", "l": "2"}] x', r"a.json: goes on behind the end"),
        ("a.json", '{"c": "\\ud83d", "w": "1", "l": "2"}', r"half a surrogate pair"),
        ("a.csv", "c,w,l\n", r"a.csv: holds no row"),
        ("a.feather", "not arrow", r"a.feather: not readable as Arrow"),
        ("a.arrow", "", r"a.arrow: not readable as Arrow"),
        ("a.txt", "x", r"a.txt: its name ends in none of .parquet, .arrow"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        open_with(tmp_path / name, "caption=c", "winner=w", "loser=l")
    assert "\n" not in str(error.value)


def test_json_is_read_a_record_at_a_time(tmp_path, monkeypatch):
    """With pieces of a few characters: the text is cut anywhere."""
    rows = [{"c": 'say "]" \\ ' + "ä" * n, "w": [n, {"deep": None}], "l": n / 3} for n in range(20)]
    for chunk in (1, 7, 1 << 20):
        monkeypatch.setattr("dde_ds.data.tables.CHUNK", chunk)
        for text in (json.dumps(rows), json.dumps(rows, indent=2), "".join(json.dumps(row) + "\n" for row in rows)):
            (tmp_path / "a.json").write_text(text)
            with (tmp_path / "a.json").open(encoding="utf-8", newline="") as file:
                assert list(json_records(file, "here")) == rows


def test_memory_stays_flat(tmp_path):
    import tracemalloc

    path = tmp_path / "many.json"
    peaks = []
    for count in (20_000, 60_000):
        with path.open("w") as file:
            file.write("[")
            for number in range(count):
                file.write(("," if number else "") + json.dumps({"c": "x" * 200, "w": f"{number}.jpg", "l": "b.jpg"}))
            file.write("]")
        tracemalloc.start()
        (table,) = open_tables([str(path)])
        assert table.rows == count == sum(1 for _ in table.scan(["c"]))
        rows = np.arange(0, count, 7)
        assert [row for row, _ in table.take(rows, ["w"])] == rows.tolist()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2_000_000  # the larger file has 10 MB more
