"""β by its effect, on real runs of a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml

from dde_ds import UserError, load_config
from dde_ds.cli import main
from dde_ds.objective.objective import Objective
from dde_ds.report.beta import measure_beta
from dde_ds.training.loop import train
from tests.support.launching import rows, write_config

STEPS = 10


@pytest.fixture(scope="module")
def ran(tmp_path_factory, sd_model, sd_shards):
    """A run of each of two objectives at a β too low to matter, what it came to by float64, and a second one at the β that follows."""
    folder = tmp_path_factory.mktemp("beta")
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    gains = {"dde": (1 - alpha_bar) / alpha_bar, "uniform": np.ones(1000)}
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        called, seen = Objective.__call__, []

        def recorded(self, policy, reference, noise, timesteps, *rest, **options):
            errors = [
                (value.detach().double() - noise.double().repeat(2, 1, 1, 1)).square().mean((1, 2, 3))
                for value in (policy, reference)
            ]
            winner, loser = (errors[0] - errors[1]).chunk(2)
            seen.append((winner - loser, timesteps))
            return called(self, policy, reference, noise, timesteps, *rest, **options)

        patch.setattr(Objective, "__call__", recorded)
        for name, gain in gains.items():
            options = {"name": name, "beta": 2, "timestep_range": [0, 600]}
            first = once(folder / name, sd_model, sd_shards, options)
            m, t = (torch.cat(values) for values in zip(*seen, strict=True))
            late = slice(8 * (STEPS // 2), 8 * STEPS)
            expected = -(torch.from_numpy(gain)[t] * m)[late].mean().item()
            seen.clear()
            again = once(folder / f"{name}-again", sd_model, sd_shards, options | {"beta": measure_beta(first).beta_for(0.5)})
            seen.clear()
            found[name] = (first, expected, again)
    return found


def once(folder, model, shards, objective):
    folder.mkdir()
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 2}
    batch = {"pairs": 8, "micro_batch_size": 4}
    config = write_config(folder / "run.yaml", model, shards, steps=STEPS, objective=objective, optimizer=optimizer, batch=batch)
    assert train(load_config(config)) == 0
    assert torch.backends.cudnn.allow_tf32, "the run turned it off for itself alone"
    return folder / "run"


@pytest.mark.parametrize("name", ["dde", "uniform"])
def test_by_float64(ran, name):
    run, expected, _ = ran[name]
    found = measure_beta(run)
    assert found == (name, 2, pytest.approx(expected, rel=5e-3), 5, 6, 10, pytest.approx(1))
    assert found.beta_for(0.5) == pytest.approx(2 * 0.5 / expected, rel=5e-3)
    assert found.beta_for(5) == pytest.approx(10 * found.beta_for(0.5))


@pytest.mark.parametrize("name", ["dde", "uniform"])
def test_the_effect_comes_about(ran, name):
    """A second run at the suggested β has the mean z that was asked for, though it learns at that β from the first step on."""
    assert measure_beta(ran[name][2]).mean_z == pytest.approx(0.5, rel=0.35)


def test_what_is_printed(ran, capsys):
    run, expected, _ = ran["uniform"]
    assert main(["suggest-beta", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("uniform: mean z without the correction ") and lines[0].endswith("(5 rows, steps 6 to 10)")
    assert [line.partition(" = ")[0] for line in lines[1:]] == ["mean z 0.5: β", "mean z 5: β"]
    small, large = (float(line.rpartition(" ")[2]) for line in lines[1:])
    assert (small, large) == (pytest.approx(1 / expected, rel=0.02), pytest.approx(10 / expected, rel=0.02))


@pytest.fixture
def made(tmp_path, sd_model, sd_shards):
    """A run folder with rows that are made up: {step: mean of -(β/2) g m, or None}."""

    def make(margins: dict[int, float | None], **objective):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        config = write_config(tmp_path / "run.yaml", sd_model, sd_shards, objective={"name": "uniform", "beta": 100, **objective})
        (folder / "config.yaml").write_text(load_config(config).to_yaml())
        lines = [
            {"step": step, "loss": 0.6} | ({} if value is None else {"rewards/margins": value}) for step, value in margins.items()
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert len(rows(folder)) == len(margins)
        return folder

    return make


def test_rows_count_by_the_steps_that_they_average(made, capsys):
    """Also the one that reaches back before the window, whole; a row of skipped steps has no number."""
    folder = made({15: 9.0, 25: 1.0, 30: None, 31: 3.0, 40: 4.0, 50: 7.0})
    assert measure_beta(folder) == ("uniform", 100, pytest.approx((10 * 1.0 + 1 * 3.0 + 9 * 4.0) / 20), 3, 25, 40, pytest.approx(1))
    assert main(["suggest-beta", str(folder)]) == 0
    assert "note: a mean z above 1 slows learning down" in capsys.readouterr().out
    assert main(["suggest-beta", str(folder), "--steps", "30"]) == 0
    assert "(1 row, steps 25 to 25)\nmean z 0.5: β = 50\nmean z 5: β = 500\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("margins", "objective", "arguments", "message"),
    [
        ({}, {}, [], "no row of metrics.jsonl for steps 21 to 40 holds rewards/margins; the run has none yet"),
        ({40: None}, {}, [], "the run has none yet"),
        ({100: 1.0, 200: 2.0}, {}, [], "steps 21 to 40 holds rewards/margins; the first row with one is of step 100"),
        ({20: 1.0, 40: float("nan")}, {}, [], "the first row with one is of step 20"),
        ({30: -0.5, 40: 0.25}, {}, [], "the mean z is -0.3125 in steps 30 to 40, not above 0"),
        ({40: 0.0}, {}, [], "the mean z is 0 in steps 40 to 40, not above 0"),
        ({40: 1.0}, {"name": "sft"}, [], "sft compares with no reference and has no z"),
        ({40: 1.0}, {}, ["--steps", "0"], "--steps 0: must be 1 or more"),
    ],
)
def test_runs_that_say_nothing_of_beta(made, capsys, margins, objective, arguments, message):
    assert main(["suggest-beta", str(made(margins, **objective)), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_run(tmp_path, capsys):
    assert main(["suggest-beta", str(tmp_path)]) == 1
    assert "no config.yaml there; name the output folder of a run" in capsys.readouterr().err


def test_where_the_mean_z_does_not_follow_from_beta(made):
    for objective, message in (
        ({"name": "kto"}, "kto has a loss of its own"),
        ({"link": "ipo"}, "the link ipo pulls every z to 1/2"),
    ):
        with pytest.raises(UserError, match=message):
            measure_beta(made({40: 1.0}, **objective))
    assert measure_beta(made({40: 1.0}, link="sigmoid")).objective == "uniform link sigmoid"


def test_steps_of_a_warm_up_are_said_to_be_that(made, capsys):
    """The row averages steps 1 to 40 of a warm-up of 200: (1 + … + 40) / 40 / 200 of the rate."""
    folder = made({40: 0.5})
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["optimizer"]["warmup_steps"] = 200
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert measure_beta(folder).rate_share == pytest.approx(20.5 / 200)
    assert main(["suggest-beta", str(folder)]) == 0
    assert "note: these steps ran at 10% of optimizer.learning_rate, in its warm-up" in capsys.readouterr().out
