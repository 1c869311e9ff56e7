"""Nothing in a micro-batch, its backward pass included, makes the host wait for the device: whole UNets, in each way of checkpointing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dde_ds import NoiseSchedule, build_objective
from dde_ds.models.checkpointing import set_checkpointing
from dde_ds.models.unet import load_unet
from dde_ds.training.batches import Batch
from dde_ds.training.guards import Guards
from dde_ds.training.metrics import Averages
from dde_ds.training.reference import frozen_model
from dde_ds.training.step import micro_step
from tests.objective.test_no_synchronisation import NoCopies


def work(model, mode: str, schedule: NoiseSchedule, device: str):
    policy, reference = (load_unet(str(model)).to(device) for _ in range(2))
    reference.requires_grad_(False)
    set_checkpointing(policy, mode)
    objective = build_objective("dde", schedule).to(device)
    width = policy.config.cross_attention_dim
    batch = Batch(
        latents=torch.randn(4, 4, 8, 8, device=device),
        noise=torch.randn(2, 4, 8, 8, device=device),
        timesteps=torch.tensor([3, 700]).to(device),
        prompt_embeds=torch.randn(4, 7, width, device=device),
        positions=torch.tensor([0, 1]),
    )
    if policy.config.addition_embed_type == "text_time":
        sizes = {"pooled_prompt_embeds": torch.randn(4, 16, device=device), "time_ids": torch.ones(4, 6, device=device)}
        batch = dataclasses.replace(batch, **sizes)
    guards, averages = Guards(1), Averages()
    yield
    for _ in range(2):
        out = micro_step(policy, frozen_model(reference), objective, batch, torch.device(device))
        guards.watch(out.loss, batch).backward()
        averages.add(out)
    yield


MODES = pytest.mark.parametrize("mode", ["none", "selective", "every_2", "full"])
MODELS = pytest.mark.parametrize("model", ["sd_model", "sdxl_model"])


@MODELS
@MODES
def test_on_the_meta_device(request, model, mode, schedule):
    running = work(request.getfixturevalue(model), mode, schedule, "meta")
    next(running)
    with NoCopies():
        next(running)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@MODELS
@MODES
def test_on_a_gpu_by_the_driver(request, model, mode, schedule):
    for _ in (1, 2):  # the first compiles kernels and makes handles
        running = work(request.getfixturevalue(model), mode, schedule, "cuda")
        next(running)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            next(running)
        finally:
            torch.cuda.set_sync_debug_mode(before)
