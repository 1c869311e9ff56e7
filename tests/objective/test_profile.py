"""The paper's properties of the credit (sec. 4.4), for pairs that are all equally far ahead."""

from __future__ import annotations

import pytest
import torch

from dde_ds import build_objective
from dde_ds.objective.profile import assume_margin, credit_profile
from dde_ds.objective.specs import LINKED


def profile(name, schedule, margin, beta=2000.0):
    objective = build_objective(name, schedule, beta=beta)
    assume_margin(objective, -margin)
    return credit_profile(objective, torch.full((1000,), -margin, dtype=torch.float64))


@pytest.mark.parametrize("name", LINKED)
def test_is_the_gain_times_what_the_logistic_leaves(name, schedule):
    """|∂loss/∂d| = (β/2) g_t σ(-z_t), with g and z written out."""
    w, weight = schedule.single_shot_weight, schedule.stepwise_weight
    ones, none = torch.ones(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    tail = torch.tensor([weight[t + 1 :].sum().item() for t in range(1000)], dtype=torch.float64)
    discount = 0.9 ** (0.05 * torch.arange(999, -1, -1, dtype=torch.float64))
    gain, correction = {
        "dde": (w, tail),
        "dde_single": (w, none),
        "dde_step": (ones, tail),
        "uniform": (ones, none),
        "discounted": (discount, none),
    }[name]
    z = 1000 * 1e-3 * (gain + correction)
    found = profile(name, schedule, 1e-3)
    torch.testing.assert_close(found.credit, 1000 * gain * torch.sigmoid(-z))
    torch.testing.assert_close(found.push, torch.sigmoid(-z))


@pytest.mark.parametrize(("margin", "peak"), [(1e-3, 417), (1e-4, 718)])
def test_dde_teaches_the_middle_if_all_pairs_have_one_margin(schedule, margin, peak):
    found = profile("dde", schedule, margin)
    assert found.peak == peak
    low, high = found.middle_half()
    assert low < peak < high
    # One rise and one fall: no second place that is taught.
    slope = found.credit.diff().sign()
    assert (slope[:peak] > 0).all()
    assert (slope[peak:] <= 0).all()
    assert found.credit[0] < 0.01 * found.credit[peak] > found.credit[999]


def test_uniform_teaches_all_alike_and_discounted_the_noisy_end(schedule):
    flat = profile("uniform", schedule, 1e-3).credit
    assert flat.max() == pytest.approx(flat.min())
    assert profile("discounted", schedule, 1e-3).peak == 999
    assert profile("sft", schedule, 1e-3).credit.unique().tolist() == [1.0]


def test_dde_saturates_at_both_ends(schedule):
    """The noisy end by w_t, the clean end by the correction, which the single-shot ablation has not."""
    push = profile("dde", schedule, 3e-3).push
    assert push[0] < 1e-6
    assert push[999] < 1e-6
    assert push.max() > 1e3 * push[0]
    single = profile("dde_single", schedule, 3e-3).push
    assert single[0] > 0.49
    assert single[999] < 1e-6


def test_the_correction_falls_with_t_and_converges(schedule):
    """From noisy margins around one mean, K_t comes to that mean's Σ_{j>t} λ_j, and falls from the clean to the noisy end."""
    objective = build_objective("dde", schedule, beta=2000.0)
    generator = torch.Generator().manual_seed(0)
    tail = schedule.stepwise_weight.flip(0).cumsum(0).flip(0) - schedule.stepwise_weight
    far = []
    for step in range(60):
        t = torch.randint(1000, (4096,), generator=generator)
        m = -1e-3 * (1 + torch.randn(4096, generator=generator))
        objective.table.add(t, m, torch.zeros(4, 4096))
        objective.commit()
        if step in (0, 59):
            far.append((objective.table.correction + 1e-3 * tail).abs().max().item() / 6.5e-3)
    assert far[1] < 0.03 < far[0]
    falling = objective.table.correction[::50].abs()
    assert (falling.diff() < 0).all()
