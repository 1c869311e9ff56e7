"""On a CUDA device the objective gives the CPU's numbers."""

from __future__ import annotations

import pytest
import torch

from dde_ds import build_objective

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_objective_on_cuda(schedule):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    reference = noise.repeat(2, 1, 1, 1) + 0.1 * torch.randn(4, 4, 8, 8, generator=generator)
    policy = reference + 0.01 * torch.randn(4, 4, 8, 8, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        objective = build_objective("dde", schedule, beta=50.0)
        prediction = policy.to(device).requires_grad_()
        for _ in range(2):  # the second sees the first one's table
            out = objective(prediction, reference.to(device), noise.to(device), torch.tensor([300, 700], device=device))
            objective.commit()
        out.loss.backward()
        found.append((out.loss.cpu(), prediction.grad.cpu(), objective.state_dict()["average"]))
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cpu, cuda, rtol=1e-5, atol=1e-8)
