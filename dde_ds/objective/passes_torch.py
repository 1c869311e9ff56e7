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
    found: list[list[Tensor]] = [[] for _ in predictions]
    for block in _blocks(policy, target):
        for pred, parts in zip(predictions, found, strict=True):
            parts.append(_mean_squares(_implied_block(pred, target, block), target.noise[block]))
    joined = [torch.cat(parts, 1).flatten() for parts in found]
    return joined[0], None if reference is None else joined[1]


def plain_errors(policy: Tensor, reference: Tensor | None, target: NoiseTarget) -> tuple[Tensor, Tensor | None]:
    """The same numbers as :func:`errors`, through autograd: faster for predictions of less than a block."""
    error = _plain_error(policy, target)
    with torch.no_grad():
        return error, None if reference is None else _plain_error(reference, target)


def _plain_error(pred: Tensor, target: NoiseTarget) -> Tensor:
    # Calls cost more than arithmetic here: nothing is sliced, and what is simpler than unflatten and flatten takes their place.
    own = pred.to(accumulator(pred)).view(-1, *target.noise.shape)
    return _mean_squares(_implied_noise(own, target), target.noise).view(-1)


def gradient(policy: Tensor, target: NoiseTarget, grad: Tensor) -> Tensor:
    """Gradient with respect to ``policy``, in its dtype, where the errors' gradient is ``grad``, (N,)."""
    result = torch.empty_like(policy)
    halves, factor = _halves(result, target), _halves(gradient_factor(policy, target, grad), target)
    is_input = target.scale is None and policy.dtype == accumulator(policy)  # what _implied_block gives: not to be written to
    for block in _blocks(policy, target):
        implied, noise = _implied_block(policy, target, block), target.noise[block]
        difference = implied - noise if is_input else implied.sub_(noise)
        halves[:, block] = difference.mul_(_spread(factor[:, block]))
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


def _implied_block(pred: Tensor, target: NoiseTarget, block: slice) -> Tensor:
    return _implied_noise(_halves(pred, target)[:, block].to(accumulator(pred)), target, block)


def _implied_noise(own: Tensor, target: NoiseTarget, block: slice = slice(None)) -> Tensor:
    """ε_θ of a model's output of a block, (1 or 2, rows, C,H,W) in the accumulation dtype: the output itself where that is all of it."""
    if target.scale is None:
        return own
    noisy, scale, shift = (_halves(each, target)[:, block].to(own.dtype) for each in (target.noisy, target.scale, target.shift))
    return (own * _spread(scale)).addcmul(noisy, _spread(shift))


def _mean_squares(implied: Tensor, noise: Tensor) -> Tensor:
    """(1 or 2, rows). Difference and square are one pass over the memory this way, and so are their derivatives."""
    return F.mse_loss(implied, noise.to(implied.dtype).expand_as(implied), reduction="none").mean((2, 3, 4))


def _spread(per_sample: Tensor) -> Tensor:
    """(1 or 2, rows) → (…, 1,1,1)."""
    return per_sample[..., None, None, None]
