"""The passes of :mod:`.fused` in PyTorch, a block of samples at a time: what is in between stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dde_ds.objective.schedule import NoiseTarget

# 1 MB in float32: about what a core's second-level cache holds.
BLOCK_ELEMENTS = 2**18


def errors(policy: Tensor, reference: Tensor | None, target: NoiseTarget) -> tuple[Tensor, Tensor | None]:
    """Mean squared errors, (N,), of the policy, and of the reference where there is one."""
    predictions = [policy] if reference is None else [policy, reference]
    found = [policy.new_empty(len(pred), dtype=accumulator(pred)) for pred in predictions]
    for block, scratch in _blocks(policy, target):
        for pred, error in zip(predictions, found, strict=True):
            _halves(error, target)[:, block] = _difference(pred, target, block, scratch).square_().mean((2, 3, 4))
    return found[0], None if reference is None else found[1]


def plain_errors(policy: Tensor, reference: Tensor | None, target: NoiseTarget) -> tuple[Tensor, Tensor | None]:
    """The same numbers as :func:`errors`, through autograd: faster for predictions of up to a block."""
    error = _plain_error(policy, target)
    with torch.no_grad():
        return error, None if reference is None else _plain_error(reference, target)


def _plain_error(pred: Tensor, target: NoiseTarget) -> Tensor:
    # Calls cost more than arithmetic here: nothing is sliced, what is simpler than unflatten and flatten takes their place, and
    # difference and square are one function, as are their derivatives.
    own = pred.to(accumulator(pred)).view(-1, *target.noise.shape)
    if implied := target.implied:
        noisy, scale, shift = (_halves(each, target).to(own.dtype) for each in implied)
        own = (own * _spread(scale)).addcmul(noisy, _spread(shift))
    return F.mse_loss(own, target.noise.to(own.dtype).expand_as(own), reduction="none").mean((2, 3, 4)).view(-1)


def gradient(policy: Tensor, target: NoiseTarget, grad: Tensor) -> Tensor:
    """Gradient with respect to ``policy``, in its dtype, where the errors' gradient is ``grad``, (N,)."""
    result = torch.empty_like(policy)
    halves, factor = _halves(result, target), _halves(gradient_factor(policy, target, grad), target)
    for block, scratch in _blocks(policy, target):
        halves[:, block] = _difference(policy, target, block, scratch).mul_(_spread(factor[:, block]))
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


def _blocks(policy: Tensor, target: NoiseTarget) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the noise, so many that what belongs to them fits a block, and memory for them, (1 or 2, rows, C,H,W). It is the same for
    all blocks: new memory each time might come from the system, which clears it first."""
    rows = len(target.noise)
    size = min(rows, max(1, BLOCK_ELEMENTS * rows // policy.numel()))
    scratch = policy.new_empty(len(policy) // rows, size, *policy.shape[1:], dtype=accumulator(policy))
    for low in range(0, rows, size):
        yield slice(low, low + size), scratch[:, : rows - low]


def _difference(pred: Tensor, target: NoiseTarget, block: slice, scratch: Tensor) -> Tensor:
    """ε_θ - ε of a block, in ``scratch``."""
    noise = scratch.copy_(_halves(pred, target)[:, block])
    if implied := target.implied:
        noisy, scale, shift = (_halves(each, target)[:, block].to(scratch.dtype) for each in implied)
        noise.mul_(_spread(scale)).addcmul_(noisy, _spread(shift))
    return noise.sub_(target.noise[block])


def _spread(per_sample: Tensor) -> Tensor:
    """(1 or 2, rows) → (…, 1,1,1)."""
    return per_sample[..., None, None, None]
