"""Nothing in a micro-batch or a commit makes the host wait for the device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dde_ds import NoiseSchedule, build_objective
from dde_ds.objective.losses import OBJECTIVES
from dde_ds.training.metrics import Averages

# Operators whose result the host must see: its value, or its shape.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero", "bincount"}


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        assert name not in WAITING, f"{name} makes the host wait"
        # On a GPU a copy from the host's pageable memory waits as well: tables must not travel with every call.
        assert name != "_to_copy" or "device" not in (kwargs or {}), "a copy between devices"
        return operator(*args, **(kwargs or {}))


def work(objective, device):
    """Two micro-batches, their backward passes, the metrics' sums and the end of the step."""
    generator = torch.Generator(device).manual_seed(0)
    averages = Averages()
    timesteps = torch.tensor([3, 500, 999], device=device)
    noise, policy, reference, noisy = (torch.randn(n, 2, 4, 4, device=device, generator=generator) for n in (3, 6, 6, 6))
    policy.requires_grad_()
    yield
    for _ in range(2):
        out = objective(policy, reference, noise, timesteps, noisy)
        torch.autograd.grad(out.loss, policy)
        averages.add(out)
    objective.commit()
    yield


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_the_cpu_by_operators(name, prediction_type):
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type}
    running = work(build_objective(name, NoiseSchedule.from_scheduler(config)), "cpu")
    next(running)
    with NoWaiting():
        next(running)


def test_what_would_wait_is_found():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        torch.ones(1).item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_a_gpu_by_the_driver(name, schedule):
    objective = build_objective(name, schedule).to("cuda")
    for _ in (1, 2):  # the first compiles the kernels
        running = work(objective, "cuda")
        next(running)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            next(running)
        finally:
            torch.cuda.set_sync_debug_mode(before)
