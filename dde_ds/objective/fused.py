"""Per-sample noise-prediction errors of policy and reference in one read, with nothing kept for the backward pass but the inputs.

Shapes: N samples of C·H·W elements. Written as plain autograd, the differences, their float32 copies and their squares would each
live until the backward pass, at the size of the whole prediction. The two passes are Triton kernels on CUDA (``passes_triton``) and
PyTorch elsewhere (``passes_torch``); on a CPU, predictions too small for that to matter go through autograd after all.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dde_ds.errors import UserError
from dde_ds.objective import passes_torch
from dde_ds.objective.passes_torch import Wanted
from dde_ds.objective.schedule import NoiseTarget

# Up to here, eight pairs of SD1.5 latents or two of SDXL's, a CPU is done sooner than with a function of our own. Autograd keeps 1 MB.
SMALL_ELEMENTS = 2**18


class NoiseSums(NamedTuple):
    """Means over a latent's elements, of one read of N predictions: float32, or float64 for float64 predictions."""

    policy: Tensor
    """‖ε_θ - ε‖², (N,)."""
    reference: Tensor | None
    """‖ε_ref - ε‖², (N,), without a gradient. None where there is no reference's prediction."""
    moved: Tensor | None
    """q = ‖ε_θ - ε_ref‖², (N,). None where it was not asked for."""
    inner: Tensor | None
    """⟨ε_θ - ε of the winner, ε_θ - ε of the loser⟩, (N/2,), without a gradient. None where it was not asked for."""


def noise_errors(policy_pred: Tensor, reference_pred: Tensor | None, target: NoiseTarget) -> tuple[Tensor, Tensor | None]:
    """Return the first two of :func:`noise_sums`: mean squared errors of policy and reference, (N,) each."""
    return noise_sums(policy_pred, reference_pred, target)[:2]


def noise_sums(
    policy_pred: Tensor,
    reference_pred: Tensor | None,
    target: NoiseTarget,
    *,
    moved: bool = False,
    teach_moved: bool = False,
    inner: bool = False,
) -> NoiseSums:
    """Compare each sample's noise predictions, by policy and by reference, with the noise and with each other.

    Args:
        policy_pred: the policy's output, (N,C,H,W), any floating dtype and stride. The only input that takes a gradient.
        reference_pred: the reference's, same shape; None where there is none.
        target: what both are compared with.
        moved: compare the two with each other as well; needs ``reference_pred``.
        teach_moved: give ``moved`` a gradient, for which the reference's prediction is kept until the backward pass.
        inner: give the inner product of each winner's and loser's error. Winners are the first half of the samples.

    Returns:
        Accumulated and given back in float32 (float64 for float64 predictions) whatever the inputs' dtype: at
        β = 5000 the rounding of a bfloat16 mean alone would move the logit by more than 1. Equal predictions that
        lie alike in memory have equal errors, on a CPU to the last bit; on a GPU a test tells. What is not asked for is not computed,
        and changes no bit of the rest.

    Raises:
        UserError: shapes that do not fit together.
    """
    shape, noise = policy_pred.shape, target.noise.shape
    if len(shape) != 4 or 0 in shape:
        raise UserError(f"predictions have shape {tuple(shape)}: expected (N,C,H,W), none of them 0")
    if noise[1:] != shape[1:] or noise[0] not in (shape[0], shape[0] / 2):
        raise UserError(f"noise has shape {tuple(noise)}, the predictions {tuple(shape)}: expected (N or N/2,C,H,W)")
    if inner and shape[0] % 2:
        raise UserError(f"predictions have shape {tuple(shape)}: an inner product needs winners and as many losers")
    for other, name in ((reference_pred, "the reference's prediction"), (target.noisy, "x_t")):
        if other is not None and other.shape != shape:
            raise UserError(f"{name} has shape {tuple(other.shape)}, the policy's prediction {tuple(shape)}")
    assert reference_pred is not None or not (moved or teach_moved)  # the objective asks for it where there is one
    wanted = Wanted(moved or teach_moved, teach_moved, inner)
    if policy_pred.device.type == "cpu" and policy_pred.numel() <= SMALL_ELEMENTS:
        return NoiseSums(*passes_torch.plain_sums(policy_pred, reference_pred, target, wanted))
    return NoiseSums(*_NoiseSums.apply(policy_pred, reference_pred, wanted, target.noise, target.scale, target.shift, target.noisy))


class _NoiseSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, policy, reference, wanted, *target):
        ctx.save_for_backward(policy, reference if wanted.teach_moved else None, *target)
        ctx.set_materialize_grads(False)
        sums = _passes(policy.device.type).sums(policy, reference, NoiseTarget(*target), wanted)
        fixed = [sums[1], sums[3], *([] if wanted.teach_moved else [sums[2]])]
        ctx.mark_non_differentiable(*[each for each in fixed if each is not None])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _, grad_moved, __):
        policy, reference, *target = ctx.saved_tensors
        gradient = None
        if grad is not None or grad_moved is not None:
            if grad is None:
                grad = torch.zeros_like(grad_moved)
            moved = None if grad_moved is None else (reference, grad_moved)
            gradient = _passes(policy.device.type).gradient(policy, NoiseTarget(*target), grad, moved)
        return gradient, *[None] * 6


@functools.cache
def _passes(device: str):
    """The module whose ``sums`` and ``gradient`` run there."""
    triton = device == "cuda" and importlib.util.find_spec("triton") is not None
    return importlib.import_module(f"dde_ds.objective.passes_{'triton' if triton else 'torch'}")
