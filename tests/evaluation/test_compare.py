from __future__ import annotations

import pytest
import torch

from dde_ds.evaluation.compare import frechet_distance, win_rate


def test_win_rate_counts_ties_half():
    base = torch.tensor([[0.0], [0.0], [0.0], [0.0]])
    model = torch.tensor([[1.0], [1.0], [0.0], [-1.0]])
    result = win_rate(model, base)
    assert result.rate == 0.625
    assert result.prompts == 4
    assert result.low < 0.625 < result.high


def test_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        model = (torch.rand(100, 1, generator=generator) < 0.7).float()
        result = win_rate(model, torch.full_like(model, 0.5), resamples=400, seed=seed)
        covered += result.low <= 0.7 <= result.high
    assert 0.88 <= covered / 200 <= 0.99


def test_images_of_one_prompt_are_not_independent():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(50, 1, generator=generator)
    repeated = one.repeat(1, 8)
    single, many = (win_rate(x, torch.zeros_like(x)) for x in (one, repeated))
    assert (single.low, single.high) == (many.low, many.high)
    with pytest.raises(ValueError, match="shapes"):
        win_rate(one, repeated)


def test_frechet_distance_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=generator) * torch.tensor([1.0, 2.0, 0.5])
    b = torch.randn(200_000, 3, generator=generator) * torch.tensor([1.0, 1.0, 0.5]) + torch.tensor([3.0, 0.0, 0.0])
    assert frechet_distance(a, b) == pytest.approx(9 + 1, rel=0.02)  # ‖μ‖² + (2-1)²
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
