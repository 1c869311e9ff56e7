"""Read the inputs of users: every row is kept or counted, columns come from other programs, and paths may hold brackets."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dde_ds import UserError
from dde_ds.cli.parsing import Parser
from dde_ds.cli.shard import _recipe, add_commands
from dde_ds.cli.verify_shards import remake
from dde_ds.data.inputs import find_pairs
from dde_ds.data.make import EncodingConfig, make_shards
from dde_ds.data.shards import ShardSet
from dde_ds.evaluation.prompts import read_prompts
from dde_ds.models.encode import Encoder, cut_captions


@pytest.fixture(scope="module")
def encoder(sd_model):
    return Encoder(str(sd_model))


@pytest.fixture(scope="module")
def images(parquet) -> list[bytes]:
    rows = pq.read_table(parquet).slice(0, 4).to_pylist()
    return [row[name] for row in rows for name in ("jpg_0", "jpg_1")]


def make(source, output: Path, encoder, rank: int = 0, world: int = 1, **options):
    return make_shards(
        source, output, encoder, EncodingConfig("sd", **{"resolution": 16, "pairs_per_shard": 2, **options}), rank, world
    )


def table(images: list[bytes], captions=None, labels=None, count: int = 4) -> pa.Table:
    return pa.table(
        {
            "caption": captions if captions is not None else ["kite", "boats", "kite", "door"],
            "jpg_0": images[0 : 2 * count : 2],
            "jpg_1": images[1 : 2 * count : 2],
            "label_0": labels if labels is not None else [1.0, 0.0, 1.0, 0.5],
        }
    )


def written(path: Path, content: pa.Table) -> list[str]:
    pq.write_table(content, path)
    return [str(path)]


def test_rows_without_caption_equal_images_and_repeated_pairs(images, encoder, tmp_path):
    """Row 0 stands again as row 3, and as row 6 with the images in the other columns; in row 4 a picture meets itself."""
    a, b, c, d = images[:4]
    rows = [
        *[("kite", a, b, 1), (None, a, b, 1), ("", c, d, 0), ("kite", a, b, 1)],
        *[("door", c, c, 1), (None, a, b, 0.5), ("kite", b, a, 0), ("kite", b, a, 1)],
    ]
    columns = dict(zip(("caption", "jpg_0", "jpg_1", "label_0"), map(list, zip(*rows, strict=True)), strict=True))
    given = written(tmp_path / "p.parquet", pa.table(columns))
    manifest = make(find_pairs(given), tmp_path / "out", encoder)
    assert manifest["rows"] == {"decided": 6, "no caption": 1, "same image": 1, "tie": 1}
    assert manifest["noted"] == {"cut caption": 0, "repeated pair": 2}
    assert manifest["samples"] == 5
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [(error["row"], error["reason"], "kept" in error) for error in errors] == [
        *[(1, "no caption", False), (3, "repeated pair: of p.parquet:0", True)],
        *[(4, "same image", False), (5, "tie", False), (6, "repeated pair: of p.parquet:0", True)],
    ]
    # However many ranks find it, at whatever time.
    assert make(find_pairs(given), tmp_path / "two", encoder, 1, 2) is None
    assert make(find_pairs(given), tmp_path / "two", encoder, 0, 2) == manifest

    asked_for = make(find_pairs(given), tmp_path / "kept", encoder, keep_no_caption=True)
    assert asked_for["rows"] == {"decided": 7, "same image": 1, "tie": 1}
    assert ShardSet(tmp_path / "kept").describe(0, 1)["caption"] == ""
    with pytest.raises(UserError, match=r"begun with other settings .no_caption 'left out', now 'kept'"):
        make(find_pairs(given), tmp_path / "out", encoder, keep_no_caption=True)


def test_the_printed_command_makes_the_same_shards(images, encoder, tmp_path):
    """For damaged shards, ``dde-ds verify`` prints a command with the options of the shards' settings."""
    options = {"background": (16, 32, 48), "keep_no_caption": True, "flip": True, "min_side": 7}
    given = written(tmp_path / "p.parquet", table(images, ["kite", None, "boats", "door"]))
    settings = make(find_pairs(given), tmp_path / "out", encoder, **options)["settings"]
    parser = Parser()
    add_commands(parser.add_subparsers(parser_class=Parser))
    args = parser.parse_args(shlex.split(remake(settings, tmp_path / "out"))[1:])
    recipe = _recipe(args, args.resolution)
    assert recipe.settings(encoder, find_pairs(given)) == settings


