"""The pictures draw what the formulas say: every line against numbers computed here, in float64, without the objective's code."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image

from dde_ds import build_objective
from dde_ds.cli import main
from dde_ds.engine.checkpoint import STATE, TABLE
from dde_ds.report import explain
from tests.engine.test_checkpoint import list_anew
from tests.support.launching import write_config

safetensors = pytest.importorskip("safetensors.torch")

ALL = ("dde", "dde_single", "dde_step", "uniform", "discounted")
STABLE_DIFFUSION = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
LINEAR = np.linspace(0.001, 0.2, 50)


def weights(betas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w_t, λ_t and Σ_{j>t} λ_j, (T,) each, from the definitions: λ with σ_t² written out, and a sum for each t."""
    alpha_bar = np.cumprod(1 - betas)
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    variance = betas * (1 - before) / (1 - alpha_bar)
    stepwise = np.zeros(len(betas))
    stepwise[1:] = (betas**2 / (1 - betas) / (1 - alpha_bar))[1:] / (2 * variance[1:])
    return (1 - alpha_bar) / alpha_bar, stepwise, tail(stepwise)


def tail(values: np.ndarray) -> np.ndarray:
    return np.array([values[t + 1 :].sum() for t in range(len(values))])


def push_and_credit(name: str, betas: np.ndarray, beta: float, margins: np.ndarray, correction: np.ndarray):
    """σ(-z_t) and (β/2) g_t σ(-z_t); ``correction`` is η K_t where the objective has one."""
    count = len(betas)
    single_shot = weights(betas)[0]
    gain = {"dde": single_shot, "dde_single": single_shot, "discounted": 0.9 ** (50 / count * np.arange(count)[::-1])}
    gain = gain.get(name, np.ones(count))
    z = -(beta / 2) * (gain * margins + (correction if name in ("dde", "dde_step") else 0.0))
    push = np.exp(-np.logaddexp(0, z))
    return push, beta / 2 * gain * push


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures instead of writing their files."""
    import matplotlib.pyplot as plot

    figures = []
    monkeypatch.setattr(explain, "_save", lambda figure, path: figures.append(figure))
    yield figures
    plot.close("all")


def lines(axis) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """x and y of the lines that the legend names."""
    found = {line.get_label(): line.get_data() for line in axis.get_lines() if not line.get_label().startswith("_")}
    if found:
        assert [text.get_text() for text in axis.get_legend().get_texts()] == list(found)
    return {name: tuple(np.asarray(values, dtype=float) for values in data) for name, data in found.items()}


def marks(axis) -> list[tuple[float, float]]:
    return [tuple(float(values[0]) for values in line.get_data()) for line in axis.get_lines() if line.get_marker() == "o"]


def assert_line(found, x, y) -> None:
    np.testing.assert_array_equal(found[0], x)
    np.testing.assert_allclose(found[1], y, rtol=1e-9, atol=1e-15)


def test_the_reference_has_the_numbers_of_the_design():
    single_shot, stepwise, reach = weights(STABLE_DIFFUSION)
    assert [single_shot[t] for t in (0, 500, 999)] == pytest.approx([0.00085, 2.61883, 213.58774], abs=5e-6)
    assert [stepwise[t] for t in (0, 1, 500, 999)] == pytest.approx([0, 0.50319, 0.00335, 0.00610], abs=5e-6)
    assert [reach[t] for t in (0, 500, 999)] == pytest.approx([6.5277, 2.2107, 0], abs=5e-5)


def test_a_picture_is_written(tmp_path, capsys):
    sizes = []
    for name, options in (("sub/all.png", []), ("credit.png", ["--objective", "dde", "sft", "--credit-only"])):
        assert main(["explain", *options, "--output", str(tmp_path / name)]) == 0
        with Image.open(tmp_path / name) as image:
            image.load()
            sizes.append(image.size)
    assert sizes[0] != sizes[1]
    printed = capsys.readouterr().out
    assert "417" in printed
    assert "flat" in printed
    assert "credit.png" in printed


@pytest.fixture
def other_schedule(tmp_path) -> Path:
    """A model folder with no more in it than a noise schedule, unlike Stable Diffusion's."""
    config = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "linear",
        "beta_start": 0.001,
        "beta_end": 0.2,
        "num_train_timesteps": 50,
    }
    (tmp_path / "model" / "scheduler").mkdir(parents=True)
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("options", "betas", "beta", "margin", "names"),
    [
        ([], STABLE_DIFFUSION, 2000, 1e-3, ALL),
        (["--beta", "500", "--margin", "1e-2", "--objective", "dde_step", "dde"], STABLE_DIFFUSION, 500, 1e-2, ("dde_step", "dde")),
        (["--model"], LINEAR, 2000, 1e-3, ALL),
    ],
)
def test_from_the_schedule(drawn, other_schedule, tmp_path, options, betas, beta, margin, names):
    options = [*options, str(other_schedule)] if options == ["--model"] else options
    assert main(["explain", *options, "--output", str(tmp_path / "a.png")]) == 0
    (figure,) = drawn
    credit, weight, correction, push = (lines(axis) for axis in figure.axes)
    every = np.arange(len(betas))
    single_shot, stepwise, reach = weights(betas)

    assert list(credit) == list(push) == list(names)
    peaks = []
    for name in names:
        expected = push_and_credit(name, betas, beta, np.full(len(betas), -margin), -margin * reach)
        assert_line(push[name], every, expected[0])
        assert_line(credit[name], every, expected[1] / expected[1].max())
        if name != "uniform":  # which has no peak
            peaks.append((expected[1].argmax(), 1.0))
    assert marks(figure.axes[0]) == peaks

    assert list(weight) == ["$w_t = 1/SNR$, single-shot", "$λ_t$, stepwise", "$Σ_{j>t} λ_j$, the correction's reach"]
    for found, x, y in zip(weight.values(), (every, every[1:], every), (single_shot, stepwise[1:], reach), strict=True):
        assert_line(found, x, y)
    assert list(correction) == [f"margin -{factor * margin:g}" for factor in (0.1, 1, 10)]
    for found, factor in zip(correction.values(), (0.1, 1, 10), strict=True):
        assert_line(found, every[:-1], factor * margin * reach[:-1])
        assert (np.diff(found[1]) < 0).all(), "falls with t"


