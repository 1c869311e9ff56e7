"""The passes of :mod:`.fused` in PyTorch, a block of samples at a time: what is in between stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dde_ds.objective.schedule import NoiseTarget

# 1 MB in float32: about what a core's second-level cache holds.
BLOCK_ELEMENTS = 2**18


Sums = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""The four of :class:`dde_ds.objective.fused.NoiseSums`."""


class Wanted(NamedTuple):
    """What a caller wants beside the errors."""

    moved: bool = False
    """‖ε_θ - ε_ref‖²."""
    teach_moved: bool = False
    """Its gradient too."""
    inner: bool = False
    """⟨e_w, e_l⟩."""


def sums(policy: Tensor, reference: Tensor | None, target: NoiseTarget, wanted: Wanted) -> Sums:
    """Return mean squared errors, (N,), of the policy and of the reference where there is one, and what is ``wanted``."""
    rows = rows_of(policy, target, wanted)
    own, other, moved = (policy.new_empty(len(policy), dtype=accumulator(policy)) for _ in range(3))
    inner = own.new_empty(rows)
    for block, scratch in _blocks(policy, rows):
        _difference(policy, target, rows, block, scratch)
        if wanted.inner:
            inner[block] = (scratch[0] * scratch[1]).mean((1, 2, 3))
        _halves(own, rows)[:, block] = scratch.square_().mean((2, 3, 4))
        if reference is not None:
            _halves(other, rows)[:, block] = _difference(reference, target, rows, block, scratch).square_().mean((2, 3, 4))
        if reference is not None and wanted.moved:
            scratch.copy_(_halves(policy, rows)[:, block]).sub_(_halves(reference, rows)[:, block])
            _halves(moved, rows)[:, block] = scratch.square_().mean((2, 3, 4))
    return (
        own,
        None if reference is None else other,
        implied_moved(moved, target) if wanted.moved else None,
        inner if wanted.inner else None,
    )


def plain_sums(policy: Tensor, reference: Tensor | None, target: NoiseTarget, wanted: Wanted) -> Sums:
    """Return the same numbers as :func:`sums`, through autograd: faster for predictions of up to a block."""
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
    """Return ‖ε_θ - ε_ref‖² from that of the predictions, (N,): what both have in common cancels, the scale is left."""
    return moved if target.scale is None else moved * target.scale.to(moved.dtype).square()


def _plain_error(pred: Tensor, target: NoiseTarget) -> Tensor:
    # Calls cost more than arithmetic here: nothing is sliced, what is simpler than unflatten and flatten takes their place, and
    # difference and square are one function, as are their derivatives.
    own = pred.to(accumulator(pred)).view(-1, *target.noise.shape)
    if implied := target.implied:
        noisy, scale, shift = (_halves(each, len(target.noise)).to(own.dtype) for each in implied)
        own = (own * _spread(scale)).addcmul(noisy, _spread(shift))
    return F.mse_loss(own, target.noise.to(own.dtype).expand_as(own), reduction="none").mean((2, 3, 4)).view(-1)


def gradient(policy: Tensor, target: NoiseTarget, grad: Tensor, moved: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return the gradient with respect to ``policy``, in its dtype.

    Args:
        grad: the errors' gradient, (N,).
        moved: the reference's prediction, and the gradient of ``moved``, (N,).
    """
    result, rows = torch.empty_like(policy), len(target.noise)
    halves, factor = _halves(result, rows), _halves(gradient_factor(policy, target, grad), rows)
    for block, scratch in _blocks(policy, rows):
        own = _difference(policy, target, rows, block, scratch).mul_(_spread(factor[:, block]))
        if moved is not None:
            reference, weight = moved[0], _spread(_halves(moved_factor(policy, target, moved[1]), rows)[:, block])
            own.addcmul_(_halves(policy, rows)[:, block].to(own.dtype), weight)
            own.addcmul_(_halves(reference, rows)[:, block].to(own.dtype), weight, value=-1)
        halves[:, block] = own
    return result


def gradient_factor(policy: Tensor, target: NoiseTarget, grad: Tensor) -> Tensor:
    """(N,): what ε_θ - ε is multiplied with, as ∂d/∂prediction = 2 · scale · (ε_θ - ε) / (C·H·W)."""
    factor = grad.to(accumulator(policy)) * (2.0 / policy[0].numel())
    return factor if target.scale is None else factor * target.scale.to(factor.dtype)


def moved_factor(policy: Tensor, target: NoiseTarget, grad: Tensor) -> Tensor:
    """(N,): what the difference of the two predictions is multiplied with, as ∂q/∂prediction = 2 · scale² · (pred_θ - pred_ref) / (C·H·W)."""
    return implied_moved(grad.to(accumulator(policy)) * (2.0 / policy[0].numel()), target)


def rows_of(policy: Tensor, target: NoiseTarget, wanted: Wanted) -> int:
    """Return how many samples are taken for a half: those of the noise, or the winners, where winner and loser must meet."""
    return len(policy) // 2 if wanted.inner else len(target.noise)


def accumulator(pred: Tensor) -> torch.dtype:
    return torch.promote_types(pred.dtype, torch.float32)


def _halves(tensor: Tensor, rows: int) -> Tensor:
    """(N,…) as (N/rows,rows,…): winners and losers, where they share their noise or must meet; otherwise as (1,N,…)."""
    return tensor.unflatten(0, (-1, rows))


def _blocks(policy: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the rows, so many that what belongs to them fits a block, and memory for them, (1 or 2, rows, C,H,W). It is the same for
    all blocks: new memory each time might come from the system, which clears it first."""
    size = min(rows, max(1, BLOCK_ELEMENTS * rows // policy.numel()))
    scratch = policy.new_empty(len(policy) // rows, size, *policy.shape[1:], dtype=accumulator(policy))
    for low in range(0, rows, size):
        yield slice(low, low + size), scratch[:, : rows - low]


def _difference(pred: Tensor, target: NoiseTarget, rows: int, block: slice, scratch: Tensor) -> Tensor:
    """ε_θ - ε of a block, in ``scratch``."""
    noise = scratch.copy_(_halves(pred, rows)[:, block])
    if implied := target.implied:
        noisy, scale, shift = (_halves(each, rows)[:, block].to(scratch.dtype) for each in implied)
        noise.mul_(_spread(scale)).addcmul_(noisy, _spread(shift))
    return noise.sub_(_halves(target.noise, rows)[:, block])


def _spread(per_sample: Tensor) -> Tensor:
    """(1 or 2, rows) → (…, 1,1,1)."""
    return per_sample[..., None, None, None]