def test_the_same_picture_in_two_files_is_one(encoder, tmp_path):
    """Compared as they are seen: other bytes, the same pixels."""
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("seed", "3")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", pnginfo=text)
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "c.png")
    lines = [{"winner": "a.png", "loser": name, "caption": "x"} for name in ("b.png", "c.png")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert make(find_pairs([str(tmp_path)]), tmp_path / "out", encoder)["rows"] == {"decided": 2, "same image": 1}


def test_an_earlier_versions_folder_is_named(images, encoder, tmp_path):
    given = written(tmp_path / "p.parquet", table(images))
    make(find_pairs(given), tmp_path / "out", encoder)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    del settings["background"], settings["no_caption"]
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(
        UserError, match=r"was begun by an earlier version, .*finish it with that version, or choose another folder"
    ):
        make(find_pairs(given), tmp_path / "out", encoder)


def test_captions_that_are_cut(images, encoder, tmp_path):
    """The tests' tokenizer takes twelve tokens, two of which begin and end the text."""
    captions = ["abcdefghij", "abcdefghijk", "abcdefghijk", "a"]
    given = written(tmp_path / "p.parquet", table(images, captions, [1, 0, 1, 1]))
    assert make(find_pairs(given), tmp_path / "out", encoder)["noted"] == {"cut caption": 2, "repeated pair": 0}
    assert encoder.is_cut(captions).tolist() == [False, True, True, False]
    assert cut_captions([], captions).tolist() == [False] * 4


VIEWS = [pa.string_view()] if hasattr(pa, "string_view") else []


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), *VIEWS], ids=str)
def test_captions_of_every_type(images, tmp_path, kind):
    captions = pa.array(["kite", "boats", "kite", None]).cast(kind) if not str(kind).endswith("view") else None
    captions = pa.array(["kite", "boats", "kite", None], kind) if captions is None else captions
    survey = find_pairs(written(tmp_path / "p.parquet", table(images, captions, [1, 0, 1, 1]))).survey()
    assert [survey.captions[number] for number in survey.caption_of] == ["kite", "boats", "kite"]
    assert survey.excluded == {3: "no caption"}


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([True, False, True, None], "no label"),
        (["1", "0", "1", "tie"], "tie"),
        (["1.0", "0.0", " 1 ", "0.5"], "tie"),
        (["true", "False", "TRUE", ""], "no label"),
        (pa.array(["1", "0", "1", "tie"]).dictionary_encode(), "tie"),
        (pa.array([1.0, 0.0, 1.0, None]).dictionary_encode(), "no label"),
        (pa.array([1, 0, 1, 2], pa.int8()), "tie"),
        (pa.array(["1", "0", "1", "0.5"]).cast(pa.decimal128(3, 1)), "tie"),
        ([1.0, 0.0, 1.0, float("nan")], "no label"),
    ],
)
def test_labels_of_every_type(images, tmp_path, labels, reason):
    source = find_pairs(written(tmp_path / "p.parquet", table(images, labels=labels)))
    survey = source.survey()
    assert survey.excluded == {3: reason}
    winners = [pair.winner for pair in source.read(survey.rows)]
    assert winners == [images[0], images[3], images[4]]


def test_images_of_every_type(images, encoder, tmp_path):
    plain = table(images)
    kinds = [pa.large_binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})]
    kinds += [pa.binary_view()] if hasattr(pa, "binary_view") else []
    for number, kind in enumerate(kinds):
        column = images[0:8:2]
        if pa.types.is_struct(kind):
            column = [{"bytes": image, "path": "a.png"} for image in column]
        changed = plain.set_column(1, "jpg_0", pa.array(column, kind))
        source = find_pairs(written(tmp_path / f"{number}.parquet", changed))
        assert [pair.winner for pair in source.read(source.survey().rows)] == [images[0], images[3], images[4]]


