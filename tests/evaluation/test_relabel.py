"""Pairs that scorers label: on real tiny scorers, over ranks and kills, and what becomes of the labels in shards."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dde_ds import UserError
from dde_ds.cli import main
from dde_ds.data.inputs import TableOptions, find_pairs
from dde_ds.data.labels import LabelledPairs
from dde_ds.data.make import EncodingConfig, make_shards
from dde_ds.data.shards import ShardSet
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.errors import RankError
from dde_ds.evaluation.relabel import relabel
from dde_ds.evaluation.scorers import build_scorers
from dde_ds.models.encode import Encoder
from tests.conftest import ROOT
from tests.support.launching import LAUNCHER, PATIENCE, environment, free_port
from tests.support.scorers import save_clip, save_hps

CPU = torch.device("cpu")
ALONE = DistributedEnv(0, 1, 0)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """Two real scorers at reduced size."""
    folder = tmp_path_factory.mktemp("scorers")
    weights, processor = save_hps(folder)
    return [f"clip={save_clip(folder / 'clip')}", f"hps_v2.1={weights},{processor}"]


@pytest.fixture(scope="module")
def given(parquet, tmp_path_factory) -> Path:
    """Twenty pairs: row 1 a tie, row 2 without a label, row 3 without a caption, row 4 with a picture that is none."""
    rows = pq.read_table(parquet).to_pylist()
    rows[1]["label_0"], rows[2]["label_0"], rows[3]["caption"], rows[4]["jpg_1"] = 0.5, None, None, b"none"
    path = tmp_path_factory.mktemp("given") / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=6)
    return path


@pytest.fixture(scope="module")
def labels(given, options, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    assert main(["relabel", "--input", str(given), "--scorer", *options, "--output", str(path), "--batch", "3"]) == 0
    return path


def lines_of(path: Path) -> tuple[dict, list[dict]]:
    header, *rows = map(json.loads, path.read_text().splitlines())
    return header, rows


class Fixed:
    """A scorer by the colour of a picture, which counts what it is asked."""

    name, digest = "fixed", "0" * 64

    def __init__(self, gives=lambda image, prompt: float(np.asarray(image).mean())):
        self.gives, self.asked = gives, 0

    def score(self, images, prompts):
        self.asked += len(images)
        return torch.tensor([self.gives(image, prompt) for image, prompt in zip(images, prompts, strict=True)], dtype=torch.float64)


def test_every_pair_has_the_scores_of_its_two_pictures(given, labels, options):
    header, rows = lines_of(labels)
    assert header["rows"] == len(rows) == 19
    assert [row["row"] for row in rows] == [row for row in range(20) if row != 3]
    assert rows[3] == {"row": 4, "source": "pairs.parquet:4", "reason": rows[3]["reason"]}
    assert rows[3]["reason"].startswith("undecodable image")
    assert not labels.with_name("labels.jsonl.parts").exists()
    table = pq.read_table(given).to_pylist()
    scorers = build_scorers(options, CPU)
    assert header["scorers"] == {scorer.name: scorer.digest for scorer in scorers}
    for row in rows[:3] + rows[4:8]:
        stored = table[row["row"]]
        images = [Image.open(io.BytesIO(stored[name])) for name in ("jpg_0", "jpg_1")]
        images = images if stored["label_0"] == 1 else images[::-1]
        for scorer in scorers:
            expected = scorer.score(images, [stored["caption"]] * 2).tolist()
            assert row["scores"][scorer.name] == pytest.approx(expected, abs=1e-3)


def test_what_it_prints(given, labels, options, capsys):
    """Started again on a whole file: nothing is scored, and the agreement is that of the file."""
    assert main(["relabel", "--input", str(given), "--scorer", *options, "--output", str(labels)]) == 0
    out = capsys.readouterr().out
    assert "18 pairs: scored\n1 pairs: undecodable image\n" in out
    _, rows = lines_of(labels)
    decided = [row["scores"] for row in rows if "scores" in row and row["row"] not in (1, 2)]
    for name in ("clip", "hps_v2.1"):
        share = np.mean([scores[name][0] > scores[name][1] for scores in decided])
        assert f"{name} agrees with people on {share:.1%} of 16 decided pairs" in out


@pytest.mark.slow
def test_two_ranks(given, labels, options, tmp_path):
    launcher = [LAUNCHER, "--num_gpus", "2", "--master_port", str(free_port()), "--quiet", "--module", "dde_ds.cli"]
    output = tmp_path / "labels.jsonl"
    command = [*launcher, "relabel", "--input", given, "--scorer", *options, "--output", output, "--batch", "3"]
    process = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert process.returncode == 0, process.stderr[-3000:]
    (header, rows), (expected_header, expected) = lines_of(output), lines_of(labels)
    assert header == expected_header
    assert [row["row"] for row in rows] == [row["row"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name, scores in other.get("scores", {}).items():
            assert row["scores"][name] == pytest.approx(scores, abs=1e-3)


def test_killed_and_started_again_nothing_is_scored_twice(given, tmp_path, monkeypatch):
    """SIGKILL in the middle, three times, then on two ranks' shares in turn; a torn last line is scored again."""
    source, output, log = find_pairs([str(given)]), tmp_path / "labels.jsonl", tmp_path / "log"
    log.write_text("")
    parts = output.with_name("labels.jsonl.parts")

    def slowly(image, prompt):
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.02)
        return float(np.asarray(image).mean())

    monkeypatch.setattr("dde_ds.evaluation.relabel.barrier", lambda ranks, device: None)  # one rank runs at a time
    for rank in (0, 1, 0):
        before = sum(len(path.read_bytes().splitlines()) for path in parts.glob("*.jsonl"))
        process = os.fork()
        if not process:
            relabel(source, output, [Fixed(slowly)], DistributedEnv(rank, 2, rank), CPU, batch=2)
            os._exit(0)
        limit = time.monotonic() + 60
        while sum(len(path.read_bytes().splitlines()) for path in parts.glob("*.jsonl")) < before + 4 and time.monotonic() < limit:
            time.sleep(0.005)
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert not output.exists()
    torn = parts / "00001.jsonl"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-5])
    standing = [
        json.loads(line)
        for path in parts.glob("*.jsonl")
        for line in path.read_bytes().splitlines(keepends=True)[1:]
        if line.endswith(b"\n")
    ]
    assert len(standing) == len({row["row"] for row in standing}) >= 8
    last = Fixed()
    relabel(source, output, [last], ALONE, CPU, batch=2)
    scored = sum("scores" in row for row in standing)
    assert last.asked == 2 * (18 - scored)
    assert [row["row"] for row in lines_of(output)[1]] == [row for row in range(20) if row != 3]
    unbroken = tmp_path / "unbroken.jsonl"
    relabel(source, unbroken, [Fixed()], ALONE, CPU)
    assert unbroken.read_bytes() == output.read_bytes()
    again = Fixed()
    relabel(source, output, [again], ALONE, CPU)
    assert again.asked == 0


