"""The comparison of objectives: what it chooses and reports from made-up results, and the whole of it at its smallest."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from dde_ds import UserError
from tests.conftest import DEMO, ROOT
from tests.support.launching import PATIENCE, environment

sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(DEMO))

import compare_objectives as tool
from objectives_report import markdown, summarise
from train_and_score import micro_batch


def arguments(folder: Path, **changes) -> Namespace:
    numbers = {"seeds": 2, "steps": 2, "pairs": 4, "captions": 4, "tuning_captions": 4, "images": 1, "inference_steps": 2}
    grid = {"only": ["dde", "uniform"], "betas": [500.0, 2000.0], "rates": [1e-4], "judge_steps": 1}
    return Namespace(output=folder, **(numbers | grid | changes))


def put(args: Namespace, job: dict, logits: list[float], distance: float, chosen: float = 0.1, resumed: bool = False) -> None:
    """A result as the ranks write it: a caption a logit."""
    result = {"job": job, "settings": tool.settings(args), "logits": [[one] for one in logits], "frechet_distance": distance}
    result |= {
        "spread": [[0.8]] * len(logits),
        "chosen": [chosen] * 4,
        "rejected": [0.1] * 4,
        "cpu_s": [60.0, 30.0],
        "wall_s": [1, 1],
        "resumed": resumed,
    }
    file = args.output / "results" / f"{job['name']}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result))


def put_tuning(args: Namespace) -> None:
    """The base at distance 5; β = 500 wins three of four captions, β = 2000 all of them, and for `uniform` only by breaking the pictures."""
    put(args, tool.BASE_TUNING, [0.0] * 4, 5.0)
    for objective, broken in (("dde", 4.0), ("uniform", 5.1)):
        put(args, tool.tuning_job(objective, tool.Setting(500.0, 1e-4)), [1.0, 1.0, 1.0, -1.0], 3.0)
        put(args, tool.tuning_job(objective, tool.Setting(2000.0, 1e-4)), [1.0] * 4, broken)


def test_the_setting_that_wins_most_without_breaking_the_pictures(tmp_path):
    args = arguments(tmp_path)
    put_tuning(args)
    assert tool.choose(args) == {"dde": tool.Setting(2000.0, 1e-4), "uniform": tool.Setting(500.0, 1e-4)}


def test_settings_are_chosen_without_a_held_out_caption():
    args = arguments(Path())
    jobs = tool.tuning_jobs(args)
    assert len(jobs) == 5
    assert {job["captions"] for job in jobs} == {"train"}
    assert all(f"seed={tool.TUNING_SEED}" in job["overrides"] for job in jobs[1:])
    assert [one.rate for one in tool.settings_of(arguments(Path(), rates=[1e-4, 2e-4]), "sft")] == [1e-4, 2e-4]  # no β to vary


def test_runs_of_a_seed_differ_in_nothing_but_what_is_compared():
    chosen = dict.fromkeys(("dde", "uniform", "sft"), tool.Setting(500.0, 1e-4))
    jobs = [tool.final_job(tool.VARIANTS[name], chosen, 3) for name in ("dde", "uniform", "sft", "dde 300-400")]
    common = set.intersection(*(set(job["overrides"]) for job in jobs))
    assert common == {"seed=3", "objective.beta=500.0", "optimizer.learning_rate=0.0001"}
    assert jobs[3]["overrides"][-1] == "objective.timestep_range=[300, 400]"
    assert [job["precomputed"] for job in jobs] == ["seed-3", "seed-3", "seed-3", None]


def test_numbers_of_a_model():
    base = {
        "logits": [[0.0], [0.0]],
        "spread": [[1.0], [1.0]],
        "frechet_distance": 9.0,
        "chosen": [0.1, 0.3],
        "rejected": [0.2, 0.2],
    }
    first = {**base, "logits": [[1.0], [0.0]], "chosen": [0.12, 0.32], "frechet_distance": 4.0}
    second = {**base, "logits": [[1.0], [-1.0]], "chosen": [0.12, 0.36], "frechet_distance": 2.0}
    found = summarise([first, second], base, [first, first])
    assert found["win_rate"]["by_seed"] == [0.75, 0.5]  # an equal one counts half
    assert found["win_rate"]["rate"] == 0.625
    assert found["win_rate"]["prompts"] == 2
    assert found["win_rate_minus_dde"]["mean"] == -0.125
    assert found["frechet_distance"] == {"mean": 3.0, "by_seed": [4.0, 2.0]}
    assert found["chosen_drift"]["by_seed"] == pytest.approx([0.1, 0.2])
    assert found["chosen_drift"]["mean"] == pytest.approx(0.15)
    assert found["rejected_drift"]["mean"] == 0


def test_a_report_of_whole_seeds_says_what_is_missing(tmp_path, capsys):
    args = arguments(tmp_path)
    put_tuning(args)
    with pytest.raises(UserError, match="no seed is done there"):
        tool.report(args)
    put(args, tool.BASE_HELD_OUT, [0.0] * 4, 5.0)
    chosen = tool.choose(args)
    put(args, tool.final_job(tool.VARIANTS["dde"], chosen, 0), [1.0] * 4, 2.0, chosen=0.11)
    put(args, tool.final_job(tool.VARIANTS["uniform"], chosen, 0), [1.0, -1.0, 1.0, -1.0], 3.0)
    put(args, tool.final_job(tool.VARIANTS["dde"], chosen, 1), [-1.0] * 4, 9.0)
    tool.report(args)
    summary = json.loads((tmp_path / "comparison.json").read_text())
    text = (tmp_path / "comparison.md").read_text()
    assert summary["seeds"] == [0]
    assert "1 seed of 2: **not finished**" in text
    assert "| `dde` | 2000, 0.0001 | 100.0% [100.0%, 100.0%] | 100.0% |  | 2.00 (2.00 to 2.00) | 0.800 | +10.0%" in text
    assert "| `uniform` | 500, 0.0001 | 50.0% [0.0%, 100.0%] | 50.0% | -50.0 [-100.0, +0.0] |" in text
    assert "| `uniform` | **75.0%, 3.00** | 100.0%, 5.10 (farther than the base) |" in text
    assert text == capsys.readouterr().out[:-1]
    assert text == markdown(summary)

    # Two bases, four searches, three runs; a minute and half a minute each.
    assert "; 9 trainings and base drawings, 9 + 4 minutes of processor time" in text
    assert r"\*" not in text
    put(args, tool.final_job(tool.VARIANTS["dde"], chosen, 1), [-1.0] * 4, 9.0, resumed=True)
    tool.report(args)
    assert "base drawings, at least 9 + 4 minutes" in (tmp_path / "comparison.md").read_text()


def test_where_all_settings_break_the_pictures_the_table_says_so(tmp_path):
    args = arguments(tmp_path, seeds=1, only=["uniform", "dde", "dde 300-400"])
    put_tuning(args)
    for beta, won in ((500.0, 1.0), (2000.0, -1.0)):
        put(args, tool.tuning_job("dde", tool.Setting(beta, 1e-4)), [won] * 4, 5.5)
    chosen = tool.choose(args)
    assert chosen["dde"] == tool.Setting(500.0, 1e-4)
    for job in tool.final_jobs(args, chosen):
        put(args, job, [0.0] * 4, 5.0)
    tool.report(args)
    text = (tmp_path / "comparison.md").read_text()
    assert "| `uniform` | 500" in text
    for name in ("dde", "dde 300-400"):
        assert rf"| `{name}` \* | 500" in text
    assert "no setting tried was as near to the preferred images as the base" in text


def test_pairs_that_two_ranks_cannot_share_are_refused(tmp_path, capsys, monkeypatch):
    assert [micro_batch(pairs) for pairs in (2, 4, 16, 20, 22, 24)] == [1, 2, 8, 5, 1, 6]
    for pairs in ("0", "7"):
        monkeypatch.setattr(sys, "argv", ["compare_objectives.py", "--output", str(tmp_path), "--pairs", pairs])
        assert tool.main() == 1
        assert f"error: --pairs {pairs}: must be even and 2 or more" in capsys.readouterr().err


def test_results_of_other_settings_are_refused(tmp_path):
    args = arguments(tmp_path)
    put_tuning(args)
    with pytest.raises(UserError, match="of other settings"):
        tool.choose(arguments(tmp_path, steps=3))


@pytest.mark.slow
def test_whole_comparison_in_short(tmp_path):
    output = tmp_path / "compare"
    # Train on 138 pairs instead of 1,135.
    sharding = ["--input", DEMO / "pairs" / "held_out.parquet", "--model", DEMO / "base", "--output", output / "shards"]
    subprocess.run(
        [sys.executable, ROOT / "tools" / "shard_pickapic.py", *sharding], env=environment(), check=True, timeout=PATIENCE
    )
    short = ["--only", "uniform", "sft", "--seeds", "1", "--betas", "500", "--rates", "1e-4", "--steps", "2", "--pairs", "4"]
    short += ["--captions", "5", "--tuning-captions", "3", "--images", "2", "--inference-steps", "2", "--judge-steps", "20"]

    def run() -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "tools" / "compare_objectives.py", "--output", output, *short]
        process = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
        assert process.returncode == 0, process.stderr[-3000:]
        return process

    printed = run().stdout
    results = {file.stem: file for file in (output / "results").iterdir()}
    assert len(results) == 6
    final = json.loads(results["final-uniform-beta500-rate0.0001-seed0"].read_text())
    assert [len(row) for row in final["logits"]] == [2] * 5
    assert (len(final["chosen"]), len(final["rejected"])) == (5, 5)
    base = json.loads(results["base-held_out"].read_text())
    assert final["logits"] != base["logits"]
    assert final["chosen"] != base["chosen"]
    assert min(final["cpu_s"]) > 0
    assert set(json.loads((output / "comparison.json").read_text())["variants"]) == {"uniform", "sft"}
    assert (output / "comparison.md").read_text() in printed
    assert min(Image.open(output / "comparison.png").size) > 100
    assert not list((output / "runs").glob("*/checkpoints"))

    # Only what is missing is done again, with the same numbers.
    times = {name: file.stat().st_mtime_ns for name, file in results.items()}
    results["final-sft-beta500-rate0.0001-seed0"].rename(tmp_path / "before.json")
    again = run().stdout
    assert "1 of 1: final-sft-beta500-rate0.0001-seed0" in again
    assert [name for name, file in results.items() if file.stat().st_mtime_ns != times[name]] == [
        "final-sft-beta500-rate0.0001-seed0"
    ]
    before, after = (
        json.loads(file.read_text()) for file in (tmp_path / "before.json", results["final-sft-beta500-rate0.0001-seed0"])
    )
    assert after["chosen"] == pytest.approx(before["chosen"], abs=1e-6)
    assert (before["resumed"], after["resumed"]) == (False, True)
