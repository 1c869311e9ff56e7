"""The errors' passes hold the gradient and a block, whatever the size of the predictions."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch

from dde_ds.objective import passes_torch
from dde_ds.objective.fused import noise_errors
from dde_ds.objective.passes_torch import BLOCK_ELEMENTS
from dde_ds.objective.schedule import NoiseTarget
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from bench_objective import peak_bytes

# (N,), one of each model, one loss, and what an allocator rounds up.
SMALL = 2**16


@pytest.mark.parametrize("implied", [False, True])
@pytest.mark.parametrize(
    ("device", "block"), [("cpu", 4 * BLOCK_ELEMENTS), pytest.param("cuda", 0, marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_peak_of_both_passes(device, block, implied):
    """Measure bfloat16 predictions of eight blocks. Kernels need no memory for a block."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    policy, reference, noisy = torch.randn(3, 32, 4, 128, 128, device=device).bfloat16()
    scale, shift = torch.rand(2, 32, device=device)
    noise = torch.randn(16, 4, 128, 128, device=device)
    target = NoiseTarget(noise, scale, shift, noisy) if implied else NoiseTarget(noise)
    policy.requires_grad_()

    def both_passes(errors):
        return torch.autograd.grad(errors(policy, reference, target)[0].sum(), policy)

    both_passes(noise_errors)  # what is compiled or cached at the first call does not count
    # x_t in bfloat16 has its block in float32 as well.
    limit = 2 * policy.numel() + (1 + implied) * block + SMALL
    assert 2 * policy.numel() <= peak_bytes(lambda: both_passes(noise_errors), device) <= limit
    plain = partial(passes_torch.plain_sums, wanted=passes_torch.Wanted())
    assert peak_bytes(lambda: both_passes(plain), device) > 2 * limit
