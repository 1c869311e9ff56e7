"""Per-sample noise-prediction errors of policy and reference in one read. Only the inputs are kept for the backward pass.

There are N samples of C·H·W elements. Plain autograd would keep the differences, their float32 copies and their squares until the backward
pass, each at the size of the whole prediction. Here the two passes are Triton kernels on CUDA (``passes_triton``) and PyTorch code
elsewhere (``passes_torch``). On a CPU, predictions too small for the saving to matter do go through autograd.
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

# Up to this size, plain autograd is faster on a CPU than our own function. It is the size of eight pairs of SD1.5 latents, or two of SDXL.
# Autograd then keeps 1 MB.
SMALL_ELEMENTS = 2**18


class NoiseSums(NamedTuple):
    """Means over a latent's elements, from one read of N predictions. They are float32, or float64 for float64 predictions."""

    policy: Tensor
    """‖ε_θ - ε‖², (N,)."""
    reference: Tensor | None
    """‖ε_ref - ε‖², (N,), without a gradient. None where no reference's prediction was given."""
    moved: Tensor | None
    """q = ‖ε_θ - ε_ref‖², (N,). None unless requested."""
    inner: Tensor | None
    """⟨ε_θ - ε of the winner, ε_θ - ε of the loser⟩, (N/2,), without a gradient. None unless requested."""


def noise_errors(policy_pred: Tensor, reference_pred: Tensor | None, target: NoiseTarget) -> tuple[Tensor, Tensor | None]:
    """Return the mean squared errors of policy and reference, (N,) each: the first two results of :func:`noise_sums`."""
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
        policy_pred: the policy's output, (N,C,H,W), of any floating dtype and stride. Only this input receives a gradient.
        reference_pred: the reference's output, of the same shape. None for no reference.
        target: the noise target of both predictions.
        moved: also compare the two predictions with each other. This needs ``reference_pred``.
        teach_moved: give ``moved`` a gradient. The reference's prediction is then kept until the backward pass.
        inner: also return the inner product of each winner's and loser's error. Winners are the first half of the samples.

    Returns:
        The sums, accumulated in float32 whatever the inputs' dtype, or in float64 for float64 predictions. At β = 5000 the rounding of a
        bfloat16 mean alone would move the logit by more than 1. Equal predictions with the same memory layout have equal errors: on a
        CPU to the last bit; on a GPU a test checks it. Sums that were not requested are not computed. Requesting them changes no bit of
        the others.

    Raises:
        UserError: shapes do not match.
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
    assert reference_pred is not None or not (moved or teach_moved)  # The objective requests it only with a reference's prediction.
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
    """Return the module with the ``sums`` and ``gradient`` for this type of device."""
    triton = device == "cuda" and importlib.util.find_spec("triton") is not None
    return importlib.import_module(f"dde_ds.objective.passes_{'triton' if triton else 'torch'}")
