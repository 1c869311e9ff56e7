from __future__ import annotations

import pytest
import torch

from dde_ds.evaluation import compare
from dde_ds.evaluation.compare import frechet_distance, paired_difference, sign_test, win_rate


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


def test_paired_difference_against_the_t_interval():
    """For many prompts the bootstrap's interval is mean ± 1.96 standard errors of the per-prompt means."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2000, 4, generator=generator, dtype=torch.float64)
    model = base + 0.1 + torch.randn(2000, 1, generator=generator, dtype=torch.float64)
    found = paired_difference(model, base)
    by_prompt = (model - base).mean(1)
    error = float(by_prompt.std()) / 2000**0.5
    assert found.mean == pytest.approx(float(by_prompt.mean()))
    assert (found.low, found.high) == pytest.approx((found.mean - 1.96 * error, found.mean + 1.96 * error), abs=error * 0.08)
    assert (found.prompts_better, found.prompts_worse, found.prompts_equal) == (
        int((by_prompt > 0).sum()),
        int((by_prompt < 0).sum()),
        0,
    )


def test_bootstrap_in_pieces_is_the_bootstrap(monkeypatch):
    values = torch.randn(37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = compare.bootstrap_interval(values, resamples=500)
    monkeypatch.setattr(compare, "CHUNK", 37 * 13)
    assert compare.bootstrap_interval(values, resamples=500) == whole


def test_sign_test():
    # By hand: of 5 coins, none or one heads in 6 of 32 ways, on either side.
    assert sign_test(4, 1) == pytest.approx(12 / 32)
    assert sign_test(1, 4) == sign_test(4, 1)
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(3, 3) == sign_test(0, 0) == 1.0
    # 2^-2000 is no float; Chernoff's bound, 2 exp(-2000 KL(¼‖½)), is 4.8e-114, and short of it by a factor of order √2000.
    assert 4.8e-114 / 2000 < sign_test(1500, 500) < 4.8e-114


def test_ties_are_counted_and_left_out_of_the_sign_test():
    base = torch.zeros(6, 2)
    model = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [3.0, 1.0]])
    found = paired_difference(model, base)
    assert (found.prompts_better, found.prompts_worse, found.prompts_equal) == (3, 1, 2)
    assert found.sign_test_p == sign_test(3, 1)
    assert win_rate(model, base).rate == pytest.approx((1 + 0.5 + 0.5 + 0.75 + 0.25 + 1) / 6)