def test_a_score_that_is_no_number_names_the_picture(given, tmp_path):
    source = find_pairs([str(given)])
    second = [pair.loser for pair in source.read(np.array([5]))]
    bad = np.asarray(Image.open(io.BytesIO(second[0])).convert("RGB")).mean()
    scorer = Fixed(lambda image, prompt: math.nan if np.asarray(image).mean() == bad else 1.0)
    with pytest.raises(RankError, match=r"scorer fixed: gives nan for the loser of pairs\.parquet:5 \("):
        relabel(source, tmp_path / "labels.jsonl", [scorer], ALONE, CPU, batch=2)


def test_another_input_and_other_scorers_are_one_line(given, parquet, labels, options, tmp_path, capsys):
    other = ["--input", str(parquet), "--scorer", *options, "--output", str(labels)]
    assert main(["relabel", *other]) == 1
    assert f"error: --output {labels}: was begun with another input; choose another file" in capsys.readouterr().err
    assert main(["relabel", "--input", str(given), "--scorer", options[0], "--output", str(labels)]) == 1
    assert "was begun with other scorers" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"labels .*: are of another input \(pairs\.parquet\); relabel this one"):
        LabelledPairs(find_pairs([str(parquet)]), labels)
    columns = TableOptions(("caption=caption", "image_0=jpg_0", "image_1=jpg_1", "label_0=label_0"))
    with pytest.raises(UserError, match=r"are of another input|were made with other columns"):
        LabelledPairs(find_pairs([str(given)], table=columns), labels)
    assert main(["relabel", "--input", str(given), "--scorer", "inception", "--output", str(tmp_path / "l")]) == 1
    assert "inception" in capsys.readouterr().err
    for change, message in (
        (lambda text: text.replace("dde_ds labels 1", "other"), "is no file of labels"),
        (lambda text: text.replace('"row": 2,', '"row": 5,'), "each once and in order"),
        (lambda text: "\n".join(text.splitlines()[:-2]) + "\n", "holds 17 of its 19 rows"),
        (lambda text: text.replace('"scores": {"clip"', '"scores": {"other"', 1), "has not one finite pair of scores"),
        (lambda text: text.replace('{"row": 2', "{row: 2"), "line 4: no row of labels"),
    ):
        damaged = tmp_path / "damaged.jsonl"
        damaged.write_text(change(labels.read_text()))
        with pytest.raises(UserError, match=message) as error:
            LabelledPairs(find_pairs([str(given)]), damaged)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"labels_as 'sofd'; did you mean 'soft'"):
        LabelledPairs(find_pairs([str(given)]), labels, "sofd")


