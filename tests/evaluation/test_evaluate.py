"""``dde-ds evaluate`` and ``compare`` on real pipelines and scorers: drawn once, scored once, compared in pairs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dde_ds.cli import main
from dde_ds.errors import UserError
from dde_ds.evaluation import scorers
from dde_ds.evaluation.comparison import compare_folders, name_sources
from dde_ds.evaluation.pictures import open_pictures
from dde_ds.evaluation.scorers import build_scorers
from dde_ds.evaluation.scoring import load_scores, read_cache
from tests.conftest import ROOT
from tests.support.launching import LAUNCHER, PATIENCE, environment, free_port
from tests.support.pipelines import save_sd
from tests.support.scorers import save_clip, save_hps

PROMPTS = ["red fire", "penguin", "dagger | fox", "snow", "moon"]
DRAWING = ["--images-per-prompt", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, sd_model):
    """Two models, prompts, and two scorers' options."""
    folder = tmp_path_factory.mktemp("evaluate")
    # Another prediction type: the same weights, other images.
    models = (sd_model, save_sd(folder / "aligned", "v_prediction"))
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]))
    weights, processor = save_hps(folder)
    options = [f"clip={save_clip(folder / 'clip')}", f"hps_v2.1={weights},{processor}"]
    return models, ["--prompts", str(folder / "prompts.txt")], options


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory) -> Path:
    (base, aligned), prompts, options = world
    out = tmp_path_factory.mktemp("comparison") / "out"
    arguments = ["evaluate", "--base", f"base={base}", "--model", f"new={aligned}", *prompts, *DRAWING, "--scorers", *options]
    assert main([*arguments, "--out", str(out)]) == 0
    return out


def arguments(world, out: Path, *more: str) -> list[str]:
    (base, aligned), prompts, options = world
    sources = ["--base", f"base={base}", "--model", f"new={aligned}"]
    return ["evaluate", *sources, *prompts, *DRAWING, "--scorers", *options, "--out", str(out), *more]


def test_the_numbers_are_those_of_the_images(evaluated, world):
    data = json.loads((evaluated / "comparison.json").read_text())
    assert data["prompts"] == PROMPTS
    assert data["base"] == "base"
    assert [(row["model"], row["scorer"]) for row in data["results"]] == [("new", "clip"), ("new", "hps_v2.1")]
    for scorer, row in zip(build_scorers(world[2], torch.device("cpu")), data["results"], strict=True):
        means = {}
        for name in ("base", "new"):
            images = evaluated / data["folders"][name] / "images"
            scores = [
                float(scorer.score([Image.open(images / f"{p:05d}-{i:02d}.png")], [prompt])[0])
                for p, prompt in enumerate(PROMPTS)
                for i in range(2)
            ]
            assert np.array(data["scores"][name][scorer.name]).ravel() == pytest.approx(scores, abs=1e-3)
            means[name] = np.mean(scores)
        assert row["base_mean"] == pytest.approx(means["base"], abs=1e-3)
        assert row["difference"]["mean"] == pytest.approx(means["new"] - means["base"], abs=2e-3)
        assert row["difference"]["low"] <= row["difference"]["mean"] <= row["difference"]["high"]
        assert row["difference"]["low"] < row["difference"]["high"]
        signs = [row["difference"][f"prompts_{sign}"] for sign in ("better", "worse", "equal")]
        assert sum(signs) == len(PROMPTS)
        assert data["scorers"][scorer.name] == scorer.digest
    assert any("fewer than 500" in note for note in data["notes"])


def test_table_and_markdown(evaluated, world, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(arguments(world, evaluated)) == 0
    out = capsys.readouterr()
    assert "5 prompts, 2 images each, against base" in out.out
    assert "1 repetitions left out" in out.err
    markdown = (evaluated / "comparison.md").read_text()
    results = json.loads((evaluated / "comparison.json").read_text())["results"]
    assert len(results) == 2
    for row in results:
        difference, beats = row["difference"], row["beats"]
        mean, interval = f"{difference['mean']:+.3f}", f"[{difference['low']:+.3f}, {difference['high']:+.3f}]"
        rate, bounds = f"{beats['rate']:.1%}", f"[{beats['low']:.1%}, {beats['high']:.1%}]"
        assert f"| {mean} {interval} | {rate} {bounds} |" in markdown
        # The terminal's table has the intervals on a line of their own, below what they are of.
        first, second = (" +".join(map(re.escape, words)) for words in ((mean, rate), (interval, bounds)))
        assert re.search(rf"{row['scorer']} [^\n]* {first} [^\n]*\n +{second}", out.out)


def test_nothing_is_drawn_or_scored_twice(evaluated, world, monkeypatch):
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (evaluated / "images").rglob("*.png")}

    def refuse(self, images, prompts):
        raise AssertionError("scored again")

    before = files()
    with monkeypatch.context() as patch:
        patch.setattr(scorers.ClipScorer, "score", refuse)
        patch.setattr(scorers.OpenClipScorer, "score", refuse)
        assert main(arguments(world, evaluated)) == 0
    assert files() == before


