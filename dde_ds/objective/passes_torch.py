"""The passes of :mod:`.fused` in PyTorch, one block of samples at a time, so that intermediate results stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dde_ds.objective.schedule import NoiseTarget

# 1 MB in float32, about the size of a core's second-level cache.
BLOCK_ELEMENTS = 2**18


Sums = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""The four fields of :class:`dde_ds.objective.fused.NoiseSums`."""


class Wanted(NamedTuple):
    """The results that a caller requests besides the errors."""

    moved: bool = False
    """Compute ‖ε_θ - ε_ref‖²."""
    teach_moved: bool = False
    """Also give ‖ε_θ - ε_ref‖² a gradient."""
    inner: bool = False
    """Compute ⟨e_w, e_l⟩."""


def sums(policy: Tensor, reference: Tensor | None, target: NoiseTarget, wanted: Wanted) -> Sums:
    """Return mean squared errors, (N,), of the policy and, where given, of the reference, and the ``wanted`` results."""
    rows = rows_of(policy, target, wanted)
    policy_error, reference_error, moved = (policy.new_empty(len(policy), dtype=accumulator(policy)) for _ in range(3))
    inner = policy_error.new_empty(rows)
    for block, scratch in _blocks(policy, rows):
        _difference(policy, target, rows, block, scratch)
        if wanted.inner:
            inner[block] = (scratch[0] * scratch[1]).mean((1, 2, 3))
        _halves(policy_error, rows)[:, block] = scratch.square_().mean((2, 3, 4))
        if reference is not None:
            _halves(reference_error, rows)[:, block] = (
                _difference(reference, target, rows, block, scratch).square_().mean((2, 3, 4))
            )
        if reference is not None and wanted.moved:
            scratch.copy_(_halves(policy, rows)[:, block]).sub_(_halves(reference, rows)[:, block])
            _halves(moved, rows)[:, block] = scratch.square_().mean((2, 3, 4))
    return (
        policy_error,
        None if reference is None else reference_error,
        implied_moved(moved, target) if wanted.moved else None,
        inner if wanted.inner else None,
    )


def plain_sums(policy: Tensor, reference: Tensor | None, target: NoiseTarget, wanted: Wanted) -> Sums:
    """Return the same numbers as :func:`sums`, through autograd. This is faster for predictions of up to one block."""
    error, moved, inner = _plain_error(policy, target), None, None
    with torch.no_grad():
        other = None if reference is None else _plain_error(reference, target)
    if reference is not None and wanted.moved:
        with torch.set_grad_enabled(wanted.teach_moved and torch.is_grad_enabled()):
            squares = F.mse_loss(policy.to(error.dtype), reference.to(error.dtype), reduction="none")
            moved = implied_moved(squares.mean((1, 2, 3)), target)
    if wanted.inner:
        with torch.no_grad():
            inner = _inner(policy, target, rows_of(policy, target, wanted))
    return error, other, moved, inner


def _inner(policy: Tensor, target: NoiseTarget, rows: int) -> Tensor:
    scratch = policy.new_empty(2, rows, *policy.shape[1:], dtype=accumulator(policy))
    winner, loser = _difference(policy, target, rows, slice(0, rows), scratch)
    return (winner * loser).mean((1, 2, 3))


def implied_moved(moved: Tensor, target: NoiseTarget) -> Tensor:
    """Return ‖ε_θ - ε_ref‖², (N,), from ``moved``, the mean squared difference of the two predictions.

    The shift and x_t are common to both implied noises and cancel, so only the scale remains.
    """
    return moved if target.scale is None else moved * target.scale.to(moved.dtype).square()


def _plain_error(pred: Tensor, target: NoiseTarget) -> Tensor:
    # Calls cost more than arithmetic here. So this code slices nothing and uses view instead of unflatten and flatten. mse_loss computes
    # difference and square in one call, and so does its derivative.
    implied_noise = pred.to(accumulator(pred)).view(-1, *target.noise.shape)
    if implied := target.implied:
        noisy, scale, shift = (_halves(each, len(target.noise)).to(implied_noise.dtype) for each in implied)
        implied_noise = (implied_noise * _spread(scale)).addcmul(noisy, _spread(shift))
    return (
        F.mse_loss(implied_noise, target.noise.to(implied_noise.dtype).expand_as(implied_noise), reduction="none")
        .mean((2, 3, 4))
        .view(-1)
    )


