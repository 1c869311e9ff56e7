"""The scorer of a user's own file that the README shows: evaluate, compare and relabel with it, and what goes wrong in such a file."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dde_ds import UserError
from dde_ds.cli import main
from dde_ds.errors import RankError
from dde_ds.evaluation.scorers import build_scorers
from tests.conftest import ROOT
from tests.support.pipelines import save_sd

CPU = torch.device("cpu")
EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "dde_ds" / "evaluation" / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def example(tmp_path) -> Path:
    assert EXAMPLE
    path = tmp_path / "my_scorers.py"
    path.write_text(EXAMPLE[1])
    return path


def sharpness(picture: Image.Image) -> float:
    """The formula of the guide's example, pixel by pixel."""
    rows = np.asarray(picture.convert("L")).astype(int).tolist()
    steps = [abs(right - left) for row in rows for left, right in pairwise(row)]
    return sum(steps) / len(steps)


def test_the_guides_example_scores_drawn_pictures(example, tmp_path, sd_model, capsys):
    other = save_sd(tmp_path / "other", "v_prediction")
    (tmp_path / "prompts.txt").write_text("penguin\nsnow\n")
    draw = ["--prompts", str(tmp_path / "prompts.txt"), "--images-per-prompt", "2", "--steps", "2"]
    scorer, out = ["--scorers", f"{example}:Sharpness"], tmp_path / "out"
    sources = ["--base", f"base={sd_model}", "--model", f"new={other}"]
    assert main(["evaluate", *sources, *draw, *scorer, "--out", str(out)]) == 0
    data = json.loads((out / "comparison.json").read_text())
    for name in ("base", "new"):
        found = torch.tensor(data["scores"][name]["Sharpness"], dtype=torch.float64).flatten().tolist()
        images = sorted((out / "images" / name / "images").glob("*.png"))
        assert found == pytest.approx([sharpness(Image.open(path)) for path in images], abs=1e-9)
        assert min(found) > 0

    # compare takes the scores of the file as it is; an edited file has none yet, and then two versions are kept apart.
    drawn = ["--base", str(out / "images" / "base"), "--model", str(out / "images" / "new")]
    assert main(["compare", *drawn, *scorer, "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "comparison.json").read_text())["scores"]["new"] == data["scores"]["new"]
    example.write_text(example.read_text().replace(".mean()", ".mean() + 1"))
    capsys.readouterr()
    assert main(["compare", *drawn, *scorer, "--out", str(tmp_path / "x")]) == 1
    assert "scorers Sharpness: no scores to compare: no version is in all folders" in capsys.readouterr().err
    assert main(["evaluate", *drawn, *scorer, "--out", str(tmp_path / "edited")]) == 0
    edited = json.loads((tmp_path / "edited" / "comparison.json").read_text())
    assert edited["scorers"] != data["scorers"]
    assert edited["scores"]["new"]["Sharpness"][0][0] == pytest.approx(data["scores"]["new"]["Sharpness"][0][0] + 1)
    assert not list(tmp_path.rglob("*.pyc"))


def test_relabel_with_it(example, parquet, tmp_path, capsys):
    labels = tmp_path / "labels.jsonl"
    assert main(["relabel", "--input", str(parquet), "--scorer", f"{example}:Sharpness", "--output", str(labels)]) == 0
    header, *rows = map(json.loads, labels.read_text().splitlines())
    assert list(header["scorers"]) == ["Sharpness"]
    assert len(rows) == 20
    assert all(len(row["scores"]["Sharpness"]) == 2 for row in rows)
    assert len({score for row in rows for score in row["scores"]["Sharpness"]}) > 20
    assert "Sharpness agrees with people on" in capsys.readouterr().out


BODY = "class S:\n    def __init__(self, device): pass\n    def score(self, images, prompts):\n        return {}\n"


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "S", r"scorers .*own\.py: no such file or directory"),
        ("import nothing_of_that_name\n", "S", r"could not be executed: line 1: ModuleNotFoundError: No module named"),
        ("x = 1\nx = (\n", "S", r"could not be executed: line 2: SyntaxError: '\(' was never closed"),
        (BODY, "Sharpnes", r"own\.py: has no 'Sharpnes'; known: S"),
        ("class S:\n    pass\n", "S", r"could not be made with S\(device\): TypeError: S\(\) takes no arguments"),
        ("class S:\n    def __init__(self, device): pass\n", "S", r"has no method score\(images, prompts\)"),
        ("class clip:\n    pass\n", "clip", r"clip is the name of a scorer of the project"),
    ],
)
def test_a_bad_file_is_one_line(content, name, message, tmp_path):
    path = tmp_path / "own.py"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        build_scorers([f"{path}:{name}"], CPU)


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        ("[1.0]", r"gave scores of shape \(1,\) for 2 images; must be \(2,\)"),
        ("'text'", r"score\(images, prompts\) failed: "),
        ("images[5]", r"score\(images, prompts\) failed: line 4: IndexError: list index out of range"),
    ],
)
def test_bad_scores_are_one_line(gives, message, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(BODY.format(gives))
    (scorer,) = build_scorers([f"{path}:S"], CPU)
    with pytest.raises(RankError, match=message):
        scorer.score([Image.new("RGB", (4, 4))] * 2, ["a", "b"])


def test_the_digest_is_of_the_file_and_of_what_the_class_says(tmp_path):
    path = tmp_path / "own.py"
    with pytest.raises(UserError, match="takes nothing after '='"):
        build_scorers([f"{path}:S=model"], CPU)
    digests = set()
    for text in (BODY, BODY + "# edited\n", BODY + "    digest = 'weights 1'\n", BODY + "    digest = 'weights 2'\n"):
        path.write_text(text.format("[0.0]"))
        digests.add(build_scorers([f"{path}:S"], CPU)[0].digest)
    assert len(digests) == 4
    path.write_text(BODY.format("[0.0]") + "    digest = 5\n")
    with pytest.raises(UserError, match="its digest is 5: must be text"):
        build_scorers([f"{path}:S"], CPU)
