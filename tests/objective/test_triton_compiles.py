"""The kernels compile for a Hopper GPU, without one. A process of its own: Triton is in interpreter mode in the others."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from dde_ds import NoiseSchedule
from dde_ds.objective.passes_torch import Wanted
from dde_ds.objective.schedule import NoiseTarget

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BEYOND_32_BITS = 2**40


class Hopper:
    """A driver with the answers that Triton's JIT needs before it compiles."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """A stand-in for a kernel. A launch specialises the kernel to the arguments and compiles it, but does not run it."""

    def __init__(self, kernel):
        self.kernel, self.binaries = kernel, set()

    def __getitem__(self, grid):
        return partial(self.launch, grid=grid)

    def launch(self, **arguments):
        self.binaries.add(self.kernel.warmup(**arguments).asm["cubin"])


EVERYTHING = Wanted(moved=True, teach_moved=True, inner=True)


def calls():
    """Predictions of policy and reference with their target, as the JIT tells them apart: by type, by what is 1, by width of strides. Then
    what more is wanted of them, where there is more."""
    policy, reference, noisy = torch.zeros(3, 4, 4, 8, 8).bfloat16()
    noise, timesteps = torch.zeros(2, 4, 8, 8), torch.tensor([300, 700]).repeat(2)
    yield policy, reference, NoiseTarget(noise)
    yield policy, None, NoiseTarget(noise)
    yield policy[:2], reference[:2], NoiseTarget(noise[:1])  # one pair
    yield policy[:1], reference[:1], NoiseTarget(noise[:1])  # each its own noise
    target = NoiseSchedule.from_scheduler(BETAS | {"prediction_type": "v_prediction"}).target(noise, timesteps, noisy)
    assert target.scale.dtype == torch.float64
    yield policy, reference, target
    yield policy.contiguous(memory_format=torch.channels_last), reference, target
    yield policy.double(), reference.double(), NoiseTarget(noise.double(), target.scale, target.shift, noisy.double())
    # Strides of dimensions of one element, which are never multiplied with more than 0.
    far = torch.zeros(64).as_strided((1, 1, 8, 8), (BEYOND_32_BITS, BEYOND_32_BITS, 8, 1))
    yield far, far.mT, NoiseTarget(far)
    yield policy, reference, NoiseTarget(noise), EVERYTHING
    yield policy, None, NoiseTarget(noise), Wanted(inner=True)
    yield policy, reference, NoiseTarget(noise.repeat(2, 1, 1, 1)), EVERYTHING  # each its own noise
    yield policy, reference, target, EVERYTHING


def compile_all():
    from triton.runtime.driver import driver

    from dde_ds.objective import passes_triton

    driver.set_active(Hopper())
    passes_triton._sums_kernel = sums = Compiled(passes_triton._sums_kernel)
    passes_triton._gradient_kernel = gradient = Compiled(passes_triton._gradient_kernel)
    found = list(calls())
    for policy, reference, target, *wanted in found:
        passes_triton.sums(policy, reference, target, *(wanted or [Wanted()]))
        grad = torch.zeros(len(policy))
        passes_triton.gradient(policy, target, grad, (reference, grad) if wanted and wanted[0].teach_moved else None)
    assert len(sums.binaries) == len(found), "calls that were to differ had the same kernel"
    # To it a reference makes no difference, unless what has moved is taught, and an inner product none at all.
    assert len(gradient.binaries) == len(found) - 2


def test_for_hopper():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = f"from {__name__} import compile_all; compile_all()"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[2])