def gradient(policy: Tensor, target: NoiseTarget, grad: Tensor, moved: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return the gradient with respect to ``policy``, in its dtype.

    Args:
        grad: the errors' gradient, (N,).
        moved: the reference's prediction, and the gradient of ``moved``, (N,).
    """
    result, rows = torch.empty_like(policy), len(target.noise)
    halves, factor = _halves(result, rows), _halves(gradient_factor(policy, target, grad), rows)
    for block, scratch in _blocks(policy, rows):
        product = _difference(policy, target, rows, block, scratch).mul_(_spread(factor[:, block]))
        if moved is not None:
            reference, weight = moved[0], _spread(_halves(moved_factor(policy, target, moved[1]), rows)[:, block])
            product.addcmul_(_halves(policy, rows)[:, block].to(product.dtype), weight)
            product.addcmul_(_halves(reference, rows)[:, block].to(product.dtype), weight, value=-1)
        halves[:, block] = product
    return result


def gradient_factor(policy: Tensor, target: NoiseTarget, grad: Tensor) -> Tensor:
    """Return the factor on ε_θ - ε, (N,), in the gradient: ∂d/∂prediction = 2 · scale · (ε_θ - ε) / (C·H·W)."""
    factor = grad.to(accumulator(policy)) * (2.0 / policy[0].numel())
    return factor if target.scale is None else factor * target.scale.to(factor.dtype)


def moved_factor(policy: Tensor, target: NoiseTarget, grad: Tensor) -> Tensor:
    """Return the factor on the predictions' difference, (N,), in the gradient: ∂q/∂prediction = 2 · scale² · (pred_θ - pred_ref) / (C·H·W)."""
    return implied_moved(grad.to(accumulator(policy)) * (2.0 / policy[0].numel()), target)


def rows_of(policy: Tensor, target: NoiseTarget, wanted: Wanted) -> int:
    """Return the number of rows of :func:`_halves`: the number of noise tensors, or of winners where winner and loser must meet."""
    return len(policy) // 2 if wanted.inner else len(target.noise)


def accumulator(pred: Tensor) -> torch.dtype:
    return torch.promote_types(pred.dtype, torch.float32)


def _halves(tensor: Tensor, rows: int) -> Tensor:
    """Return a view of (N,…) as (N/rows,rows,…).

    The first dimension is winners and losers where they share their noise or must meet. Otherwise it is 1.
    """
    return tensor.unflatten(0, (-1, rows))


def _blocks(policy: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the rows, each small enough for one block, and scratch memory for a slice, (1 or 2, rows, C,H,W).

    All blocks share the same memory. New memory for each block might come from the system, which clears it first.
    """
    size = min(rows, max(1, BLOCK_ELEMENTS * rows // policy.numel()))
    scratch = policy.new_empty(len(policy) // rows, size, *policy.shape[1:], dtype=accumulator(policy))
    for low in range(0, rows, size):
        yield slice(low, low + size), scratch[:, : rows - low]


def _difference(pred: Tensor, target: NoiseTarget, rows: int, block: slice, scratch: Tensor) -> Tensor:
    """Compute ε_θ - ε of a block in ``scratch``, and return ``scratch``."""
    noise = scratch.copy_(_halves(pred, rows)[:, block])
    if implied := target.implied:
        noisy, scale, shift = (_halves(each, rows)[:, block].to(scratch.dtype) for each in implied)
        noise.mul_(_spread(scale)).addcmul_(noisy, _spread(shift))
    return noise.sub_(_halves(target.noise, rows)[:, block])


def _spread(per_sample: Tensor) -> Tensor:
    """Return ``per_sample``, (1 or 2, rows), with three dimensions of 1 appended, to broadcast over (C,H,W)."""
    return per_sample[..., None, None, None]
