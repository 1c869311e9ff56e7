"""Is one model better than another on the same prompts, by how much, and how sure are we."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WinRate:
    rate: float
    """Share of prompts on which the model beats the base; a tie counts half."""
    low: float
    high: float
    """95 % bootstrap interval over prompts."""
    prompts: int


def win_rate(model: Tensor, base: Tensor, resamples: int = 10_000, seed: int = 0) -> WinRate:
    """Win rate of paired scores.

    Args:
        model, base: scores, (prompts, images a prompt); entry (i, j) of both comes from the same prompt and noise. The
            images of one prompt are averaged before resampling, since they are not independent.
    """
    if model.shape != base.shape or model.ndim != 2:
        raise ValueError(f"scores have shapes {tuple(model.shape)} and {tuple(base.shape)}, expected two of (prompts, images)")
    wins = ((model > base).double() + 0.5 * (model == base).double()).mean(1)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(wins), (resamples, len(wins)), generator=generator)
    low, high = torch.quantile(wins[draws].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return WinRate(float(wins.mean()), low, high, len(wins))


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """‖μ₁-μ₂‖² + tr(Σ₁ + Σ₂ - 2(Σ₁Σ₂)^½) of two sets of features, (N,D) and (M,D) (Dowson & Landau 1982; FID's distance).

    Biased upwards for few samples: compare only distances from the same numbers of them.
    """
    (mean_a, cov_a), (mean_b, cov_b) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (features, reference))
    # tr (Σ₁Σ₂)^½ is the sum of the roots of the product's eigenvalues, which are real and not negative.
    root_trace = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace)
