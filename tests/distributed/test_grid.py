"""One trajectory per kind of UNet, whatever the ranks, the stage, the accumulation, the checkpointing and the reference's place.

Every run of the suite launches the few settings that cover all pairs of values; ``pytest -m grid`` launches all 128.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import combinations
from pathlib import Path

import pytest
import torch

from dde_ds import load_config
from tests.conftest import DEMO, shard
from tests.distributed.grid import EVERY, KINDS, RANKS, TRAJECTORIES, Setting, covering, run, trajectory, write_grid_config
from tests.support.launching import launch_many
from tests.support.reference_loop import plain_steps

LOSS, NORM = 1e-5, 1e-4
BIAS = 2e-6
"""Limit of the mean distance over all settings that share a value: rounding cancels in it, and a wrong weight does not."""
COLUMNS = [field.name for field in fields(Setting)]


@pytest.fixture(scope="module")
def configs(tmp_path_factory, sd_model, sd_shards, sdxl_model, sdxl_shards) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("grid")
    made = {"sd": (sd_model, sd_shards), "sdxl": (sdxl_model, sdxl_shards)}
    return {kind: write_grid_config(folder / f"{kind}.yaml", *made[kind]) for kind in KINDS}


def launched(settings: Sequence[Setting], configs: dict[str, Path], folder: Path, *overrides: str) -> dict[Setting, list]:
    """Loss and gradient norm of each step of each setting, by one launch for each number of ranks."""
    found = {}
    for ranks in RANKS:
        own = [setting for setting in settings if setting.ranks == ranks]
        runs = [run(setting, configs[setting.kind], folder / str(setting), *overrides) for setting in own]
        for setting, outcome in zip(own, launch_many(runs, ranks, timeout=3600), strict=True):
            assert outcome.code == 0, (setting, outcome.errors)
            found[setting] = trajectory(folder / str(setting))
    return found


def recorded(kind: str) -> list[tuple[float, float]]:
    return [(step["loss"], step["grad_norm"]) for step in json.loads((TRAJECTORIES / f"{kind}.json").read_text())["steps"]]


def assert_follows(found: list[tuple[float, float]], kind: str, loss: float, norm: float) -> None:
    expected = recorded(kind)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=loss)
    assert [value for _, value in found] == pytest.approx([value for _, value in expected], abs=norm)


def residual_means(found: dict[Setting, list]) -> dict[tuple[str, object], float]:
    """Mean distance of the losses from the record, by column and value; the first step's are equal to the last bit and left out."""
    rest: dict[tuple[str, object], list[float]] = {}
    for setting, steps in found.items():
        distances = [loss - expected for (loss, _), (expected, _) in zip(steps, recorded(setting.kind), strict=True)][1:]
        for column in COLUMNS:
            rest.setdefault((column, getattr(setting, column)), []).extend(distances)
    return {key: sum(distances) / len(distances) for key, distances in rest.items()}


def test_the_few_settings_cover_every_pair():
    few = covering()
    for a, b in combinations(COLUMNS, 2):
        assert {(getattr(s, a), getattr(s, b)) for s in few} == {(getattr(s, a), getattr(s, b)) for s in EVERY}


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_loop_follows_the_record(configs, kind):
    """The plain loop follows the record too, so order, draws and shards still give the recorded numbers."""
    run = load_config(configs[kind])
    assert_follows(plain_steps(run), kind, LOSS, NORM)
    assert_follows(plain_steps(run, torch.float64), kind, 1e-6, 1e-5)
    losses, norms = zip(*recorded(kind), strict=True)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-8)
    assert min(abs(a - b) for a, b in combinations(losses, 2)) > 5 * LOSS, "a run that learns nothing would agree as well"
    assert min(norms) > run.optimizer.max_grad_norm, "every step is clipped"
    without = plain_steps(load_config(configs[kind], ["objective.correction_weight=0"]))
    assert max(abs(loss - own) for loss, (own, _) in zip(losses, without, strict=True)) > 5 * LOSS, "a missing correction is seen"


@pytest.fixture(scope="module")
def few(configs, tmp_path_factory):
    return launched(covering(), configs, tmp_path_factory.mktemp("few"))


@pytest.mark.slow
@pytest.mark.parametrize("setting", covering(), ids=str)
def test_a_setting_changes_nothing(few, setting):
    assert few[setting][0][0] == torch.tensor(2.0).log().item()
    assert_follows(few[setting], setting.kind, LOSS, NORM)


@pytest.mark.slow
def test_what_a_setting_leaves_is_rounding(few):
    means = residual_means(few)
    assert {key: mean for key, mean in means.items() if abs(mean) > BIAS} == {}
    # A loss that is wrong by a thousandth would be seen.
    wrong = {setting: [(loss * 1.001, norm) for loss, norm in steps] for setting, steps in few.items()}
    assert min(map(abs, residual_means(wrong).values())) > BIAS


@pytest.mark.grid
def test_rounding_at_the_default_beta(parquet, tmp_path, capsys):
    """Check the statement of ds_configs/README.md for a trained base: β and the timesteps' weights multiply float32's rounding."""
    config = write_grid_config(tmp_path / "run.yaml", DEMO / "base", shard(parquet, DEMO / "base", tmp_path / "shards"))
    zero2, zero3 = (Setting("sd", 2, stage, 2, "none", "replicated") for stage in (2, 3))
    changes = ("steps=20", "objective={beta: 2000}", "optimizer.learning_rate=1e-5")
    runs = {
        "ZeRO-2": run(zero2, config, tmp_path / "two", *changes),
        "the same again": run(zero2, config, tmp_path / "again", *changes),
        "ZeRO-3": run(zero3, config, tmp_path / "three", *changes),
        "micro-batches of 1": run(zero2, config, tmp_path / "micro", *changes, "batch.micro_batch_size=1"),
    }
    assert [outcome.code for outcome in launch_many(list(runs.values()), 2)] == [0] * 4
    losses = [[loss for loss, _ in trajectory(tmp_path / name)] for name in ("two", "again", "three", "micro")]
    apart = [max(abs(a - b) for a, b in zip(losses[0], other, strict=True)) for other in losses]
    with capsys.disabled():
        print({name: f"{value:.0e}" for name, value in zip(runs, apart, strict=True)})
    assert {other[0] for other in losses} == {losses[0][0]}
    assert apart[1] == 0
    assert max(apart) < 2e-4


@pytest.mark.grid
def test_no_setting_changes_anything(configs, tmp_path, capsys):
    """All of them, and what is left of a difference between two values of a column is rounding, not bias."""
    found = launched(EVERY, configs, tmp_path)
    distances = [
        abs(loss - expected)
        for setting, steps in found.items()
        for (loss, _), (expected, _) in zip(steps, recorded(setting.kind), strict=True)
    ]
    means = residual_means(found)
    with capsys.disabled():
        print(f"\n{len(found)} settings, largest distance of a loss {max(distances):.1e}")
        for column in COLUMNS:
            print(column, {value: f"{mean:+.1e}" for (name, value), mean in means.items() if name == column})
    assert {key: mean for key, mean in means.items() if abs(mean) > BIAS} == {}
    for setting, steps in found.items():
        assert_follows(steps, setting.kind, LOSS, NORM)
