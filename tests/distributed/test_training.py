"""Real launches against a plain loop: ranks, micro-batches, ZeRO stages and resume must not change a run."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from dde_ds import NoiseSchedule, load_config
from dde_ds.cli import main
from dde_ds.data.shards import ShardSet
from dde_ds.engine.checkpoint import list_checkpoints
from dde_ds.rows import read_rows
from dde_ds.training.heldout import error_drift
from tests.conftest import DEMO, ROOT, shard
from tests.support.launching import (
    PATIENCE,
    Outcome,
    Run,
    command,
    environment,
    launch,
    launch_many,
    rows,
    wait_for_rows,
    write_config,
)
from tests.support.pipelines import save_sd
from tests.support.reference_loop import plain_losses, plain_steps

pytestmark = pytest.mark.slow
BF16_LOSS, BF16_NORM = 0.02, 0.25


@pytest.fixture(scope="module")
def config(tmp_path_factory, sd_model, sd_shards):
    return write_config(tmp_path_factory.mktemp("sd") / "run.yaml", sd_model, sd_shards)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory, sd_model):
    """Seven pairs that no run trains on: they do not divide by two ranks."""
    folder = tmp_path_factory.mktemp("held_out")
    pq.write_table(pq.read_table(DEMO / "pairs" / "held_out.parquet").slice(20, 7), folder / "pairs.parquet")
    return f"evaluation.path={shard(folder / 'pairs.parquet', sd_model, folder / 'shards')}"


@pytest.fixture(scope="module")
def expected_steps(config):
    """Loss and gradient norm of each step."""
    return plain_steps(load_config(config))


@pytest.fixture(scope="module")
def expected(expected_steps):
    return [loss for loss, _ in expected_steps]


@pytest.fixture(scope="module")
def other_configs(tmp_path_factory, parquet, sdxl_model, sdxl_shards) -> dict[str, Path]:
    """Write the configurations for other models, and return them by the names of their runs."""
    folder = tmp_path_factory.mktemp("others")
    v_model = save_sd(folder / "v" / "model", prediction_type="v_prediction")
    demo = {"objective": {"beta": 50}, "optimizer": {"learning_rate": 1e-5, "warmup_steps": 2}}
    return {
        "sdxl": write_config(folder / "sdxl" / "run.yaml", sdxl_model, sdxl_shards),
        "v": write_config(folder / "v" / "run.yaml", v_model, shard(parquet, v_model, folder / "v" / "shards")),
        "demo": write_config(
            folder / "demo" / "run.yaml", DEMO / "base", shard(parquet, DEMO / "base", folder / "demo" / "shards"), **demo
        ),
    }


@pytest.fixture(scope="module")
def settling(tmp_path_factory, sd_model, sd_shards) -> Path:
    """A run whose correction comes to rest: 50 timesteps, so that each is seen in most steps, and long enough for the pairs to be learnt.

    A correction settles when σ(-z) has shut off the gradient. At β = 20 the margins where that happens are large beside the noise of a
    batch and of an Adam step at a constant rate; near the noisy end single pairs would go on pushing, hence timesteps below 30.
    """
    folder = tmp_path_factory.mktemp("settling")
    model = shutil.copytree(sd_model, folder / "model")
    scheduler = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    steps = {"num_train_timesteps": 50, "beta_start": 0.017, "beta_end": 0.24}  # about the signal at the end that 1000 leave
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler | steps))
    changes = {"batch": {"pairs": 32, "micro_batch_size": 32}, "steps": 240, "log": {"every": 5}}
    changes["objective"] = {"name": "dde", "beta": 20, "timestep_range": [0, 30]}
    return write_config(folder / "run.yaml", model, sd_shards, optimizer={"learning_rate": 3e-3}, **changes)


LOOKING = ("samples.prompts=[dagger, fire]", "samples.inference_steps=2", "samples.every=2", "evaluation.every=2")
TRACKED = "log.trackers=[tensorboard]"


@pytest.fixture(scope="module")
def ended(config, held_out, other_configs, settling, tmp_path_factory) -> dict[str, tuple[Path, Outcome]]:
    """Output folder and outcome of runs by their name: first those of two ranks, then those of one."""
    folder = tmp_path_factory.mktemp("runs")
    output = {name: f"output={folder / name}" for name in ("zero2", "zero3", "looking", "alone", "bf16-zero2", "bf16-zero3")}
    every_step = (held_out, "evaluation.every=1")
    two = {
        "looking": Run(config, [output["looking"], held_out, *LOOKING, TRACKED]),
        "again": Run(config, [output["looking"]]),
        "zero2 stopped": Run(config, [output["zero2"], *every_step, "steps=3"]),
        "zero3 stopped": Run(config, [output["zero3"], *every_step, "steps=3", "model.gradient_checkpointing=full", stage(3)]),
        "bf16-zero2": Run(config, [output["bf16-zero2"], "precision=bf16"]),
        "bf16-zero3": Run(config, [output["bf16-zero3"], "precision=bf16", stage(3)]),
        "sdxl": Run(other_configs["sdxl"], ["samples.prompts=[dagger]", "samples.inference_steps=2", "data.workers=2", stage(3)]),
        "demo": Run(other_configs["demo"]),
    }
    # By one rank of the other stage with another micro-batch. Two steps on: the first shows the weights and the table, the second
    # Adam's moments.
    other = (*every_step, "steps=5", "batch.micro_batch_size=4")
    one = {
        "alone": Run(config, [output["alone"], held_out, *LOOKING]),
        "zero2": Run(config, [output["zero2"], *other, stage(3)], "required"),
        "zero3": Run(config, [output["zero3"], *other, stage(2)], "required"),
        "v": Run(other_configs["v"]),
        "settling": Run(settling),
    }
    found = {}
    for ranks, runs in ((2, two), (1, one)):
        for (name, run), outcome in zip(runs.items(), launch_many(list(runs.values()), ranks), strict=True):
            found[name] = (Path(load_config(run.config, run.overrides).output), outcome)
    return found


def stage(number: int) -> str:
    return f"deepspeed={ROOT / 'ds_configs' / f'zero{number}.json'}"


def done(ended, name: str) -> Path:
    folder, outcome = ended[name]
    assert outcome.code == 0, outcome
    assert (folder / "DONE").exists()
    return folder


def losses(run_folder) -> list[float]:
    found = rows(run_folder)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["loss"] for row in found]


def unet(folder, **options) -> dict[str, torch.Tensor]:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **options).state_dict()


def assert_done(process: subprocess.CompletedProcess, run_folder) -> None:
    assert process.returncode == 0, process.stderr[-3000:]
    assert (run_folder / "DONE").exists()


def looks(run_folder) -> dict[int, dict[str, float]]:
    """The ``eval/…`` numbers by step."""
    found = {row["step"]: {key: value for key, value in row.items() if key.startswith("eval/")} for row in rows(run_folder)}
    return {step: values for step, values in found.items() if values}


def test_two_ranks_zero_2(ended, config, expected):
    run = done(ended, "looking")
    found = losses(run)
    assert found[0] == torch.tensor(2.0).log().item()
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(found)) == 4, "a run that learns nothing would agree as well"

    pictures = [np.asarray(Image.open(path)) for path in sorted((run / "samples").iterdir())]
    assert [picture.shape for picture in pictures] == [(16, 32, 3)] * 3  # before, in the middle, at the end
    pipeline = StableDiffusionPipeline.from_pretrained(run / "export")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("dagger", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    base = unet(load_config(config).model.path)
    moved = [not torch.equal(value, base[name]) for name, value in pipeline.unet.state_dict().items()]
    assert all(moved)


def test_the_resolved_configuration_is_kept(ended, config, held_out):
    run = done(ended, "looking")
    assert load_config(run / "config.yaml") == load_config(config, [f"output={run}", held_out, *LOOKING, TRACKED])


def test_a_run_that_ended_refuses_to_start_again(ended):
    _, outcome = ended["again"]
    assert outcome.code == 1
    assert all("holds a run already" in error for error in outcome.errors)
    assert len(outcome.errors) == 2


def test_held_out_numbers_do_not_depend_on_the_ranks(ended, config):
    """Compare the numbers of two ranks with those of one rank. Compare the last numbers also with those of the exported model."""
    two, one = done(ended, "looking"), done(ended, "alone")
    found, expected = looks(two), looks(one)
    assert list(found) == [2, 4]
    for step, values in found.items():
        assert values == pytest.approx(expected[step], abs=1e-4)  # loss_uniform has β = 2000
    run = load_config(two / "config.yaml")
    unets = [UNet2DConditionModel.from_pretrained(path, subfolder="unet") for path in (two / "export", run.model.path)]
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler.from_pretrained(run.model.path, subfolder="scheduler"))
    drift = error_drift(*unets, schedule, ShardSet(run.evaluation.path))
    for side in ("chosen", "rejected"):
        moved = drift[f"policy_{side}"] - drift[f"reference_{side}"]
        assert found[4][f"eval/drift_{side}"] == pytest.approx(moved, abs=1e-6)
        assert abs(moved) > 1e-5


def test_a_tracker_gets_every_row_and_the_samples(ended):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = done(ended, "looking")
    found = EventAccumulator(str(run / "tensorboard")).Reload()
    written = {row["step"]: row["loss"] for row in rows(run)}
    assert {event.step: event.value for event in found.Scalars("loss")} == pytest.approx(written)
    assert [event.step for event in found.Images("samples")] == [0, 2, 4]


def test_the_losses_depend_on_the_correction(config, expected):
    without = plain_losses(load_config(config, ["objective.correction_weight=0"]))
    assert max(abs(a - b) for a, b in zip(expected, without, strict=True)) > 1e-4


def test_one_rank(ended, expected):
    assert losses(done(ended, "alone")) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("before", ["zero2", "zero3"])
def test_stopped_at_step_3_and_resumed(ended, config, tmp_path, before):
    """Train with two ranks, then resume with one rank, under the other ZeRO stage and with another micro-batch."""
    assert ended[f"{before} stopped"][1].code == 0
    run = done(ended, before)
    assert losses(run) == pytest.approx(plain_losses(load_config(config, ["steps=5"])), abs=1e-5)
    assert "2 ranks" in ended[f"{before} stopped"][1].stdout
    assert "1 ranks x 2 micro-batches of 4; resumed after step 3" in ended[before][1].stdout

    # Without a GPU and without DeepSpeed's ranks, the checkpoint gives the model that the run exported.
    assert main(["export", str(run), "--output", str(tmp_path / "exported")]) == 0
    found, expected = unet(tmp_path / "exported"), unet(run / "export")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "| optimizer steps | 5 of 8 pairs |" in card
    assert "| eval/drift_chosen |" in card
    assert card == (run / "export" / "README.md").read_text()
    # So does a copy of it elsewhere, without the run's numbers.
    copy = shutil.copytree(list_checkpoints(run / "checkpoints")[-1], tmp_path / "copied")
    assert main(["export", str(copy), "--output", str(tmp_path / "from a copy")]) == 0
    found = unet(tmp_path / "from a copy")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert "eval/" not in (tmp_path / "from a copy" / "README.md").read_text()

    # The base's held-out errors were measured before the checkpoint was loaded: the drift goes on, it does not begin again.
    drift = [abs(values["eval/drift_chosen"]) for values in looks(run).values()]
    assert len(drift) == 5
    assert drift[3] > drift[0]


def test_the_correction_falls_with_t_and_settles(ended):
    """The paper's sec. 4.4, on what a run logged. The quarters of the run are compared by their averages. A correction that grew on at
    the same pace would move as far from the third to the last as between any two: measured by its own growing size it would seem to settle.
    """
    history = read_rows(done(ended, "settling") / "correction.jsonl")
    assert [row["step"] for row in history] == list(range(5, 241, 5))
    correction = torch.tensor([row["correction"] for row in history], dtype=torch.float64)
    taught = torch.tensor(history[0]["timesteps"]) < 30
    quarters = correction.view(4, 12, -1)

    later = quarters[1:, :, taught].flatten(0, 1)  # in the first some timesteps were seen once or never, and little was learnt
    assert (later < 0).all(), "the policy came to prefer the winners"
    assert (later.diff(dim=1) > 0).all(), "its size falls with t at every row"
    assert not correction[:, ~taught].any()

    moved = quarters.mean(1).diff(dim=0).abs().mean(1)
    assert moved[-1] < moved.max() / 3  # 0.14 of it at the most by seeds 0 to 9


def test_a_model_that_predicts_v(ended, other_configs):
    assert losses(done(ended, "v")) == pytest.approx(plain_losses(load_config(other_configs["v"])), abs=1e-5)


def test_sdxl_zero_3(ended, other_configs, sdxl_model):
    run = done(ended, "sdxl")
    assert losses(run) == pytest.approx(plain_losses(load_config(other_configs["sdxl"])), abs=1e-5)
    pipeline = StableDiffusionXLPipeline.from_pretrained(run / "export")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("dagger", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    found, base = unet(run / "export"), unet(sdxl_model)
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in base.items()}
    assert not any(torch.equal(value, base[name]) for name, value in found.items())


def test_all_timesteps_on_a_trained_model(ended, other_configs):
    """The demo's base model, w_t up to 214: its errors at the noisy end are small, so float32 repeats there too."""
    assert losses(done(ended, "demo")) == pytest.approx(plain_losses(load_config(other_configs["demo"])), abs=1e-5)


