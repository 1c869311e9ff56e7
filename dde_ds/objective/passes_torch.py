"""The passes of :mod:`.fused` in PyTorch, a block of samples at a time: what is in between stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dde_ds.objective.schedule import NoiseTarget

# 1 MB in float32: about what a core's second-level cache holds.
BLOCK_ELEMENTS = 2**18


def errors(policy: Tensor, reference: Tensor | None, target: NoiseTarget) -> tuple[Tensor, Tensor | None]:
    """Mean squared errors, (N,), of the policy, and of the reference where there is one."""
    predictions = [policy] if reference is None else [policy, reference]
    found: list[list[Tensor]] = [[] for _ in predictions]
    for block in _blocks(policy, target):
        for pred, parts in zip(predictions, found, strict=True):
            parts.append(_difference(pred, target, block).square_().mean((2, 3, 4)))
    joined = [torch.cat(parts, 1).flatten() for parts in found]
    return joined[0], None if reference is None else joined[1]


def plain_errors(policy: Tensor, reference: Tensor | None, target: NoiseTarget) -> tuple[Tensor, Tensor | None]:
    """The same numbers as :func:`errors`, through autograd: faster for predictions of less than a block."""
    error = _plain_error(policy, target)
    with torch.no_grad():
        return error, None if reference is None else _plain_error(reference, target)


def _plain_error(pred: Tensor, target: NoiseTarget) -> Tensor:
    # Nothing is sliced, which autograd would pay for, and Tensor.unflatten is Python.
    implied = pred.to(accumulator(pred)).reshape(-1, *target.noise.shape)
    if target.scale is not None:
        scale, shift = (_spread(_halves(each, target).to(implied.dtype)) for each in (target.scale, target.shift))
        implied = (implied * scale).addcmul(_halves(target.noisy, target).to(implied.dtype), shift)
    return (implied - target.noise.to(implied.dtype)).square().mean((2, 3, 4)).flatten()


def gradient(policy: Tensor, target: NoiseTarget, grad: Tensor) -> Tensor:
    """Gradient with respect to ``policy``, in its dtype, where the errors' gradient is ``grad``, (N,)."""
    result = torch.empty_like(policy)
    halves, factor = _halves(result, target), _halves(gradient_factor(policy, target, grad), target)
    for block in _blocks(policy, target):
        halves[:, block] = _difference(policy, target, block).mul_(_spread(factor[:, block]))
    return result


def gradient_factor(policy: Tensor, target: NoiseTarget, grad: Tensor) -> Tensor:
    """(N,): what ε_θ - ε is multiplied with, as ∂d/∂prediction = 2 · scale · (ε_θ - ε) / (C·H·W)."""
    factor = grad.to(accumulator(policy)) * (2.0 / policy[0].numel())
    return factor if target.scale is None else factor * target.scale.to(factor.dtype)


def accumulator(pred: Tensor) -> torch.dtype:
    return torch.promote_types(pred.dtype, torch.float32)


def _halves(tensor: Tensor, target: NoiseTarget) -> Tensor:
    """(N,…) as (2,N/2,…), winners and losers, where they share their noise; otherwise as (1,N,…)."""
    return tensor.unflatten(0, (-1, len(target.noise)))


def _blocks(policy: Tensor, target: NoiseTarget) -> Iterator[slice]:
    """Rows of the noise, so many that what belongs to them fits a block."""
    size = max(1, BLOCK_ELEMENTS * len(target.noise) // policy.numel())
    for low in range(0, len(target.noise), size):
        yield slice(low, low + size)


def _difference(pred: Tensor, target: NoiseTarget, block: slice) -> Tensor:
    """ε_θ - ε of a block, as a new tensor (1 or 2, rows, C,H,W) in the accumulation dtype."""
    dtype = accumulator(pred)
    own = _halves(pred, target)[:, block]
    if target.scale is None:
        # A copy that is then subtracted from is faster than the subtraction of different dtypes.
        return own - target.noise[block] if own.dtype == dtype else own.to(dtype).sub_(target.noise[block])
    scale, shift = (_spread(_halves(each, target)[:, block].to(dtype)) for each in (target.scale, target.shift))
    noisy = _halves(target.noisy, target)[:, block].to(dtype)
    return (own.to(dtype) * scale).addcmul_(noisy, shift).sub_(target.noise[block])


def _spread(per_sample: Tensor) -> Tensor:
    """(1 or 2, rows) → (…, 1,1,1)."""
    return per_sample[..., None, None, None]
