"""A real run of LoRA adapters against a plain loop with peft, from the launch to what a user loads."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open

from dde_ds import NoiseSchedule, load_config
from dde_ds.cli import main
from dde_ds.data.shards import ShardSet
from dde_ds.engine.checkpoint import WeightReader, list_checkpoints, read_state
from dde_ds.engine.export import KOHYA_FILE
from dde_ds.models.unet import load_unet
from dde_ds.training.heldout import error_drift
from tests.conftest import DEMO, shard
from tests.support.launching import alone, launch, rows, shipped, write_config
from tests.support.reference_loop import plain_losses

pytestmark = pytest.mark.slow
LORA = {"rank": 4, "alpha": 6, "targets": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1"]}


def test_adapters_from_the_launch_to_the_user(tmp_path, parquet, sd_model, sd_shards):
    """Three steps by two ranks of ZeRO-3, two more by one rank of ZeRO-2."""
    folder = tmp_path / "held_out"
    folder.mkdir()
    pq.write_table(pq.read_table(DEMO / "pairs" / "held_out.parquet").slice(20, 7), folder / "pairs.parquet")
    config = write_config(
        tmp_path / "run.yaml",
        sd_model,
        sd_shards,
        lora=LORA,
        ema={"decay": 0.5},
        optimizer={"learning_rate": 5e-3, "warmup_steps": 2},
        checkpoint={"every": 1, "keep": 5},
        samples={"prompts": ["dagger"], "inference_steps": 2, "every": 3},
        evaluation={"path": str(shard(folder / "pairs.parquet", sd_model, folder / "shards")), "every": 1},
    )
    run, zero3 = tmp_path / "run", shipped(tmp_path, "zero3")
    process = launch(config, "steps=3", zero3, "model.gradient_checkpointing=full")
    assert process.returncode == 0, process.stderr[-3000:]
    process = alone(config, "--resume", "steps=5", "batch.micro_batch_size=4")
    assert process.returncode == 0, process.stderr[-3000:]

    losses = [row["loss"] for row in rows(run)]
    assert losses[0] == torch.tensor(2.0).log().item()
    assert losses == pytest.approx(plain_losses(load_config(config, ["steps=5"])), abs=1e-5)
    assert max(losses) - min(losses) > 1e-3, "a run that learns nothing would agree as well"

    # A checkpoint holds the adapters alone, and the average that a plain loop over its weights gives.
    checkpoints = list_checkpoints(run / "checkpoints")
    readers = [WeightReader(checkpoint) for checkpoint in checkpoints]
    names = [name.removesuffix("/weight") for name in readers[0].names if name.endswith("/weight")]
    assert names
    assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in names)
    for name in names:
        average = readers[0].read(f"{name}/weight")
        for k, reader in enumerate(readers[1:], 1):
            decay = min(0.5, (1 + k) / (10 + k))
            average = decay * average + (1 - decay) * reader.read(f"{name}/weight")
        assert torch.allclose(readers[-1].read(f"{name}/ema"), average, atol=1e-6)
    state = read_state(checkpoints[-1])
    assert state["config"]["lora"]["rank"] == 4
    assert state["versions"].keys() >= {"dde_ds", "torch", "deepspeed", "diffusers", "peft"}

    # The run left a pipeline, and beside it the adapters for the base, in two files: the same model three times.
    merged = StableDiffusionPipeline.from_pretrained(run / "export")
    loaded = StableDiffusionPipeline.from_pretrained(sd_model)
    loaded.load_lora_weights(run / "export")
    kohya = StableDiffusionPipeline.from_pretrained(sd_model)
    kohya.load_lora_weights(run / "export" / KOHYA_FILE)
    for pipeline in (merged, loaded, kohya):
        pipeline.set_progress_bar_config(disable=True)
    images, base = [], StableDiffusionPipeline.from_pretrained(sd_model)
    for pipeline in (merged, loaded, base, kohya):
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline("dagger", num_inference_steps=2, output_type="latent", generator=generator).images)
    assert torch.allclose(images[0], images[1], atol=1e-5)
    assert torch.allclose(images[0], images[3], atol=1e-5)
    assert (images[0] - images[2]).abs().max() > 1e-4

    # What the looks measured during the run is the model of the last step, not the average.
    assert main(["export", str(run), "--output", str(tmp_path / "raw"), "--raw", "--max-shard-size", "100KB"]) == 0
    unets = [load_unet(str(path)) for path in (tmp_path / "raw", sd_model)]
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler.from_pretrained(sd_model, subfolder="scheduler"))
    drift = error_drift(*unets, schedule, ShardSet(str(folder / "shards")))
    moved = drift["policy_chosen"] - drift["reference_chosen"]
    assert rows(run)[-1]["eval/drift_chosen"] == pytest.approx(moved, abs=1e-6)
    assert abs(moved) > 1e-5
    assert len(list((tmp_path / "raw" / "unet").glob("*.safetensors"))) > 1
    assert "moving average" in (run / "export" / "README.md").read_text()
    assert "moving average" not in (tmp_path / "raw" / "README.md").read_text()

    # The other two forms, of the average again.
    assert main(["export", str(run), "--output", str(tmp_path / "lora"), "--format", "lora", "--dtype", "bf16"]) == 0
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118 (not a dict)
    single = tmp_path / "model.safetensors"
    assert main(["export", str(run), "--output", str(single), "--format", "single"]) == 0
    back = StableDiffusionPipeline.from_single_file(single, config=str(sd_model), local_files_only=True)
    expected = merged.unet.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in back.unet.state_dict().items())
    with safe_open(single, "pt") as file:
        assert "| LoRA | rank 4, α 6" in file.metadata()["model_card"]