def test_one_image_changed_is_one_image_scored(evaluated, world, tmp_path, monkeypatch):
    out = shutil.copytree(evaluated, tmp_path / "out")
    (out / "images" / "new" / "images" / "00003-01.png").unlink()
    cache = next((out / "images" / "new" / "scores").glob("clip-*")) / "00000.jsonl"
    cache.write_bytes(cache.read_bytes()[:-5])  # and the last row cut short, as by a kill
    counted = []
    real = scorers.ClipScorer.score
    monkeypatch.setattr(
        scorers.ClipScorer, "score", lambda self, images, prompts: counted.extend(prompts) or real(self, images, prompts)
    )
    before = json.loads((out / "comparison.json").read_text())["results"]
    assert main(arguments(world, out, "--batch", "1")) == 0
    assert counted in (["snow", "moon"], ["moon"])  # drawn alone, the image may have come out the same to the last bit
    after = json.loads((out / "comparison.json").read_text())["results"]
    assert after[0]["model_mean"] == pytest.approx(before[0]["model_mean"], abs=0.5)


def test_another_scorer_is_not_taken_for_this_one(evaluated, world, tmp_path):
    out = shutil.copytree(evaluated, tmp_path / "out")
    clip = save_clip(tmp_path / "clip", seed=5)
    assert main([*arguments(world, out), "--scorers", f"clip={clip}"]) == 0
    after = json.loads((out / "comparison.json").read_text())
    before = json.loads((evaluated / "comparison.json").read_text())
    assert after["results"][0]["model_mean"] != pytest.approx(before["results"][0]["model_mean"], abs=1e-6)

    # Two versions are there now: compare asks which.
    folders = ["--base", str(out / "images" / "base"), "--model", str(out / "images" / "new"), "--out", str(tmp_path / "compared")]
    versions = [before["scorers"]["clip"], after["scorers"]["clip"]]
    with pytest.raises(UserError, match="scores of 2 versions are cached; pick one"):
        compare_folders({name: out / "images" / name for name in ("base", "new")}, ["clip"])
    for digest, expected in zip(versions, (before, after), strict=True):
        assert main(["compare", *folders, "--scorers", f"clip@{digest[:12]}"]) == 0
        found = json.loads((tmp_path / "compared" / "comparison.json").read_text())["results"]
        assert found == expected["results"][:1]


