"""Inception Score: the public formula on known probabilities, and the network against torch-fidelity's."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dde_ds.cli import main
from dde_ds.errors import UserError
from dde_ds.evaluation import clip_loading
from dde_ds.evaluation.inception import SPLITS, InceptionScorer, inception_score
from dde_ds.evaluation.pictures import ImageFolder, claim, open_pictures
from dde_ds.evaluation.scorers import build_scorers
from dde_ds.evaluation.scoring import equal_share
from tests.support.inception import picture, save_inception

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


def test_known_probabilities():
    """Every image surely of another one of four classes: p(y) is 1/4, the score 4. All alike: 1."""
    sure = 50 * torch.eye(4).repeat(5, 1)
    assert inception_score(sure, splits=1) == pytest.approx((4.0, 0.0), abs=1e-6)
    assert inception_score(sure[:1].repeat(20, 1), splits=5) == pytest.approx((1.0, 0.0), abs=1e-9)
    # p = (3/4, 1/4) and (1/4, 3/4): KL to (1/2, 1/2) is log 2 minus the entropy of (1/4, 3/4).
    divergence = np.log(2) + 0.75 * np.log(0.75) + 0.25 * np.log(0.25)
    found, deviation = inception_score(torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log(), splits=1)
    assert (found, deviation) == pytest.approx((np.exp(divergence), 0.0))


def test_exp_of_the_mean_divergence_part_by_part():
    """Written out once more, with torch-fidelity 0.4.0's numbers for the same logits."""
    logits = 2 * torch.randn(57, 1008, generator=torch.Generator().manual_seed(0))
    order = np.random.RandomState(2020).permutation(57)
    scores = []
    for part in range(SPLITS):
        p = logits[order[part * 57 // SPLITS : (part + 1) * 57 // SPLITS]].double().softmax(1).numpy()
        scores.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), 1))))
    assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)))
    assert inception_score(logits) == pytest.approx((2.9854420081433775, 0.1824157535007191))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), [-4.549591064453125, 10.655267715454102, 18.272478103637695, -1.807849645614624]),
        ((300, 200), [-4.614404678344727, 11.036986351013184, 18.757617950439453, -1.8962914943695068]),
    ],
)
def test_the_network_is_torch_fidelitys(weights, size, expected):
    """Logits 0, 1, 500 and 1007 that torch-fidelity 0.4.0 gives for these weights and images: resizing and every layer. It is not
    among the packages of the tests, since it needs torchvision."""
    found = InceptionScorer(str(weights), CPU).features([picture(size)])
    assert found.shape == (1, 1008)
    assert found[0, [0, 1, 500, 1007]].tolist() == pytest.approx(expected, abs=1e-3)


def folder_of(path: Path, kinds: int, prompts: int = 40) -> Path:
    """One image a prompt, ``kinds`` of them different."""
    settings = {"images_per_prompt": 1, "seed": 0, "resolution": 40, "model": path.name, "weights": path.name}
    pictures = ImageFolder(path, [f"prompt {number}" for number in range(prompts)], settings)
    claim(pictures)
    for number in range(prompts):
        pictures.save(number, 0, np.asarray(picture((40, 40), number % kinds)))
    return path


def classes(images) -> torch.Tensor:
    """Logits by colour: what a network would say, without its minutes."""
    return torch.stack([torch.from_numpy(np.asarray(image.resize((3, 3)), dtype=np.float32) / 16).flatten() for image in images])


def test_two_folders(weights, tmp_path, capsys, monkeypatch):
    """Without pairs, beside nothing: a table of its own, made once for these very images."""
    base, new = folder_of(tmp_path / "base", 40), folder_of(tmp_path / "new", 2)
    sources = ["--base", str(base), "--model", str(new), "--out", str(tmp_path / "out")]

    def features(self, images) -> torch.Tensor:
        assert not torch.backends.cudnn.allow_tf32
        return classes(images)

    assert torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(InceptionScorer, "features", features)
    assert main(["evaluate", *sources, "--scorers", f"inception={weights}", "--batch", "7"]) == 0
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["sets"]
    for folder, row in zip((base, new), rows, strict=True):
        images = [Image.open(path) for path in sorted((folder / "images").iterdir())]
        mean, deviation = inception_score(classes(images))
        expected = {"scorer": "inception", "model": folder.name, "splits": 10, "count": 40}
        assert row == expected | {"mean": pytest.approx(mean), "deviation": pytest.approx(deviation)}
    assert torch.backends.cudnn.allow_tf32, "left as it was"
    assert rows[0]["mean"] > rows[1]["mean"] > 1.1, "more kinds of images, a higher score"
    out = capsys.readouterr().out
    for text in (out, (tmp_path / "out" / "comparison.md").read_text()):
        assert f"{rows[0]['mean']:.3f} ± {rows[0]['deviation']:.3f}" in text
        assert "fewer than 5000 images" in " ".join(text.split())
    assert main(["report", str(tmp_path / "out")]) == 0
    assert f"{rows[1]['mean']:.3f} ± {rows[1]['deviation']:.3f}" in (tmp_path / "out" / "report.html").read_text()

    monkeypatch.setattr(InceptionScorer, "features", None)  # scored already
    assert main(["evaluate", *sources, "--scorers", f"inception={weights}"]) == 0
    assert main(["compare", *sources, "--scorers", "inception"]) == 0
    open_pictures(new).save(3, 0, np.asarray(picture((40, 40), 99)))
    assert main(["compare", *sources, "--scorers", "inception"]) == 1
    assert f"{new}: these images have no inception score" in capsys.readouterr().err


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_put_together_are_the_whole(world):
    for count in (10, 11, 12):
        shares = [equal_share(range(count), rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert list(itertools.chain(*shares))[:count] == list(range(count))


def test_what_cannot_be_scored(weights, tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match=r"name the file of the weights.*torch-fidelity/releases"):
        build_scorers(["inception"], CPU)
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not the weights of"):
        InceptionScorer(str(tmp_path / "other.pth"), CPU).features([picture((32, 32))])
    formula = InceptionScorer(str(weights), CPU).digest
    monkeypatch.setattr(clip_loading, "FORMULA", 2)
    assert InceptionScorer(str(weights), CPU).digest != formula
    few = folder_of(tmp_path / "few", 3, prompts=3)
    command = ["evaluate", "--base", str(few), "--model", f"again={few}", "--out", str(tmp_path / "out")]
    assert main([*command, "--scorers", f"inception={weights}"]) == 1
    assert "holds 3 images; 10 or more are needed" in capsys.readouterr().err
