"""Nothing in a micro-batch or a commit makes the host wait for the device.

Without a GPU on the meta device: it has shapes and no values, so that reading one raises, and a table that stayed on the host has to be
copied there."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dde_ds import NoiseSchedule, build_objective
from dde_ds.objective.links import LINKS
from dde_ds.objective.specs import OBJECTIVES
from dde_ds.training.metrics import Averages


class NoCopies(TorchDispatchMode):
    """A copy between devices waits on a GPU: tables and numbers must not travel with every call."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        devices = {each.device.type for each in (*args, found) if isinstance(each, torch.Tensor)}
        assert devices <= {"meta"}, f"{operator} touches {devices}"
        return found


EVERY = [(name, {}) for name in OBJECTIVES] + [
    *(("dde", {"link": link, "winner_preserving": 0.6}) for link in LINKS),
    *(("dde", {"link": link, "label_smoothing": 0.1, "credit": "mean"}) for link in LINKS if LINKS[link].smoothing),
    *(("dde", {"link": link, "soft_labels": True, "single_shot": "calibrated"}) for link in LINKS if LINKS[link].soft_labels),
]


def work(objective, device):
    """Two micro-batches, their backward passes, the metrics' sums and the end of the step."""
    averages = Averages()
    timesteps = torch.tensor([3, 500, 999], device=device)
    noise, policy, reference, noisy = (torch.randn(n, 2, 4, 4, device=device) for n in (3, 6, 6, 6))
    policy.requires_grad_()
    labels = torch.ones(3, device=device)
    yield
    for _ in range(2):
        out = objective(policy, reference, noise, timesteps, noisy, soft_labels=labels if objective.options.soft_labels else None)
        torch.autograd.grad(out.loss, policy)
        averages.add(out)
    objective.commit()
    yield


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_on_the_meta_device(name, options, prediction_type):
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type}
    running = work(build_objective(name, NoiseSchedule.from_scheduler(config), **options).to("meta"), "meta")
    next(running)
    with NoCopies():
        next(running)


@pytest.mark.parametrize(
    "waiting",
    [
        lambda t: t.item(),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: bool(t.any()),
        lambda t: t + torch.ones(1000).to("meta"),
        lambda t: t[t > 0],
        lambda t: t * torch.tensor([0.5] * 1000),
    ],
)
def test_what_would_wait_is_found(waiting):
    with NoCopies(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        waiting(torch.ones(1000, device="meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_on_a_gpu_by_the_driver(name, options, schedule):
    objective = build_objective(name, schedule, **options).to("cuda")
    for _ in (1, 2):  # the first compiles the kernels
        running = work(objective, "cuda")
        next(running)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            next(running)
        finally:
            torch.cuda.set_sync_debug_mode(before)