def test_folders_of_images_and_several_models(evaluated, world, tmp_path, capsys):
    """Already drawn, the folders stand for their models; the base against itself ties on every image."""
    images = evaluated / "images"
    folders = ["--base", str(images / "base"), "--model", str(images / "new"), "--model", f"itself={images / 'base'}"]
    assert main(["evaluate", *folders, "--scorers", *world[2], "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "comparison.json").read_text())["results"]
    assert [(row["scorer"], row["model"]) for row in results] == [
        (scorer, model) for scorer in ("clip", "hps_v2.1") for model in ("new", "itself")
    ]
    itself = results[1]
    assert itself["beats"] == {"rate": 0.5, "low": 0.5, "high": 0.5, "prompts": 5}
    assert itself["difference"] == {
        **{"mean": 0.0, "low": 0.0, "high": 0.0, "prompts_better": 0, "prompts_worse": 0, "prompts_equal": 5, "sign_test_p": 1.0}
    }
    assert "base and itself are the same weights" in capsys.readouterr().out


def test_what_nothing_is_drawn_with_is_refused(evaluated, world, tmp_path, capsys):
    """A seed that changes nothing would be read as one that changed nothing. A value that is the default is refused as others are."""
    images = evaluated / "images"
    command = ["evaluate", "--base", str(images / "base"), "--model", str(images / "new"), "--scorers", *world[2]]
    for flag, value in (("--prompts", "prompts.txt"), ("--seed", "0"), ("--steps", "50"), ("--limit", "3")):
        assert main([*command, "--out", str(tmp_path / "out"), flag, value]) == 1
        assert capsys.readouterr().err.startswith(f"error: {flag}: --base and --model are folders of images")
    assert not (tmp_path / "out").exists()


def test_missing_images_and_scores_are_named(evaluated, tmp_path, capsys):
    out = shutil.copytree(evaluated, tmp_path / "out")
    folders = ["--base", str(out / "images" / "base"), "--model", str(out / "images" / "new"), "--out", str(tmp_path / "x")]
    (out / "images" / "new" / "images" / "00002-01.png").unlink()
    assert main(["compare", *folders, "--scorers", "clip"]) == 1
    assert "1 of 10 images are missing or damaged (00002-01.png)" in capsys.readouterr().err
    shutil.copy(evaluated / "images" / "new" / "images" / "00002-01.png", out / "images" / "new" / "images")
    cache = next((out / "images" / "base" / "scores").glob("clip-*")) / "00000.jsonl"
    cache.write_bytes(b"".join(cache.read_bytes().splitlines(keepends=True)[:-1]))
    assert main(["compare", *folders, "--scorers", "clip"]) == 1
    assert "1 of 10 images have no clip score (00004-01.png)" in capsys.readouterr().err
    cache.write_bytes(b"{}\n")
    assert main(["compare", *folders, "--scorers", "clip"]) == 1
    assert "holds a damaged line" in capsys.readouterr().err
    assert main(["compare", *folders, "--scorers", "pickscore"]) == 1
    assert "--scorers pickscore: no scores to compare" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_is_no_pair_is_refused(evaluated, world, tmp_path):
    base = evaluated / "images" / "base"
    (model, _), _, _ = world
    for more, named in (
        (["--seed", "1"], "its seed is 1, that of"),
        (["--images-per-prompt", "1"], "its images_per_prompt is 1"),
        (["--limit", "3"], r"lacks the prompt 'snow' \(2 in all\)"),
    ):
        out = tmp_path / more[0]
        command = ["evaluate", "--base", f"base={model}", "--model", f"x={model}", "--out", str(out), *world[1], *DRAWING, *more]
        assert main([*command, "--scorers", world[2][0]]) == 0
        with pytest.raises(UserError, match=named):
            compare_folders({"base": base, "new": out / "images" / "x"}, ["clip"])


def test_other_settings_are_said_beside_the_numbers(world, tmp_path, evaluated, capsys):
    (model, _), _, options = world
    command = ["evaluate", "--base", str(evaluated / "images" / "base"), "--model", f"strong={model}", "--out", str(tmp_path)]
    assert main([*command, *world[1], *DRAWING, "--guidance", "12", "--scorers", options[0]]) == 0
    assert "base and strong were drawn with different settings: guidance 7.5 and 12.0" in capsys.readouterr().out


def test_names(tmp_path):
    assert name_sources(["a/base", "runs/x/export"]) == {"base": "a/base", "export": "runs/x/export"}
    assert name_sources(["hub/base", "runs/x/export", "runs/y/export"]) == {
        "hub-base": "hub/base",
        "x-export": "runs/x/export",
        "y-export": "runs/y/export",
    }
    (tmp_path / "lr=1e-5" / "export").mkdir(parents=True)  # a path that exists is that path
    path = str(tmp_path / "lr=1e-5" / "export")
    assert name_sources(["a/base", path, f"b={path}"]) == {"base": "a/base", "export": path, "b": path}
    assert name_sources(["b=runs/x", "n=runs/x"]) == {"b": "runs/x", "n": "runs/x"}
    for bad in (["a", "a"], ["n=a", "n=b"], ["=a", "b"], ["n=", "b"], ["a/..", "b"], ["x/y=a", "b"]):
        with pytest.raises(UserError, match="base and model"):
            name_sources(bad)


def test_prompts_are_needed_only_to_draw(world, tmp_path, capsys):
    (base, aligned), _, options = world
    command = ["evaluate", "--base", f"base={base}", "--model", f"new={aligned}", "--scorers", options[0], "--out", str(tmp_path)]
    assert main(command) == 1
    assert "--prompts: needed to draw the images of base, new" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks(world, evaluated, tmp_path):
    """Drawn and scored by two ranks under the launcher: the same comparison, each score made once."""
    launcher = [LAUNCHER, "--num_gpus", "2", "--master_port", str(free_port()), "--quiet", "--module", "dde_ds.cli"]
    command = [*launcher, *arguments(world, tmp_path / "out")]
    process = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert process.returncode == 0, process.stderr[-3000:]
    found, expected = (json.loads((out / "comparison.json").read_text()) for out in (tmp_path / "out", evaluated))
    for name, own in expected["scores"].items():
        for scorer, values in own.items():
            assert np.array(found["scores"][name][scorer]) == pytest.approx(np.array(values), abs=0.5)  # a level in a pixel
    pictures = open_pictures(tmp_path / "out" / "images" / "new")
    for cache in (pictures.folder / "scores").iterdir():
        assert sorted(len(path.read_text().splitlines()) for path in cache.iterdir()) == [5, 5]
        assert len(read_cache(cache)) == 10
    assert load_scores(pictures, "clip", found["scorers"]["clip"]).shape == (5, 2)