def written_labels(path: Path, source, scores: dict[int, list[tuple[float, float]]]) -> Path:
    """Labels by hand, of one scorer for each pair of scores."""
    from dde_ds.data.labels import header_of

    names = [f"s{number}" for number in range(len(next(iter(scores.values()))))]
    lines = [header_of(source, dict.fromkeys(names, "d"), len(scores))]
    lines += [
        {"row": row, "source": source.name(row), "scores": dict(zip(names, both, strict=True))} for row, both in scores.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# By row: what people say (1: the first picture), and two scorers' (first picture, second picture).
PEOPLE = [1, 1, 0, 0.5, None, 1, 1]
SCORES = {
    0: [(2.0, 1.0), (0.5, 0.0)],
    1: [(1.0, 2.0), (0.0, 3.0)],
    2: [(1.0, 0.0), (1.0, 0.0)],
    3: [(0.0, 1.0), (0.0, 2.0)],
    4: [(3.0, 0.0), (1.0, 0.0)],
    5: [(1.0, 0.0), (0.0, 1.0)],
    6: [(1.0, 1.0), (2.0, 2.0)],
}


@pytest.fixture
def labelled(parquet, tmp_path):
    """A table of seven pairs, the numbers of its pictures by their bytes, and its labels. A tie stands first picture first."""
    stored = pq.read_table(parquet).to_pylist()[:7]
    images = [row[name] for row in stored for name in ("jpg_0", "jpg_1")]
    rows = [{"c": f"t{n}", "a": images[2 * n], "b": images[2 * n + 1], "l": label} for n, label in enumerate(PEOPLE)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "seven.parquet")
    options = TableOptions(("caption=c", "image_0=a", "image_1=b", "label_0=l"))
    source = find_pairs([str(tmp_path / "seven.parquet")], table=options)
    return source, images, written_labels(tmp_path / "labels.jsonl", source, SCORES)


def kept(source: LabelledPairs, images: list[bytes]) -> dict[int, tuple[int, float | None]]:
    """Return the winning picture and the soft label of each row."""
    survey = source.survey()
    found = {}
    for pair, caption in zip(source.read(survey.rows), survey.caption_of, strict=True):
        assert pair.caption == survey.captions[caption] == f"t{pair.row}"
        winner, loser = images.index(pair.winner), images.index(pair.loser)
        assert {winner, loser} == {2 * pair.row, 2 * pair.row + 1}
        found[pair.row] = (winner % 2, pair.soft_label)
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_scorers_winner(labelled):
    """People prefer the second picture of row 2, so that picture stands first. The scorers agree with people there."""
    source, images, labels = labelled
    found = LabelledPairs(source, labels)
    assert kept(found, images) == {0: (0, None), 1: (1, None), 2: (1, None), 3: (1, None), 4: (0, None)}
    assert found.survey().counts == {"decided": 5, "scorers disagree": 1, "tie": 1}
    assert found.survey().noted == {"winner by the scorers alone": 3}


def test_only_where_scorers_and_people_agree(labelled):
    source, images, labels = labelled
    found = LabelledPairs(source, labels, "agree")
    assert kept(found, images) == {0: (0, None), 2: (1, None)}
    expected = {"decided": 2, "scorers and people disagree": 1, "tie": 2, "no label": 1, "scorers disagree": 1}
    assert found.survey().counts == expected


def test_the_difference_as_a_soft_label(labelled, sd_model, tmp_path):
    source, images, labels = labelled
    found = kept(LabelledPairs(source, labels, "soft"), images)
    for row, (winner, soft) in found.items():
        share = sum(sigmoid(first - second) for first, second in SCORES[row]) / 2
        first = 1 if PEOPLE[row] == 0 else 0
        assert winner == (first if share > 0.5 else 1 - first)
        assert soft == pytest.approx(max(share, 1 - share), abs=1e-12)
    assert set(found) == {0, 1, 2, 3, 4}  # in row 5 the two scorers cancel, in row 6 both are undecided
    margin = 0.6
    wide = LabelledPairs(source, labels, "soft", margin)
    assert set(kept(wide, images)) == {row for row, (_, soft) in found.items() if 2 * soft - 1 >= margin} == {1, 3, 4}
    assert wide.survey().counts["below the margin"] == 2
    encoder = Encoder(str(sd_model))
    manifest = make_shards(wide, tmp_path / "out", encoder, EncodingConfig("sd", 16, 2))
    assert manifest["samples"] == 3 and manifest["prompts"]["distinct"] == 4
    shards = ShardSet(tmp_path / "out")
    assert float(shards.read(0, 0)["soft_label"]) == pytest.approx(found[1][1])
    assert shards.manifest["settings"]["reading"]["labels"]["as"] == "soft"
    with pytest.raises(UserError, match=r"begun with other settings .reading|soft_label"):
        make_shards(LabelledPairs(source, labels), tmp_path / "out", encoder, EncodingConfig("sd", 16, 2))


def test_a_folder_of_pairs_without_any_label(parquet, options, sd_model, tmp_path, capsys):
    """The whole way by the commands: a table of prompts and two pictures, nobody's votes, labels, shards."""
    rows = pq.read_table(parquet).to_pylist()[:4]
    for number, row in enumerate(rows):
        for side in (0, 1):
            (tmp_path / f"{number}{'ab'[side]}.jpg").write_bytes(row[f"jpg_{side}"])
    table = [{"text": row["caption"], "a": f"{n}a.jpg", "b": f"{n}b.jpg"} for n, row in enumerate(rows)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    given = ["--input", str(tmp_path / "t.jsonl"), "--columns", "caption=text", "image_0=a", "image_1=b"]
    making = ["--model", str(sd_model), "--output", str(tmp_path / "out"), "--alone", "--resolution", "16"]
    assert main(["shard", *given, *making]) == 1
    assert "no decided pair ({'no label': 4})" in capsys.readouterr().err
    assert main(["shard", *given, *making, "--labels-as", "soft"]) == 1
    assert "--labels-as soft: is for labels" in capsys.readouterr().err
    assert main(["relabel", *given, "--scorer", options[1], "--output", str(tmp_path / "labels.jsonl")]) == 0
    labels = ["--labels", str(tmp_path / "labels.jsonl"), "--labels-as", "soft"]
    assert main(["shard", *given, *making, *labels, "--dry-run"]) == 0
    assert main(["shard", *given, *making, *labels]) == 0
    assert "4 pairs in 1 shards" in capsys.readouterr().out
    shards = ShardSet(tmp_path / "out")
    _, scored = lines_of(tmp_path / "labels.jsonl")
    for number, row in enumerate(scored):
        first, second = row["scores"]["hps_v2.1"]
        assert float(shards.read(0, number)["soft_label"]) == pytest.approx(sigmoid(abs(first - second)), rel=1e-6)
