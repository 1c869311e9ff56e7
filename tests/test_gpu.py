"""On a CUDA device the objective gives the CPU's numbers."""

from __future__ import annotations

import pytest
import torch

from dde_ds import NoiseSchedule, build_objective
from dde_ds.objective.fused import noise_errors
from dde_ds.objective.schedule import PREDICTION_TYPES, NoiseTarget

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
T = torch.tensor([300, 700])
SHAPE = (4, 40, 40)  # more than one part of a sample, and no whole number of them


def made_up(prediction_type, shared, dtype, memory_format):
    """Two pairs on the CPU: predictions of policy and reference near the truth, noise, and x_t."""
    generator = torch.Generator().manual_seed(0)
    clean, reference_off, policy_off = torch.randn(3, 4, *SHAPE, generator=generator)
    noise = torch.randn(2 if shared else 4, *SHAPE, generator=generator)
    schedule = NoiseSchedule.from_scheduler(BETAS | {"prediction_type": prediction_type})
    own = noise.repeat(2, 1, 1, 1) if shared else noise
    noisy = schedule.add_noise(clean, own, T.repeat(2))
    alpha = schedule.alphas_cumprod[T.repeat(2)].view(-1, 1, 1, 1).float()
    truth = {"epsilon": own, "v_prediction": alpha.sqrt() * own - (1 - alpha).sqrt() * clean, "sample": clean}[prediction_type]
    reference = truth + 0.1 * reference_off
    policy = reference + 0.01 * policy_off
    policy, reference = (each.to(dtype).contiguous(memory_format=memory_format) for each in (policy, reference))
    return schedule, policy, reference, noise, noisy


def two_steps(device, schedule, policy, reference, noise, noisy):
    """Loss and gradient of the second step, which sees the table of the first, and the table. All on the CPU."""
    objective = build_objective("dde", schedule, beta=50.0)
    prediction = policy.to(device).requires_grad_()
    for _ in range(2):
        out = objective(prediction, *(each.to(device) for each in (reference, noise, T, noisy)))
        objective.commit()
    (gradient,) = torch.autograd.grad(out.loss, prediction)
    assert gradient.device == prediction.device
    return out.loss.detach().cpu(), gradient.cpu().float(), objective.state_dict()["sums"]


def assert_the_cpus_numbers(device, *case):
    inputs = made_up(*case)
    loss, gradient, table = two_steps("cpu", *inputs)
    found_loss, found_gradient, found_table = two_steps(device, *inputs)
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found_table, table, rtol=1e-4, atol=1e-8)
    # Of the gradient's type, whose last bit may differ.
    torch.testing.assert_close(
        found_gradient, gradient, rtol=max(1e-4, torch.finfo(inputs[1].dtype).eps), atol=1e-5 * gradient.abs().max().item()
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_objective_on_cuda(prediction_type, shared, dtype, memory_format):
    assert_the_cpus_numbers("cuda", prediction_type, shared, dtype, memory_format)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_on_a_device_that_is_not_the_current_one():
    assert_the_cpus_numbers("cuda:1", "v_prediction", True, torch.bfloat16, torch.contiguous_format)


def test_more_samples_than_a_grids_second_axis_has():
    policy, reference = torch.randn(2, 70_000, 1, 2, 2)
    target = NoiseTarget(torch.randn(70_000, 1, 2, 2))
    found = noise_errors(policy.cuda(), reference.cuda(), NoiseTarget(target.noise.cuda()))
    for cuda, cpu in zip(found, noise_errors(policy, reference, target), strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu)
