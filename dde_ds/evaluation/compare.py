"""Statistics of two models on the same prompts: is one better, by how much, and how sure are we?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 10_000
# Resampled prompts in memory at a time. All at once, 10,000 draws of 2,000 prompts would take 160 MB.
CHUNK = 2**22


@dataclass(frozen=True)
class WinRate:
    rate: float
    """Mean over prompts of the share of images that beat the base's; a tie counts half."""
    low: float
    high: float
    """``low`` to ``high`` is the 95 % bootstrap interval over prompts."""
    prompts: int


@dataclass(frozen=True)
class Difference:
    """The difference of paired scores, model minus base."""

    mean: float
    low: float
    high: float
    """``low`` to ``high`` is the 95 % bootstrap interval over prompts."""
    prompts_better: int
    prompts_worse: int
    prompts_equal: int
    """Numbers of prompts, by the sign of the mean difference over a prompt's images."""
    sign_test_p: float


def bootstrap_interval(values: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of ``values``, (N,) float64.

    The N entries are resampled with replacement.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, CHUNK // len(values))
    means = [
        values[torch.randint(len(values), (min(rows, resamples - done), len(values)), generator=generator)].mean(1)
        for done in range(0, resamples, rows)
    ]
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def sign_test(better: int, worse: int) -> float:
    """Return the exact two-sided p of the sign test. Ties do not count.

    This is the probability that ``better + worse`` fair coins fall at least as unevenly as the prompts did.
    """
    coins, fewer = better + worse, min(better, worse)
    # Whole numbers, because 2^coins is too large for a float beyond a thousand prompts.
    ways = sum(math.comb(coins, k) for k in range(fewer + 1))
    return min(1.0, 2 * ways / 2**coins)


def paired_difference(model: Tensor, base: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Return the mean difference of paired scores, its bootstrap interval over prompts, and a sign test.

    Args:
        model, base: scores, (prompts, images a prompt); entry (i, j) of both comes from the same prompt and noise.

    Raises:
        ValueError: the scores have different shapes, or are not two-dimensional.
    """
    _check(model, base)
    by_prompt = (model.double() - base.double()).mean(1)
    better, worse = int((by_prompt > 0).sum()), int((by_prompt < 0).sum())
    low, high = bootstrap_interval(by_prompt, resamples, seed)
    return Difference(float(by_prompt.mean()), low, high, better, worse, len(by_prompt) - better - worse, sign_test(better, worse))


def win_rate(model: Tensor, base: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> WinRate:
    """Return the win rate of paired scores and its bootstrap interval over prompts.

    Args:
        model, base: scores, (prompts, images a prompt); entry (i, j) of both comes from the same prompt and noise. The
            images of one prompt are not independent, so they are averaged before resampling.

    Raises:
        ValueError: the scores have different shapes, or are not two-dimensional.
    """
    _check(model, base)
    wins = ((model > base).double() + 0.5 * (model == base).double()).mean(1)
    low, high = bootstrap_interval(wins, resamples, seed)
    return WinRate(float(wins.mean()), low, high, len(wins))


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Return the Fréchet distance of two sets of features, (N,D) and (M,D): ‖μ₁-μ₂‖² + tr(Σ₁ + Σ₂ - 2(Σ₁Σ₂)^½).

    The formula is from Dowson & Landau 1982, and FID uses it too. Few samples bias the distance upwards: compare distances only
    if their sets have the same sizes.
    """
    (mean_a, cov_a), (mean_b, cov_b) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (features, reference))
    # tr (Σ₁Σ₂)^½ is the sum of the square roots of Σ₁Σ₂'s eigenvalues. They are real and not negative.
    root_trace = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace)


def _check(model: Tensor, base: Tensor) -> None:
    if model.shape != base.shape or model.ndim != 2:
        raise ValueError(f"scores have shapes {tuple(model.shape)} and {tuple(base.shape)}, expected two of (prompts, images)")
