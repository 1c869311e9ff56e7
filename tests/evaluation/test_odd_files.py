"""Folders of images, and scores beside them, that somebody has changed: one line, or an image that is made again."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from dde_ds.errors import UserError
from dde_ds.evaluation.pictures import ImageFolder, claim, open_pictures, require_whole, settings_digest
from dde_ds.evaluation.scoring import cache_folder, load_scores, load_set_score
from dde_ds.files import sha256_of

SETTINGS = {"images_per_prompt": 2, "seed": 0, "model": "base", "weights": "0" * 64}
ODD = (None, True, -1, 1.5, 10**400, 10**12, math.nan, "x", [], {}, [None])


@pytest.fixture
def pictures(tmp_path) -> ImageFolder:
    found = ImageFolder(tmp_path / "images", ["a fox", "two geese"], SETTINGS)
    claim(found)
    for item in found.items():
        found.save(*item, np.full((8, 8, 3), 40 * sum(item), dtype=np.uint8))
    require_whole(found)
    return found


def rewrite(folder: Path, **changes) -> None:
    """The manifest with these changes, and with the digest that fits them."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    with contextlib.suppress(TypeError, ValueError):  # where none would fit
        manifest["digest"] = settings_digest(manifest["settings"], manifest["prompts"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_manifest_with_anything_else_in_it(pictures, odd):
    whole = (pictures.folder / "manifest.json").read_text()
    every = [{key: odd} for key in ("format", "prompts", "settings")]
    every += [{"settings": SETTINGS | {key: odd}} for key in SETTINGS] + [{"prompts": ["a fox", odd]}]
    for changes in every:
        (pictures.folder / "manifest.json").write_text(whole)
        rewrite(pictures.folder, **changes)
        with pytest.raises(UserError) as said:
            require_whole(open_pictures(pictures.folder))
        assert str(pictures.folder) in str(said.value) and "\n" not in str(said.value)


def test_manifests_that_are_no_json(pictures):
    for data in (b"", b"[" * 100_000, b'"\\ud83c"', b"\xff\xfe", b"null"):
        (pictures.folder / "manifest.json").write_bytes(data)
        with pytest.raises(UserError, match=r"manifest\.json: not a manifest of images: "):
            open_pictures(pictures.folder)


def test_images_that_are_none(pictures):
    damaged = [pictures.path(*item) for item in ((0, 0), (0, 1), (1, 0))]
    damaged[0].write_bytes(damaged[0].read_bytes()[:60])
    damaged[1].unlink()
    os.mkfifo(damaged[1])
    header = bytearray(damaged[2].read_bytes())
    header[16:24] = b"\x00\x0f\xff\xff" * 2  # a million pixels a side
    damaged[2].write_bytes(header)
    with pytest.raises(UserError, match="3 of 4 images are missing or damaged"):
        require_whole(pictures)


@pytest.mark.parametrize(
    "row", [*(f'{{"image": "x", "score": {odd}}}' for odd in ('"1"', "NaN", "1e400", "null", "1" * 400)), "[" * 9999]
)
def test_scores_that_are_no_numbers(pictures, row):
    cache = cache_folder(pictures, "clip", "0" * 64)
    cache.mkdir(parents=True)
    scores = [json.dumps({"image": sha256_of(pictures.path(*item)), "score": 1.5}) for item in pictures.items()]
    (cache / "00000.jsonl").write_text("\n".join(scores) + "\n")
    assert load_scores(pictures, "clip", "0" * 64).tolist() == [[1.5, 1.5], [1.5, 1.5]]
    (cache / "00000.jsonl").write_text("\n".join([*scores, row]) + "\n")
    with pytest.raises(UserError, match=r"00000\.jsonl: holds a damaged line"):
        load_scores(pictures, "clip", "0" * 64)


@pytest.mark.parametrize("row", ["{}", "[]", '{"images": "x", "count": 4, "splits": 10, "mean": NaN, "deviation": 1}'])
def test_scores_of_a_set_that_are_none(pictures, row):
    path = cache_folder(pictures, "inception", "0" * 64).with_suffix(".json")
    path.parent.mkdir(parents=True)
    path.write_text(row)
    with pytest.raises(UserError, match="damaged; delete it to score again"):
        load_set_score(pictures, "inception", "0" * 64)
