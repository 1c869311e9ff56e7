"""Per-sample noise-prediction errors, with nothing kept for the backward pass but the inputs.

Shapes: N samples of C·H·W elements. Written as plain autograd, the difference, its float32 copy and its square would each
live until the backward pass, at the size of the whole prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _SquaredError(torch.autograd.Function):
    """d_n = mean over C,H,W of (ε_n - ε_θ,n)², where ε_θ = a_n · prediction + b_n · x_t (a = 1, b = 0 for a noise model)."""

    @staticmethod
    def forward(ctx, prediction, noise, scale, offset):
        ctx.save_for_backward(prediction, noise, scale, offset)
        return _difference(prediction, noise, scale, offset).square_().flatten(1).mean(1)

    @staticmethod
    def backward(ctx, grad):
        prediction, noise, scale, offset = ctx.saved_tensors
        difference = _difference(prediction, noise, scale, offset)
        factor = grad.to(difference.dtype) * (2.0 / prediction[0].numel())
        if scale is not None:
            factor = factor * scale
        return difference.mul_(_spread(factor)).to(prediction.dtype), None, None, None


def squared_error(prediction: Tensor, noise: Tensor, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample's noise prediction.

    Args:
        prediction: the model's output, (N,C,H,W), any floating dtype and stride. The only input that takes a gradient.
        noise: ε, (N,C,H,W), or (N/2,C,H,W) when both halves of ``prediction`` share it.
        scale, offset: (N,) and (N,C,H,W) of the implied noise ``scale · prediction + offset``; both None for a model that
            predicts the noise itself.

    Returns:
        (N,) errors. Accumulated and given back in float32 (float64 for float64 predictions) whatever the input's dtype: at
        β = 5000 the rounding of a bfloat16 mean alone would move the logit by more than 1.
    """
    return _SquaredError.apply(prediction, noise, scale, offset)


def _difference(prediction: Tensor, noise: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """ε_θ - ε as a new tensor in the accumulation dtype, (N,C,H,W)."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    if scale is None:
        difference = prediction.to(dtype, copy=True)
    else:
        difference = torch.addcmul(offset.to(dtype), prediction.to(dtype), _spread(scale.to(dtype)))
    # A winner and its loser share their noise: two views of the halves spare a repeated copy of ε.
    for part in difference.split(len(noise)):
        part.sub_(noise)
    return difference


def _spread(per_sample: Tensor) -> Tensor:
    return per_sample.view(-1, 1, 1, 1)