@pytest.mark.parametrize("name", ["bf16-zero2", "bf16-zero3"])
def test_bf16(ended, config, expected, expected_steps, name):
    """Policy and reference take the same path through bfloat16: the first loss is log 2 to the last bit. Then β/2 · w_t makes much of
    what bfloat16 leaves of a margin: 0.008 of a loss at the most where this was measured, and 16 % of a gradient's norm."""
    run = done(ended, name)
    found = losses(run)
    assert found[0] == torch.tensor(2.0).log().item()
    assert all(math.isfinite(loss) and loss != found[0] for loss in found[1:])
    assert found == pytest.approx(expected, abs=BF16_LOSS)
    assert [row["grad_norm"] for row in rows(run)] == pytest.approx([norm for _, norm in expected_steps], rel=BF16_NORM)
    exported, base = (unet(path, torch_dtype=torch.bfloat16) for path in (run / "export", load_config(config).model.path))
    assert any(not torch.equal(value, base[key]) for key, value in exported.items())


def start(config, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        command(config, *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_stop_file_and_resume(config, tmp_path):
    """Asked to stop, a run saves, leaves with 75, and goes on as if nothing had been."""
    run = tmp_path / "run"
    process = start(config, f"output={run}", "steps=5000", "optimizer.learning_rate=1e-5")
    wait_for_rows(run, 2, process)
    (run / "STOP").touch()
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, stderr[-3000:]
    assert not (run / "DONE").exists()
    steps = len(rows(run)) + 2
    arguments = (f"output={run}", f"steps={steps}", "optimizer.learning_rate=1e-5")
    assert_done(launch(config, *arguments, "--resume"), run)
    assert losses(run) == pytest.approx(plain_losses(load_config(config, arguments)), abs=1e-5)


def test_killed_and_resumed(config, tmp_path):
    """KILL to everything at once: the newest whole checkpoint and the rows up to it count."""
    run = tmp_path / "run"
    settings = (f"output={run}", "optimizer.learning_rate=1e-5", "checkpoint.every=2")
    process = start(config, *settings, "steps=5000")
    wait_for_rows(run, 5, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    (run / "checkpoints" / ".staging").mkdir(exist_ok=True)  # as if the kill had hit a save
    steps = len(rows(run)) + 2
    assert_done(launch(config, *settings, f"steps={steps}", "--resume", "auto"), run)
    assert losses(run) == pytest.approx(plain_losses(load_config(config, [*settings, f"steps={steps}"])), abs=1e-5)
