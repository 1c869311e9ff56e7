"""Real launches against a plain loop: ranks, micro-batches, ZeRO stages and resume must not change a run."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from dde_ds import NoiseSchedule, load_config
from dde_ds.cli import main
from dde_ds.data.shards import ShardSet
from dde_ds.evaluation.heldout import error_drift
from tests.conftest import DEMO, ROOT, shard
from tests.launching import alone, command, environment, launch, rows, write_config
from tests.pipelines import save_sd
from tests.plain_loop import plain_losses

pytestmark = pytest.mark.slow
ZERO3 = f"deepspeed={ROOT / 'ds_configs' / 'zero3.json'}"


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
def expected(config):
    return plain_losses(load_config(config))


def losses(run_folder) -> list[float]:
    found = rows(run_folder)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["loss"] for row in found]


def assert_done(process: subprocess.CompletedProcess, run_folder) -> None:
    assert process.returncode == 0, process.stderr[-3000:]
    assert (run_folder / "DONE").exists()


def looks(run_folder) -> dict[int, dict[str, float]]:
    """The ``eval/…`` numbers by step."""
    found = {row["step"]: {key: value for key, value in row.items() if key.startswith("eval/")} for row in rows(run_folder)}
    return {step: values for step, values in found.items() if values}


def assert_same_looks(run_folder, config, arguments) -> None:
    """Held-out numbers of this run and of one rank alone; the last ones also from the exported model."""
    other = run_folder.parent / "alone"
    assert_done(alone(config, f"output={other}", *arguments), other)
    found, expected = looks(run_folder), looks(other)
    assert list(found) == [2, 4]
    for step, values in found.items():
        assert values == pytest.approx(expected[step], abs=1e-4)  # loss_uniform has β = 2000
    run = load_config(config, arguments)
    unets = [UNet2DConditionModel.from_pretrained(path, subfolder="unet") for path in (run_folder / "export", run.model.path)]
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler.from_pretrained(run.model.path, subfolder="scheduler"))
    drift = error_drift(*unets, schedule, ShardSet(run.evaluation.path))
    for side in ("chosen", "rejected"):
        moved = drift[f"policy_{side}"] - drift[f"reference_{side}"]
        assert found[4][f"eval/drift_{side}"] == pytest.approx(moved, abs=1e-6)
        assert abs(moved) > 1e-5


def test_two_ranks_zero_2(config, expected, held_out, tmp_path):
    arguments = ["samples.prompts=[dagger, fire]", "samples.inference_steps=2", "samples.every=2", held_out, "evaluation.every=2"]
    process = launch(config, f"output={tmp_path / 'run'}", *arguments)
    assert_done(process, tmp_path / "run")
    assert_same_looks(tmp_path / "run", config, arguments)
    found = losses(tmp_path / "run")
    assert found[0] == torch.tensor(2.0).log().item()
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(found)) == 4, "a run that learns nothing would agree as well"

    assert load_config(tmp_path / "run" / "config.yaml") == load_config(config, [f"output={tmp_path / 'run'}", *arguments])
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "run" / "samples").iterdir())]
    assert [picture.shape for picture in pictures] == [(16, 32, 3)] * 3  # before, in the middle, at the end
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "export")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("dagger", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    base = UNet2DConditionModel.from_pretrained(load_config(config).model.path, subfolder="unet").state_dict()
    moved = [not torch.equal(value, base[name]) for name, value in pipeline.unet.state_dict().items()]
    assert all(moved)

    # A run that ended refuses to start again.
    again = launch(config, f"output={tmp_path / 'run'}")
    assert again.returncode == 1
    assert "holds a run already" in again.stderr


def test_the_losses_depend_on_the_correction(config, expected):
    without = plain_losses(load_config(config, ["objective.correction_weight=0"]))
    assert max(abs(a - b) for a, b in zip(expected, without, strict=True)) > 1e-4


def test_two_ranks_zero_3(config, expected, tmp_path):
    assert_done(launch(config, f"output={tmp_path / 'run'}", ZERO3, "model.gradient_checkpointing=full"), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)
    weights = UNet2DConditionModel.from_pretrained(tmp_path / "run" / "export", subfolder="unet").state_dict()
    base = UNet2DConditionModel.from_pretrained(load_config(config).model.path, subfolder="unet").state_dict()
    assert {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in base.items()}


def test_one_rank_without_a_launcher(config, expected, tmp_path):
    assert_done(alone(config, f"output={tmp_path / 'run'}"), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("before", "after"), [("zero2", "zero3"), ("zero3", "zero2")])
def test_stopped_at_step_3_and_resumed(config, held_out, tmp_path, before, after):
    """By two ranks, then by one rank of the other stage with another micro-batch."""
    run = tmp_path / "run"
    arguments = (f"output={run}", held_out, "evaluation.every=1")
    assert_done(launch(config, *arguments, "steps=3", f"deepspeed={ROOT / 'ds_configs' / before}.json"), run)
    # Two steps on: the first shows the weights and the table, the second Adam's moments.
    other = ("steps=5", "batch.micro=4", f"deepspeed={ROOT / 'ds_configs' / after}.json")
    assert_done(alone(config, "--resume", *arguments, *other), run)
    assert losses(run) == pytest.approx(plain_losses(load_config(config, ["steps=5"])), abs=1e-5)

    # Without a GPU and without DeepSpeed's ranks, the checkpoint gives the model that the run exported.
    assert main(["export", str(run), "--output", str(tmp_path / "exported")]) == 0
    found, expected = (
        UNet2DConditionModel.from_pretrained(path, subfolder="unet").state_dict()
        for path in (tmp_path / "exported", run / "export")
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "| optimizer steps | 5 of 8 pairs |" in card
    assert "| eval/drift_chosen |" in card
    assert card == (run / "export" / "README.md").read_text()

    # The base's held-out errors were measured before the checkpoint was loaded: the drift goes on, it does not begin again.
    drift = [abs(values["eval/drift_chosen"]) for values in looks(tmp_path / "run").values()]
    assert len(drift) == 5
    assert drift[3] > drift[0]


def test_a_model_that_predicts_v(tmp_path, parquet):
    model = save_sd(tmp_path / "model", prediction_type="v_prediction")
    config = write_config(tmp_path / "run.yaml", model, shard(parquet, model, tmp_path / "shards"))
    assert_done(alone(config), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(plain_losses(load_config(config)), abs=1e-5)


def test_sdxl(tmp_path, sdxl_model, sdxl_shards):
    config = write_config(tmp_path / "run.yaml", sdxl_model, sdxl_shards)
    arguments = ["samples.prompts=[dagger]", "samples.inference_steps=2", "data.workers=2", ZERO3]
    assert_done(launch(config, *arguments), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(plain_losses(load_config(config)), abs=1e-5)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "run" / "export")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("dagger", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_all_timesteps_on_a_trained_model(tmp_path, parquet):
    """The demo's base model, w_t up to 214: its errors at the noisy end are small, so float32 repeats there too."""
    shards = shard(parquet, DEMO / "base", tmp_path / "shards")
    optimizer = {"learning_rate": 1e-5, "warmup_steps": 2}
    config = write_config(tmp_path / "run.yaml", DEMO / "base", shards, objective={"beta": 50}, optimizer=optimizer)
    assert_done(launch(config), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(plain_losses(load_config(config)), abs=1e-5)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_bf16(config, tmp_path, stage):
    """Policy and reference take the same path through bfloat16: the first loss is log 2 to the last bit."""
    assert_done(
        launch(config, f"output={tmp_path / 'run'}", "precision=bf16", f"deepspeed={ROOT / 'ds_configs' / stage}.json"),
        tmp_path / "run",
    )
    found = losses(tmp_path / "run")
    assert found[0] == torch.tensor(2.0).log().item()
    assert all(math.isfinite(loss) and loss != found[0] for loss in found[1:])
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "run" / "export", subfolder="unet", torch_dtype=torch.bfloat16)
    base = UNet2DConditionModel.from_pretrained(load_config(config).model.path, subfolder="unet", torch_dtype=torch.bfloat16)
    assert any(not torch.equal(a, b) for a, b in zip(unet.parameters(), base.parameters(), strict=True))


def wait_for_rows(run_folder, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (run_folder / "metrics.jsonl").exists() or len(rows(run_folder)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
    _, stderr = process.communicate(timeout=120)
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
    process.communicate(timeout=60)
    (run / "checkpoints" / ".staging").mkdir(exist_ok=True)  # as if the kill had hit a save
    steps = len(rows(run)) + 2
    assert_done(launch(config, *settings, f"steps={steps}", "--resume", "auto"), run)
    assert losses(run) == pytest.approx(plain_losses(load_config(config, [*settings, f"steps={steps}"])), abs=1e-5)