def test_columns_that_hold_something_else(images, tmp_path):
    plain = table(images)
    for name, column in (
        ("caption", pa.array([1, 2, 3, 4])),
        ("label_0", pa.array([[1.0]] * 4)),
        ("jpg_0", pa.array(["a.png"] * 4)),
        ("jpg_0", pa.array([{"path": "a.png"}] * 4)),
    ):
        changed = plain.set_column(plain.schema.get_field_index(name), name, column)
        with pytest.raises(UserError, match=f"column {name} holds {str(column.type)[:4]}"):
            find_pairs(written(tmp_path / "p.parquet", changed))


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.json", "pairs.arrow", "pairs.parquet"])
def test_what_is_no_parquet_is_told_what_is_read(tmp_path, name):
    (tmp_path / name).write_text('caption,winner\n"a",b\n' * 10)
    with pytest.raises(
        UserError, match=r"not readable as parquet: .*parquet files in Pick-a-Pic's columns, one pairs.jsonl"
    ) as error:
        find_pairs([str(tmp_path / name)])
    assert "is kept" not in str(error.value)


def test_what_is_no_file_is_called_that(images, tmp_path):
    """Refuse a pipe as an input, in a folder of inputs, and instead of a manifest. Reading a pipe would wait for ever."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    written(folder / "a.parquet", table(images))
    os.mkfifo(folder / "b.parquet")
    for given in (folder / "b.parquet", folder, f"{folder}/*.parquet"):
        with pytest.raises(UserError, match=rf"input {folder}/b\.parquet: is not a regular file"):
            find_pairs([str(given)])
    os.mkfifo(folder / "pairs.jsonl")
    with pytest.raises(UserError, match=r"pairs\.jsonl: not a regular file"):
        find_pairs([str(folder)])
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json: not a regular file"):
        ShardSet(folder)
    os.mkfifo(tmp_path / "prompts.txt")
    with pytest.raises(UserError, match=r"prompts\.txt: is not a regular file"):
        read_prompts(tmp_path / "prompts.txt")


def test_names_that_are_not_utf8(images, encoder, tmp_path):
    """Read a file with such a name, and write its name with an escape. Refuse a column with such a name in one line."""
    path = tmp_path / os.fsdecode(b"p\xff.parquet")
    written(tmp_path / "p.parquet", table(images))
    (tmp_path / "p.parquet").rename(path)
    manifest = make(find_pairs([str(path)]), tmp_path / "out", encoder, keep_no_caption=True)
    assert manifest["settings"]["input"][0]["name"] == r"p\udcff.parquet"
    assert ShardSet(tmp_path / "out").describe(0, 0)["source"] == r"p\udcff.parquet:0"
    path = tmp_path / "column.parquet"
    pq.write_table(table(images).append_column("zzézz", [["a"] * 4]), path)
    path.write_bytes(path.read_bytes().replace("zzézz".encode(), b"zz\xff\xfezz"))
    with pytest.raises(UserError, match=r"a text or a column's name in it is not UTF-8: b'zz\\xff\\xfezz'"):
        find_pairs([str(path)])


def test_half_a_surrogate_pair_in_parquet_names_the_row(images, encoder, tmp_path):
    """A careless program writes half a surrogate pair as bytes that are not UTF-8."""
    halves = pa.Array.from_buffers(
        pa.string(), 4, [None, pa.py_buffer(np.array([0, 1, 4, 5, 6], np.int32)), pa.py_buffer(b"a\xed\xa0\xbcbc")]
    )
    source = find_pairs(written(tmp_path / "p.parquet", table(images, halves)))
    with pytest.raises(UserError, match=r"p\.parquet, row 1: the caption is not UTF-8 text: b'\\xed\\xa0\\xbc'"):
        make(source, tmp_path / "out", encoder)
    mended = find_pairs(written(tmp_path / "p.parquet", table(images)))
    assert make(mended, tmp_path / "out", encoder) is not None


def test_half_a_surrogate_pair_in_pairs_jsonl(images, encoder, tmp_path):
    for name, image in zip(("a.jpg", "b.jpg"), images, strict=False):
        (tmp_path / name).write_bytes(image)
    pair = {"winner": "a.jpg", "loser": "b.jpg"}
    whole = [json.dumps({**pair, "caption": "\U0001f415"}), json.dumps({**pair, "caption": "party \U0001f389"})]
    assert "\\ud83d\\udc15" in whole[0]  # a whole pair is one character
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join([whole[0], whole[1].replace("\\udf89", "")]))
    with pytest.raises(UserError, match=r"line 2: .*half a surrogate pair"):
        make(find_pairs([str(path)]), tmp_path / "out", encoder)
    path.write_text("\n".join(whole))
    make(find_pairs([str(path)]), tmp_path / "out", encoder)
    assert ShardSet(tmp_path / "out").describe(0, 0)["caption"] == "\U0001f415"


# Folders of images


@pytest.fixture
def folder(tmp_path, images) -> Path:
    """``lists/pairs.jsonl`` and ``store/0.jpg`` … side by side."""
    for name in ("lists", "store"):
        (tmp_path / name).mkdir()
    for number, image in enumerate(images):
        (tmp_path / "store" / f"{number}.jpg").write_bytes(image)
    return tmp_path


def pairs_of(folder: Path, *lines: dict) -> list[str]:
    (folder / "lists" / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(folder / "lists")]


def test_every_line_is_kept_or_counted(folder, encoder):
    store = folder / "store"
    a, b = "0.jpg", "1.jpg"
    os.mkfifo(store / "pipe.jpg")
    given = pairs_of(
        folder,
        *[{"winner": a, "loser": b, "caption": "kite"}, {"winner": a, "loser": b, "caption": "kite", "label": 0.5}],
        *[{"winner": a, "loser": b, "caption": "kite", "tie": True}, {"winner": a, "loser": b, "caption": None}],
        *[{"winner": None, "loser": b, "caption": "kite"}, {"winner": a, "loser": None, "caption": "kite"}],
        *[{"winner": a, "loser": a, "caption": "kite"}, {"winner": a, "loser": b, "caption": "kite", "label": None}],
        *[{"winner": a, "loser": b, "caption": "kite", "label": "1", "tie": False}, {"winner": a, "loser": "9.jpg", "caption": ""}],
        *[{"winner": a, "loser": "pipe.jpg", "caption": "kite"}, {"winner": a, "loser": b, "caption": "kite", "label": True}],
    )
    manifest = make(find_pairs(given, root=store), folder / "out", encoder)
    assert manifest["rows"] == {"decided": 8, "missing image": 4, "no caption": 1, "no label": 1, "same image": 1, "tie": 2}
    assert manifest["noted"]["repeated pair"] == 2
    assert manifest["samples"] == 3


def test_paths_outside_are_allowed_by_a_root(folder):
    store = folder / "store"
    absolute = pairs_of(folder, {"winner": str(store / "0.jpg"), "loser": str(store / "1.jpg"), "caption": "x"})
    with pytest.raises(
        UserError,
        match=r"line 1: .*0\.jpg' lies outside of the folder of pairs.jsonl; name the folder that paths may point into as root",
    ):
        find_pairs(absolute)
    source = find_pairs(absolute, root=folder)
    (pair,) = source.read(source.survey().rows)
    assert pair.winner == (store / "0.jpg").read_bytes()
    with pytest.raises(UserError, match=f"lies outside of root {folder / 'lists'};"):
        find_pairs(absolute, root=folder / "lists")
    relative = pairs_of(folder, {"winner": "0.jpg", "loser": "./x/../1.jpg", "caption": "x"})
    (pair,) = find_pairs(relative, root=store).read(np.array([0]))
    assert (pair.winner, pair.loser) == ((store / "0.jpg").read_bytes(), (store / "1.jpg").read_bytes())
    escaping = pairs_of(folder, {"winner": "0.jpg", "loser": "../lists/pairs.jsonl", "caption": "x"})
    with pytest.raises(UserError, match="lies outside of root"):
        find_pairs(escaping, root=store, follow_links=True)
    with pytest.raises(UserError, match="root /nowhere: no such folder"):
        find_pairs(absolute, root=Path("/nowhere"))


def test_links_that_lead_out_are_named_and_followed_when_asked(folder):
    link = folder / "lists" / "images"
    link.symlink_to(folder / "store")
    given = pairs_of(folder, {"winner": "images/0.jpg", "loser": "images/1.jpg", "caption": "x"})
    with pytest.raises(UserError, match=f"behind the link {link} -> {folder / 'store'}; --follow-links follows it"):
        find_pairs(given)
    (pair,) = find_pairs(given, follow_links=True).read(np.array([0]))
    assert pair.loser == (folder / "store" / "1.jpg").read_bytes()
    # One that stays inside leads nowhere else; and the folder itself may be reached by a link.
    link.unlink()
    shutil.copytree(folder / "store", folder / "lists" / "real")
    link.symlink_to("real")
    (folder / "shortcut").symlink_to("lists")
    named = pairs_of(folder, {"winner": "images/0.jpg", "loser": str(folder / "shortcut" / "images" / "1.jpg"), "caption": "x"})
    for where in (named, [str(folder / "shortcut")]):
        (pair,) = find_pairs(where).read(np.array([0]))
        assert pair.loser == (folder / "store" / "1.jpg").read_bytes()


def test_options_of_pairs_jsonl_elsewhere(images, tmp_path):
    given = written(tmp_path / "p.parquet", table(images))
    with pytest.raises(UserError, match=r"follow_links: is for the images of a pairs.jsonl"):
        find_pairs(given, follow_links=True)
    with pytest.raises(UserError, match=r"root: is for the images of a pairs.jsonl"):
        find_pairs(given, root=tmp_path)


# Paths


@pytest.mark.parametrize("name", ["pairs[v2]", "a b", "größer 狐", "100% #1", "what?", "star*", "v2:final", "~"])
def test_a_path_that_exists_is_that_path(images, tmp_path, monkeypatch, name):
    folder = tmp_path / name
    (folder / "deeper [x]").mkdir(parents=True)
    written(folder / "train-00000.parquet", table(images))
    written(folder / "deeper [x]" / "train-00001.parquet", table(images))
    shutil.copytree(folder / "deeper [x]", folder / ".cache")  # as the hub's command line leaves it
    both = ["train-00000.parquet:0", "train-00001.parquet:0"]
    monkeypatch.chdir(tmp_path)
    for base in (str(folder), name):
        source = find_pairs([base])
        assert sorted([source.name(0), source.name(4)]) == both
        assert find_pairs([f"{base}/train-00000.parquet"]).name(3) == "train-00000.parquet:3"
        assert find_pairs([f"file://{folder}/train-00000.parquet"]).name(3) == "train-00000.parquet:3"
    many = find_pairs([f"{name}/train-00000.parquet", f"{name}/deeper [x]"])
    assert [many.name(0), many.name(4)] == both
    (folder / "pairs.jsonl").write_text('{"winner": "a", "loser": "b", "caption": "c"}\n')
    for given in (name, f"{name}/pairs.jsonl"):
        assert find_pairs([given]).name(0) == "pairs.jsonl:0"


def test_only_then_it_is_a_pattern(images, tmp_path):
    (tmp_path / "pairs[v2]").mkdir()
    for number in range(3):
        written(tmp_path / f"train-{number}.parquet", table(images))
    assert find_pairs([str(tmp_path / "train-[01].parquet")]).name(4) == "train-1.parquet:0"
    with pytest.raises(UserError, match="no file matches"):
        find_pairs([str(tmp_path / "train-[34].parquet")])
    with pytest.raises(UserError, match=r"holds no pairs.jsonl, no parquet file"):
        find_pairs([str(tmp_path / "pairs[v2]")])
    (tmp_path / "one.jsonl").write_text("")
    assert find_pairs([str(tmp_path / "o*.jsonl")]).pairs == []
    with pytest.raises(UserError, match=r"one pairs.jsonl is read at a time"):
        find_pairs([str(tmp_path / "one.jsonl"), str(tmp_path / "train-0.parquet")])