def test_the_credit_alone(drawn, tmp_path, capsys):
    options = ["--beta", "500", "--margin", "1e-4", "--objective", "dde", "sft", "--credit-only"]
    assert main(["explain", *options, "--output", str(tmp_path / "a.png")]) == 0
    (figure,) = drawn
    (axis,) = figure.axes
    found = lines(axis)
    assert list(found) == ["dde", "sft"]
    reach = weights(STABLE_DIFFUSION)[2]
    _, expected = push_and_credit("dde", STABLE_DIFFUSION, 500, np.full(1000, -1e-4), -1e-4 * reach)
    assert_line(found["dde"], np.arange(1000), expected / expected.max())
    assert_line(found["sft"], np.arange(1000), np.ones(1000))
    assert marks(axis) == [(expected.argmax(), 1.0)]
    assert str(expected.argmax()) in capsys.readouterr().out
    assert "β = 500, every pair 0.0001 ahead" in axis.get_title()


def test_a_spread_of_margins(drawn, tmp_path):
    """The mean of g_t σ(-z) over normal margins, here by their quantiles: the peak leaves the middle for the noisy end."""
    options = ["--margin", "1e-3", "--spread", "1e-3", "--objective", "dde", "--credit-only"]
    assert main(["explain", *options, "--output", str(tmp_path / "a.png")]) == 0
    (axis,) = drawn[0].axes
    reach, quantiles = weights(STABLE_DIFFUSION)[2], NormalDist(-1e-3, 1e-3).inv_cdf
    pairs = 4000
    credit = sum(
        push_and_credit("dde", STABLE_DIFFUSION, 2000, np.full(1000, quantiles((i + 0.5) / pairs)), -1e-3 * reach)[1]
        for i in range(pairs)
    )
    _, found = lines(axis)["dde"]
    np.testing.assert_allclose(found, credit / credit.max(), atol=0.005)
    assert credit.argmax() == 999
    assert "pairs 0.001 ± 0.001 ahead" in axis.get_title()
    assert main(["explain", *options[:3], "0", *options[4:], "--output", str(tmp_path / "a.png")]) == 0
    assert marks(drawn[1].axes[0]) == [(417, 1.0)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--objective", "ddee"], "did you mean 'dde'"),
        (["--margin", "0"], "--margin 0.0: must be above 0"),
        (["--spread", "-1"], "--spread -1.0: must be a finite number, 0 or more"),
        (["--run", "/nowhere", "--spread", "0"], "--spread: a run has its own objective"),
        (["--run", "/nowhere"], "--run /nowhere: no config.yaml"),
        (["--run", "/nowhere", "--beta", "500"], "--beta: a run has its own objective"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, named):
    assert main(["explain", *arguments, "--output", str(tmp_path / "a.png")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


SAMPLES, STEPS, LOGGED, BUCKETS = 500, 20, [0, 100, 500, 900], 50


@pytest.fixture
def recorded(tmp_path, sd_model, sd_shards, schedule):
    """Makes a run folder of an objective: twenty steps of made-up errors, the last of them two steps after the one before. Returns its
    table as it should be: the averages of the margin and the four errors, (5,50), and how many pairs each of 50 buckets has seen."""

    def record(**options) -> tuple[np.ndarray, np.ndarray]:
        write_config(tmp_path / "config.yaml", sd_model, sd_shards, objective=options)
        objective = build_objective(**options, schedule=schedule)
        generator = np.random.default_rng(0)
        sums, rows = np.zeros((6, BUCKETS)), []
        for step in [*range(1, STEPS), STEPS + 1]:
            t = generator.integers(100, 900, SAMPLES)
            errors = generator.random((4, SAMPLES)) * (0.2 + t / 1000)
            margins = -1e-3 * generator.random(SAMPLES) * step
            objective.table.add(*(torch.from_numpy(values) for values in (t, margins, errors)))
            objective.commit()
            sums *= 0.9
            for b in range(BUCKETS):
                own = (t >= 20 * b) & (t < 20 * (b + 1))
                sums[:, b] += [*np.vstack([margins, errors])[:, own].sum(1), own.sum()]
            averages = np.divide(sums[:5], sums[5], out=np.zeros((5, BUCKETS)), where=sums[5] > 0)
            if objective.correction_weight:
                correction = tail(weights(STABLE_DIFFUSION)[1] * averages[0].repeat(20))[LOGGED]
                rows.append({"step": step, "timesteps": LOGGED, "correction": correction.tolist()})
        credits = [
            {"step": step, "credit": generator.random(50).tolist(), "pairs": [6.0] * 50} for step in [*range(1, STEPS), STEPS + 1]
        ]
        (tmp_path / "credit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in credits))
        (tmp_path / "correction.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        save_table(tmp_path, 21, objective)
        return averages, sums[5]

    return record


def save_table(run: Path, step: int, objective) -> None:
    """A checkpoint of which nothing but the correction table is ever read."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    safetensors.save_file(objective.state_dict(), folder / TABLE)
    for name in (STATE, "state-00000-000.safetensors"):
        (folder / name).write_text("not read")
    list_anew(folder)


def binned(values: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres and means of two buckets, 40 timesteps, each, where any was seen."""
    seen = [b for b in range(0, BUCKETS, 2) if count[b : b + 2].any()]
    means = [np.average(values[b : b + 2], weights=count[b : b + 2]) for b in seen]
    return np.array([20.0 * b + 20 for b in seen]), np.array(means)


def axes(figure) -> tuple:
    assert len(figure.axes) == 5
    return tuple(figure.axes)


def explained(folder: Path) -> list[str]:
    return ["explain", "--run", str(folder), "--output", str(folder / "run.png")]


def test_from_a_run(drawn, recorded, tmp_path, capsys):
    averages, count = recorded(name="dde", beta=500.0, correction_weight=2.0, timestep_range=[100, 800])
    assert main(explained(tmp_path)) == 0
    (figure,) = drawn
    credit, history, correction, drift, pace = axes(figure)
    every = np.arange(1000)
    expected = tail(weights(STABLE_DIFFUSION)[1] * averages[0].repeat(20))
    assert list(lines(correction)) == ["last checkpoint"]
    assert_line(lines(correction)["last checkpoint"], every, expected)

    margins = np.interp(every, *binned(averages[0], count))
    _, taught = push_and_credit("dde", STABLE_DIFFUSION, 500, margins, 2 * expected)
    taught[:100] = taught[800:] = 0  # never drawn
    over_pairs = "dde, over 1,500 pairs, to step 21"
    assert list(lines(credit)) == ["dde, at the mean margin", over_pairs]
    assert_line(lines(credit)["dde, at the mean margin"], every, taught / taught.max())
    assert marks(credit) == [(taught.argmax(), 1.0)]
    rows = [json.loads(line) for line in (tmp_path / "credit.jsonl").read_text().splitlines()]
    given = np.sum([row["credit"] for row in rows if row["step"] >= 16], axis=0)  # beyond three quarters of 21
    assert_line(lines(credit)[over_pairs], np.arange(10, 1000, 20), given / given.max())
    printed = capsys.readouterr().out
    for tenth in range(10):
        assert f"{100 * taught[100 * tenth : 100 * tenth + 100].sum() / taught.sum():.1f}" in printed
        assert f"{100 * given[5 * tenth : 5 * tenth + 5].sum() / given.sum():.1f}" in printed

    rows = [json.loads(line) for line in (tmp_path / "correction.jsonl").read_text().splitlines()]
    assert list(lines(history)) == [f"step {step}" for step in (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21)]
    for row in rows:
        if f"step {row['step']}" in lines(history):
            assert_line(lines(history)[f"step {row['step']}"], LOGGED, row["correction"])

    _, chosen, rejected, reference_chosen, reference_rejected = averages
    assert list(lines(drift)) == ["chosen", "rejected"]
    assert_line(lines(drift)["chosen"], *binned(chosen - reference_chosen, count))
    assert_line(lines(drift)["rejected"], *binned(rejected - reference_rejected, count))

    table = np.array([row["correction"] for row in rows])
    moved = np.abs(np.diff(table, axis=0)).mean(1) / np.abs(table[-1]).mean()
    moved[-1] /= 2  # two steps
    (line,) = pace.get_lines()
    assert_line(line.get_data(), [*range(2, STEPS), STEPS + 1], moved)
    assert pace.get_xlabel() == "step"


def test_a_picture_of_a_run_is_written(recorded, tmp_path):
    recorded(name="dde")
    assert main(explained(tmp_path)) == 0
    with Image.open(tmp_path / "run.png") as image:
        image.load()


def test_the_credit_of_a_run_alone(drawn, recorded, tmp_path):
    recorded(name="dde")
    (tmp_path / "credit.jsonl").write_text("")  # as in a run of an earlier version
    assert main([*explained(tmp_path), "--credit-only"]) == 0
    (axis,) = drawn[0].axes
    assert list(lines(axis)) == ["dde, at the mean margin"]


def test_a_correction_that_grows_by_the_same_each_step_moves_as_far_at_its_end():
    rows = [{"step": step, "correction": [-2.0 * step, -1.0 * step, 0.0]} for step in (5, 10, 15, 20)]
    assert explain.pace(rows) == ([10, 15, 20], pytest.approx([0.05] * 3))
    assert explain.pace(rows[:1]) == explain.pace([]) == ([], [])


def test_from_a_run_without_a_correction(drawn, recorded, tmp_path):
    """And the share of each timestep in what is drawn is part of its credit: 'sample' has no other."""
    averages, count = recorded(name="discounted", beta=500.0, discount_mode="sample")
    assert main(explained(tmp_path)) == 0
    credit, history, correction, drift, pace = axes(drawn[0])
    every = np.arange(1000)
    margins = np.interp(every, *binned(averages[0], count))
    expected = 0.9 ** (0.05 * every[::-1]) / (1 + np.exp(-250 * margins))
    assert list(lines(credit)) == ["discounted, at the mean margin", "discounted, over 1,500 pairs, to step 21"]
    assert_line(lines(credit)["discounted, at the mean margin"], every, expected / expected.max())
    assert_line(lines(correction)["last checkpoint"], every, np.zeros(1000))
    assert "no correction" in correction.get_title()
    assert len(lines(drift)) == 2
    assert not lines(history)
    assert all(len(line.get_xdata()) == 0 for line in pace.get_lines())


def test_a_run_that_cannot_be_explained(tmp_path, sd_model, sd_shards, schedule, capsys):
    config = write_config(tmp_path / "config.yaml", sd_model, sd_shards, objective={"name": "dde"})
    assert main(explained(tmp_path)) == 1
    assert "no checkpoint there yet" in capsys.readouterr().err

    save_table(tmp_path, 2, build_objective("dde", schedule))
    assert main(explained(tmp_path)) == 1
    assert "holds no sample yet" in capsys.readouterr().err

    config.write_text(config.read_text().replace("name: dde", "name: sft"))
    assert main(explained(tmp_path)) == 1
    assert "compares with no reference" in capsys.readouterr().err
    assert not (tmp_path / "run.png").exists()
