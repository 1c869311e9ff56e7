"""Stable Diffusion 2 from pairs to the files that other programs read: both of its kinds of prediction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from dde_ds import UserError, load_config
from dde_ds.cli import main
from dde_ds.data.shards import ShardSet
from dde_ds.engine.export import KOHYA_FILE
from dde_ds.training.prepare import open_shards
from tests.conftest import shard
from tests.support.launching import Run, launch_many, rows, write_config
from tests.support.pipelines import save_sd2
from tests.support.reference_loop import plain_losses
from tests.test_lora import load, predict

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory, parquet) -> dict[str, tuple[Path, Path]]:
    """(base, folder of its run) by what it predicts: all of the UNet was trained for noise, adapters for v."""
    folder = tmp_path_factory.mktemp("sd2")
    bases = {kind: save_sd2(folder / kind, kind) for kind in ("epsilon", "v_prediction")}
    shards = shard(parquet, bases["epsilon"], folder / "shards")  # of both: they differ in the scheduler alone
    assert ShardSet(shards).manifest["settings"]["family"] == "sd"
    runs = []
    for kind, base in bases.items():
        changes = {"lora": {"rank": 2}} if kind == "v_prediction" else {}
        config = write_config(
            folder / f"{kind}-run" / "run.yaml", base, shards, steps=2, batch={"pairs": 8, "micro_batch_size": 4}, **changes
        )
        runs.append(Run(config))
    assert [outcome.code for outcome in launch_many(runs, ranks=1)] == [0, 0]
    return {kind: (base, folder / f"{kind}-run" / "run") for kind, base in bases.items()}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def draw(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipeline("a cat", height=16, width=16, **options).images


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_trained_as_by_a_plain_loop(made, kind):
    _, run = made[kind]
    losses = [row["loss"] for row in rows(run) if "loss" in row]
    assert losses == pytest.approx(plain_losses(load_config(run / "config.yaml")), rel=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_single_file_draws_what_the_folder_draws(made, kind, tmp_path, capsys):
    base, run = made[kind]
    path = tmp_path / "model.safetensors"
    assert main(["export", str(run), "--output", str(path), "--format", "single", "--dtype", "fp32"]) == 0
    velocity = kind == "v_prediction"
    assert ("programs guess that of a single file of Stable Diffusion 2" in capsys.readouterr().out) == velocity
    said = metadata(path)
    assert said["modelspec.architecture"] == ("stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512")
    assert said["modelspec.prediction_type"] == ("v" if velocity else "epsilon")
    single = StableDiffusionPipeline.from_single_file(path, config=str(base), local_files_only=True)
    folder = StableDiffusionPipeline.from_pretrained(run / "export")
    assert torch.equal(draw(single), draw(folder))
    assert not torch.equal(draw(folder), draw(StableDiffusionPipeline.from_pretrained(base)))


def test_adapters_say_which_models_they_are_for(made, tmp_path):
    base, run = made["v_prediction"]
    out, path = tmp_path / "lora", tmp_path / "kohya.safetensors"
    for target, form in ((out, "lora"), (path, "kohya")):
        assert main(["export", str(run), "--output", str(target), "--format", form, "--dtype", "fp32"]) == 0
    for said in (metadata(path), metadata(out / KOHYA_FILE)):
        assert said["ss_v2"] == "True" and said["ss_base_model_version"] == "sd_v2_v"
        assert said["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
        assert said["modelspec.implementation"] == "diffusers"
    merged = predict(load(run / "export"))
    for file in (out, path):
        pipeline = StableDiffusionPipeline.from_pretrained(base)
        pipeline.load_lora_weights(file)
        assert torch.allclose(predict(pipeline.unet), merged, atol=1e-5)


def test_shards_of_stable_diffusion_1_are_refused(made, sd_shards):
    _, run = made["epsilon"]
    config = load_config(run / "config.yaml", [f"data.path={sd_shards}"])
    with pytest.raises(
        UserError, match=r"embeddings of its captions are 16 wide, the UNet of model.path .* takes 24; shard the pairs"
    ):
        open_shards(config)
