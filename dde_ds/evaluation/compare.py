"""Is one model better than another on the same prompts, by how much, and how sure are we."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 10_000
# Resampled prompts held at a time: 10,000 draws of 2,000 prompts would take 160 MB at once.
CHUNK = 2**22


@dataclass(frozen=True)
class WinRate:
    rate: float
    """Share of prompts on which the model beats the base; a tie counts half."""
    low: float
    high: float
    """95 % bootstrap interval over prompts."""
    prompts: int


@dataclass(frozen=True)
class Difference:
    """Of paired scores, model - base."""

    mean: float
    low: float
    high: float
    """95 % bootstrap interval over prompts."""
    prompts_better: int
    prompts_worse: int
    prompts_equal: int
    """Prompts by the sign of their mean difference over images."""
    sign_test_p: float


def bootstrap_interval(values: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values`` (N,) float64, resampling its N entries with replacement."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, CHUNK // len(values))
    means = [
        values[torch.randint(len(values), (min(rows, resamples - done), len(values)), generator=generator)].mean(1)
        for done in range(0, resamples, rows)
    ]
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact p of the sign test: as uneven a split of ``better + worse`` fair coins, or a more uneven one. Ties do not count."""
    coins, fewer = better + worse, min(better, worse)
    # Whole numbers: 2^coins has no float beyond a thousand prompts.
    ways = sum(math.comb(coins, k) for k in range(fewer + 1))
    return min(1.0, 2 * ways / 2**coins)


def paired_difference(model: Tensor, base: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Mean difference of paired scores, each (prompts, images a prompt), with its interval over prompts and a sign test."""
    _check(model, base)
    by_prompt = (model.double() - base.double()).mean(1)
    better, worse = int((by_prompt > 0).sum()), int((by_prompt < 0).sum())
    low, high = bootstrap_interval(by_prompt, resamples, seed)
    return Difference(float(by_prompt.mean()), low, high, better, worse, len(by_prompt) - better - worse, sign_test(better, worse))


def win_rate(model: Tensor, base: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> WinRate:
    """Win rate of paired scores.

    Args:
        model, base: scores, (prompts, images a prompt); entry (i, j) of both comes from the same prompt and noise. The
            images of one prompt are averaged before resampling, since they are not independent.
    """
    _check(model, base)
    wins = ((model > base).double() + 0.5 * (model == base).double()).mean(1)
    low, high = bootstrap_interval(wins, resamples, seed)
    return WinRate(float(wins.mean()), low, high, len(wins))


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """‖μ₁-μ₂‖² + tr(Σ₁ + Σ₂ - 2(Σ₁Σ₂)^½) of two sets of features, (N,D) and (M,D) (Dowson & Landau 1982; FID's distance).

    Biased upwards for few samples: compare only distances from the same numbers of them.
    """
    (mean_a, cov_a), (mean_b, cov_b) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (features, reference))
    # tr (Σ₁Σ₂)^½ is the sum of the roots of the product's eigenvalues, which are real and not negative.
    root_trace = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace)


def _check(model: Tensor, base: Tensor) -> None:
    if model.shape != base.shape or model.ndim != 2:
        raise ValueError(f"scores have shapes {tuple(model.shape)} and {tuple(base.shape)}, expected two of (prompts, images)")
