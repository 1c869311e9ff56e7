"""Per-sample noise-prediction errors of policy and reference in one read, with nothing kept for the backward pass but the inputs.

Shapes: N samples of C·H·W elements. Written as plain autograd, the differences, their float32 copies and their squares would each
live until the backward pass, at the size of the whole prediction. The two passes are Triton kernels on CUDA (``passes_triton``) and
PyTorch elsewhere (``passes_torch``); on a CPU, predictions too small for that to matter go through autograd after all.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dde_ds.errors import UserError
from dde_ds.objective import passes_torch
from dde_ds.objective.schedule import NoiseTarget

# Up to here, eight pairs of SD1.5 latents or two of SDXL's, a CPU is done sooner than with a function of our own. Autograd keeps 1 MB.
SMALL_ELEMENTS = 2**18


def noise_errors(policy_pred: Tensor, reference_pred: Tensor | None, target: NoiseTarget) -> tuple[Tensor, Tensor | None]:
    """Mean squared error of each sample's noise prediction, by policy and by reference.

    Args:
        policy_pred: the policy's output, (N,C,H,W), any floating dtype and stride. The only input that takes a gradient.
        reference_pred: the reference's, same shape; None where there is none.
        target: what both are compared with.

    Returns:
        (N,) errors each. Accumulated and given back in float32 (float64 for float64 predictions) whatever the inputs' dtype: at
        β = 5000 the rounding of a bfloat16 mean alone would move the logit by more than 1. Equal predictions that
        lie alike in memory have equal errors, on a CPU to the last bit; on a GPU a test tells.
    """
    shape, noise = policy_pred.shape, target.noise.shape
    if len(shape) != 4 or 0 in shape:
        raise UserError(f"predictions have shape {tuple(shape)}: expected (N,C,H,W), none of them 0")
    if noise[1:] != shape[1:] or noise[0] not in (shape[0], shape[0] / 2):
        raise UserError(f"noise has shape {tuple(noise)}, the predictions {tuple(shape)}: expected (N or N/2,C,H,W)")
    for other, name in ((reference_pred, "the reference's prediction"), (target.noisy, "x_t")):
        if other is not None and other.shape != shape:
            raise UserError(f"{name} has shape {tuple(other.shape)}, the policy's prediction {tuple(shape)}")
    if policy_pred.device.type == "cpu" and policy_pred.numel() <= SMALL_ELEMENTS:
        return passes_torch.plain_errors(policy_pred, reference_pred, target)
    return _NoiseErrors.apply(policy_pred, reference_pred, target.noise, target.scale, target.shift, target.noisy)


class _NoiseErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, policy, reference, *target):
        ctx.save_for_backward(policy, *target)
        ctx.set_materialize_grads(False)
        policy_error, reference_error = _passes(policy.device.type).errors(policy, reference, NoiseTarget(*target))
        if reference_error is not None:
            ctx.mark_non_differentiable(reference_error)
        return policy_error, reference_error

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        policy, *target = ctx.saved_tensors
        gradient = None if grad is None else _passes(policy.device.type).gradient(policy, NoiseTarget(*target), grad)
        return gradient, *[None] * 5


@functools.cache
def _passes(device: str):
    """The module whose ``errors`` and ``gradient`` run there."""
    triton = device == "cuda" and importlib.util.find_spec("triton") is not None
    return importlib.import_module(f"dde_ds.objective.passes_{'triton' if triton else 'torch'}")
