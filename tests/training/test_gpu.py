"""Whole runs on a GPU, one rank: pinned batches, ZeRO's streams, fused AdamW, checkpoints and the export; and what the host waits for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dde_ds import NoiseSchedule, build_objective, initialize, load_config
from dde_ds.distributed.group import start
from dde_ds.engine.update import apply_if_finite
from dde_ds.engine.zero import complete_config
from dde_ds.models.unet import load_unet
from dde_ds.training.batches import Batch
from dde_ds.training.guards import Guards
from dde_ds.training.metrics import Averages
from dde_ds.training.reference import frozen_model
from dde_ds.training.step import micro_step
from tests.conftest import ROOT
from tests.support.launching import PATIENCE, RANK_VARIABLES, rows, shipped, write_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = "cuda"
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


def train(config: Path, *arguments: str) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    command = [sys.executable, ROOT / "launchers" / "train.py", "--config", config, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_hierarchical"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, sd_model, sd_shards, name, precision):
    changes = {"data": {"path": str(sd_shards), "workers": 1, "block_shards": 2}, "precision": precision}
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards, **changes)
    file = shipped(tmp_path, name)
    train(config, file, f"output={tmp_path / 'whole'}")
    train(config, file, f"output={tmp_path / 'broken'}", "steps=2")
    train(config, file, f"output={tmp_path / 'broken'}", "--resume")
    whole, broken = ([row["loss"] for row in rows(tmp_path / run)] for run in ("whole", "broken"))
    assert len(whole) == 4
    # A GPU adds up gradients in another order each time.
    assert broken == pytest.approx(whole, abs=1e-4 if precision == "fp32" else 2e-2)
    assert load_unet(str(tmp_path / "broken" / "export"))


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_the_host_waits_for_nothing(tmp_path, sd_model, sd_shards, name):
    """Check one rank. With more ranks, DeepSpeed reduces gradients beside the backward pass and the host waits: see ds_configs/README.md."""
    start()
    path = write_config(tmp_path / "run.yaml", sd_model, sd_shards, precision="bf16", batch={"pairs": 6, "micro_batch_size": 2})
    config = complete_config(load_config(path, [shipped(tmp_path, name)]), 1)
    policy, reference = initialize(*(load_unet(str(sd_model), precision="bf16") for _ in range(2)), config)
    objective = build_objective("dde", NoiseSchedule.from_scheduler({"beta_schedule": "squaredcos_cap_v2"})).to(DEVICE)
    batch = Batch(
        latents=torch.randn(4, 4, 8, 8).to(DEVICE),
        noise=torch.randn(2, 4, 8, 8).to(DEVICE),
        timesteps=torch.tensor([3, 700]).to(DEVICE),
        prompt_embeds=torch.randn(4, 7, 16).to(DEVICE),
        positions=torch.tensor([0, 1]),
    )
    guards, averages = Guards(1), Averages()

    def micro_batch() -> None:
        out = micro_step(policy, frozen_model(reference), objective, batch, torch.device(DEVICE))
        policy.backward(guards.watch(out.loss, batch))
        averages.add(out)
        if not policy.is_gradient_accumulation_boundary():
            policy.step()

    for _ in range(3):  # steps; DeepSpeed's timer would begin with the third
        for _ in range(2):
            micro_batch()
        with torch.profiler.profile() as profiler:
            micro_batch()
        apply_if_finite(policy)
        objective.commit()
    found = {event.key: event.count for event in profiler.key_averages() if event.key in WAITS}
    # The profiler itself waits once where it ends.
    assert sum(found.values()) <= 1, found
