"""Every link, with every gain and safeguard, against formulas written here in float64."""

from __future__ import annotations

import math

import pytest
import safetensors.torch
import torch

from dde_ds import UserError, build_objective
from dde_ds.objective.links import LINKS, bind
from dde_ds.objective.profile import assume_margin, credit_profile
from dde_ds.objective.specs import LINKED, OBJECTIVES
from tests.objective.test_objective import PAIRS, SHAPE, T, fill_table, predictions

BETA = 7.0


def sigma(z):
    return 1 / (1 + torch.exp(-z))


def formula(link, z, p, beta=BETA):
    """The loss of one z as the papers write it."""
    right, wrong = torch.log(sigma(z)), torch.log(sigma(-z))
    if link == "logistic":
        return -p * right - (1 - p) * wrong
    if link == "robust":
        return (-p * right + (1 - p) * wrong) / (1 - 2 * (1 - p))
    if link == "ipo":
        return (z / beta - 1 / (2 * beta)) ** 2
    if link == "hinge":
        return torch.clamp(1 - z, min=0)
    if link == "sigmoid":
        return 1 - sigma(z)
    assert link == "dmpo"
    held = min(max(p, 1e-6), 1 - 1e-6)
    return sigma(z) * torch.log(sigma(z) / held) + sigma(-z) * torch.log(sigma(-z) / (1 - held))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", LINKS)
def test_loss_and_weight_by_the_formula(name, smoothing):
    z = torch.linspace(-14.9, 15.2, 61, dtype=torch.float64, requires_grad=True)
    link = bind(LINKS[name], BETA, smoothing)
    found, expected = link.loss(z), formula(name, z, 1 - smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    (slope,) = torch.autograd.grad(found.sum(), z)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), z)[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(link.weight(z.detach()), -slope, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(link.loss, z.detach()[::7].clone().add(0.01).requires_grad_())


@pytest.mark.parametrize("name", [name for name, link in LINKS.items() if link.soft_labels])
def test_labels_of_the_pairs(name):
    z = torch.tensor([-3.0, -0.2, 0.0, 1.5, 4.0], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    link = bind(LINKS[name], BETA, 0.0)
    expected = torch.stack([formula(name, one, share) for one, share in zip(z, p.tolist(), strict=True)])
    torch.testing.assert_close(link.loss(z, p), expected)
    (slope,) = torch.autograd.grad(link.loss(z, p).sum(), z)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), z)[0])
    torch.testing.assert_close(link.weight(z.detach(), p), -slope)


@pytest.mark.parametrize("name", LINKS)
def test_far_away_nothing_overflows(name):
    z = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    link = bind(LINKS[name], 2000.0, 0.1 if LINKS[name].smoothing else 0.0)
    assert link.loss(z).isfinite().all()
    assert torch.autograd.grad(link.loss(z).sum(), z)[0].isfinite().all()
    assert link.weight(z).isfinite().all()


def test_sigmoid_lets_go_of_both_sides_and_the_logistic_of_one():
    far = torch.tensor([-20.0, 20.0])
    assert bind(LINKS["sigmoid"], 1.0, 0.0).weight(far).max() < 1e-8
    assert bind(LINKS["logistic"], 1.0, 0.0).weight(far).tolist() == pytest.approx([1.0, 0.0], abs=1e-8)


def losers_like_winners(dtype=torch.float64):
    """Errors of a winner and its loser that point the same way in two pairs of three, and against each other in one."""
    policy, reference, noise = predictions()
    policy = policy.detach().clone()
    along = torch.tensor([0.9, -0.9, 2.0]).view(-1, 1, 1, 1)
    policy[PAIRS:] = noise + along * (policy[:PAIRS] - noise) + 0.1 * (policy[PAIRS:] - noise)
    return policy.to(dtype).requires_grad_(), reference.to(dtype), noise.to(dtype)


def written_out(name, schedule, policy, reference, noise, table, link, p, share, calibrated=False, only=None):
    """Loss and gradient of every combination, pair by pair, in float64; of one pair's part alone where ``only`` names it."""
    gradient, total = torch.zeros_like(policy), 0.0
    for i, t in enumerate(T.tolist()):
        if only not in (None, i):
            continue
        own = {"w": policy[i].detach(), "l": policy[PAIRS + i].detach()}
        other = {"w": reference[i], "l": reference[PAIRS + i]}
        error = {side: own[side] - noise[i] for side in "wl"}
        lead = {side: (error[side] ** 2).mean() - ((other[side] - noise[i]) ** 2).mean() for side in "wl"}
        alpha = schedule.alphas_cumprod[t]
        gain = {"discounted": (0.9 ** (50 / 1000)) ** (999 - t)}.get(name, 1.0)
        if name in ("dde", "dde_single"):
            gain = 1 / alpha if calibrated else (1 - alpha) / alpha
        k = (
            sum(schedule.stepwise_weight[j] * table[j * len(table) // 1000] for j in range(t + 1, 1000))
            if name in ("dde", "dde_step")
            else 0.0
        )
        z = torch.as_tensor(-(BETA / 2) * (gain * (lead["w"] - lead["l"]) + (2 if calibrated else 1) * k))
        z.requires_grad_()
        one = formula(link, z, p[i])
        (slope,) = torch.autograd.grad(one, z)
        total += one.detach() / PAIRS
        step = {side: 2 * error[side] / math.prod(SHAPE) for side in "wl"}
        scale = 1.0
        if share is not None:
            inner = (error["w"] * error["l"]).sum()
            if inner > 0:
                scale = min(max(((1 - share) * (error["w"] ** 2).sum() / (inner + 1e-9)).item(), 0), 1)
        gradient[i] = slope * -(BETA / 2) * gain * step["w"] / PAIRS
        gradient[PAIRS + i] = slope * (BETA / 2) * gain * step["l"] * scale / PAIRS
    return total, gradient


def combinations():
    for link, row in LINKS.items():
        for labels in ("sure", *(["smoothed"] if row.smoothing else []), *(["soft"] if row.soft_labels else [])):
            for share in (None, 0.6):
                yield link, labels, share


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize(("link", "labels", "share"), combinations())
def test_value_and_gradient_of_every_combination(schedule, name, link, labels, share):
    policy, reference, noise = losers_like_winners()
    votes = torch.tensor([0.6, 1.0, 0.8], dtype=torch.float64)
    p = {"sure": [1.0] * 3, "smoothed": [0.9] * 3, "soft": votes.tolist()}[labels]
    options = {
        "link": link,
        "label_smoothing": 0.1 * (labels == "smoothed"),
        "soft_labels": labels == "soft",
        "winner_preserving": share,
    }
    objective = build_objective(name, schedule, beta=BETA, **options)
    fill_table(objective)
    out = objective(policy, reference, noise, T, soft_labels=votes if labels == "soft" else None)
    out.loss.backward()
    expected, gradient = written_out(name, schedule, policy, reference, noise, objective.table.average[0], link, p, share)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-11)
    torch.testing.assert_close(policy.grad, gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["dde", "dde_single"])
@pytest.mark.parametrize("link", LINKS)
def test_calibrated_value_and_gradient(schedule, name, link):
    policy, reference, noise = losers_like_winners()
    objective = build_objective(name, schedule, beta=BETA, link=link, single_shot="calibrated")
    fill_table(objective)
    out = objective(policy, reference, noise, T)
    out.loss.backward()
    table = objective.table.average[0]
    expected, gradient = written_out(name, schedule, policy, reference, noise, table, link, [1.0] * 3, None, calibrated=True)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-11)
    torch.testing.assert_close(policy.grad, gradient, rtol=1e-8, atol=1e-12)


def mean_credit(objective, schedule, name, low=0, high=1000, calibrated=False):
    """c_t over its mean, timestep by timestep, from the table's margins and K by a loop."""
    table = objective.table.average[0].tolist()
    spread = 1000 // len(table)
    credit, tail = [0.0] * 1000, 0.0
    for t in reversed(range(1000)):
        alpha = schedule.alphas_cumprod[t].item()
        gain = 1.0
        if name in ("dde", "dde_single"):
            gain = 1 / alpha if calibrated else (1 - alpha) / alpha
        if name == "discounted":
            gain = (0.9 ** (50 / 1000)) ** (999 - t)
        k = (2 if calibrated else 1) * tail if name in ("dde", "dde_step") else 0.0
        credit[t] = gain / (1 + math.exp(min(-(BETA / 2) * (gain * table[t // spread] + k), 700)))
        tail += schedule.stepwise_weight[t].item() * table[t // spread]
    mean = sum(credit[low:high]) / (high - low)
    return [one / mean for one in credit]


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("share", [None, 0.6])
def test_mean_credit_value_and_gradient(schedule, name, link, share):
    """``uniform``'s loss with the same link, each pair times its timestep's credit."""
    policy, reference, noise = losers_like_winners()
    objective = build_objective(name, schedule, beta=BETA, link=link, credit="mean", winner_preserving=share)
    fill_table(objective)
    out = objective(policy, reference, noise, T)
    out.loss.backward()
    weights = mean_credit(objective, schedule, name)
    expected, gradient = 0.0, torch.zeros_like(policy)
    for i, t in enumerate(T.tolist()):
        alone = torch.zeros(1000, dtype=torch.float64)  # no table: uniform has no K
        both = [i, PAIRS + i]
        value, slope = written_out("uniform", schedule, policy, reference, noise, alone, link, [1.0] * 3, share, only=i)
        expected += weights[t] * value
        gradient[both] = weights[t] * slope[both]
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(policy.grad, gradient, rtol=1e-8, atol=1e-12)
    assert not torch.equal(out.loss, build_objective("uniform", schedule, beta=BETA, link=link)(policy, reference, noise, T).loss)


@pytest.mark.parametrize("name", ["dde", "dde_single"])
def test_mean_credit_calibrated_and_in_a_range(schedule, name):
    options = {"single_shot": "calibrated", "timestep_range": (400, 960)}
    objective = build_objective(name, schedule, beta=BETA, credit="mean", **options)
    fill_table(objective)
    policy_error, reference_error = torch.rand(2, 2 * PAIRS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, _ = objective.pair_losses(T, policy_error, reference_error)
    plain, _ = build_objective("uniform", schedule, beta=BETA).pair_losses(T, policy_error, reference_error)
    weights = mean_credit(objective, schedule, name, 400, 960, calibrated=True)
    torch.testing.assert_close(found, torch.tensor([weights[t] for t in T.tolist()], dtype=torch.float64) * plain)


def test_mean_credit_is_the_curve_that_is_drawn(schedule):
    """For pairs at the mean margin and one small enough that uniform's z is near 0: the profile of ``dde`` itself, whatever the margin."""
    margins = torch.full((1000,), -1e-3, dtype=torch.float64)
    found = {}
    for credit in ("pair", "mean"):
        objective = build_objective("dde", schedule, beta=2000.0, credit=credit)
        assume_margin(objective, -1e-3)
        found[credit] = credit_profile(objective, margins).credit
    torch.testing.assert_close(found["mean"] / found["mean"].sum(), found["pair"] / found["pair"].sum())


def test_far_ahead_the_mean_credit_still_has_shares(schedule):
    objective = build_objective("dde", schedule, beta=5000.0, credit="mean")
    objective.table.fill(-100.0)
    policy, reference, noise = predictions()
    assert objective(policy, reference, noise, T).loss.isfinite()


def test_calibrated_is_the_true_log_ratio_of_gaussians(schedule):
    """Data N(0,1), a policy that takes them for N(μ,1): z/β, with K of its true margins, is the pair's log ratio.

    With x₀ ~ N(c,1) the best prediction of the noise is √(1-ᾱ)(x_t - √ᾱ c), so the mean error at x₀ is known for each x₀.
    """
    alpha = schedule.alphas_cumprod
    signal, sigma2 = alpha.sqrt(), 1 - alpha

    def error(c, x0):
        """E over ε of (ε - √(1-ᾱ)(√ᾱ x₀ + √(1-ᾱ) ε - √ᾱ c))² = ᾱ² + (1-ᾱ) ᾱ (x₀ - c)²."""
        return alpha.square() + sigma2 * signal.square() * (x0 - c) ** 2

    x0, shift = {"w": 0.7, "l": -0.4}, 0.2
    lead = {side: error(shift, x0[side]) - error(0.0, x0[side]) for side in "wl"}
    m = lead["w"] - lead["l"]
    objective = build_objective("dde", schedule, beta=2.0, correction_buckets=1000, single_shot="calibrated")
    every = torch.arange(1000)
    objective.table.add(every, m, torch.zeros(4, 1000, dtype=torch.float64))
    objective.commit()
    found = objective.logits(m, every)
    # log N(x;μ,1)/N(x;0,1) = xμ - μ²/2; of a pair the difference.
    truth = shift * (x0["w"] - x0["l"])
    share = found / (2 * truth)
    assert 0.995 < share.min() < share.max() < 1.004
    plain = build_objective("dde", schedule, beta=2.0, correction_buckets=1000)
    plain.table.add(every, m, torch.zeros(4, 1000, dtype=torch.float64))
    plain.commit()
    share = plain.logits(m, every) / (2 * truth)
    assert share.min().item() == pytest.approx(0.44, abs=0.005)
    assert share.max().item() == pytest.approx(0.99, abs=0.005)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_preserving_the_winner_is_the_same_for_any_micro_batch(schedule, share):
    policy, reference, noise = losers_like_winners()
    objective = build_objective("dde_single", schedule, beta=BETA, winner_preserving=share)
    (whole,) = torch.autograd.grad(objective(policy, reference, noise, T).loss, policy)
    parts = torch.zeros_like(whole)
    for i in range(PAIRS):
        both = [i, PAIRS + i]
        own = policy.detach()[both].requires_grad_()
        loss = objective(own, reference[both], noise[i : i + 1], T[i : i + 1]).loss / PAIRS
        parts[both] = torch.autograd.grad(loss, own)[0]
    torch.testing.assert_close(parts, whole)
    (free,) = torch.autograd.grad(build_objective("dde_single", schedule, beta=BETA)(policy, reference, noise, T).loss, policy)
    assert torch.equal(whole[:PAIRS], free[:PAIRS])
    scale = whole[PAIRS:].norm(dim=(1, 2)).sum(1) / free[PAIRS:].norm(dim=(1, 2)).sum(1)
    assert scale[1] == 1, "errors against each other are left alone"
    assert scale[2] < 1


def test_preserving_the_winner_never_raises_its_error_to_first_order(schedule):
    """The step along the gradient changes ‖e_w‖² by -⟨e_w, winner's + loser's part⟩, the parameters being the prediction's own."""
    policy, reference, noise = losers_like_winners()
    objective = build_objective("uniform", schedule, beta=BETA, winner_preserving=0.0)
    (gradient,) = torch.autograd.grad(objective(policy, reference, noise, T).loss, policy)
    error = policy.detach()[:PAIRS] - noise
    shared = gradient[:PAIRS] + gradient[PAIRS:]  # a parameter that moves both predictions alike
    assert ((error * shared).sum((1, 2, 3)) >= -1e-12).all()


def test_a_precomputed_reference_preserves_the_winner_as_well(schedule):
    policy, reference, noise = losers_like_winners()
    objective = build_objective("dde", schedule, beta=BETA, winner_preserving=0.6)
    out = objective(policy, reference, noise, T)
    again = objective(policy, None, noise, T, reference_errors=out.reference_errors)
    assert torch.equal(torch.autograd.grad(out.loss, policy)[0], torch.autograd.grad(again.loss, policy)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"link": "sigmoids"}, r"objective\.link 'sigmoids'.*did you mean 'sigmoid'"),
        ({"credit": "means"}, r"objective\.credit 'means'.*did you mean 'mean'"),
        ({"single_shot": "calibrate"}, r"objective\.single_shot 'calibrate'.*did you mean 'calibrated'"),
        *[({"label_smoothing": value}, r"objective\.label_smoothing is .*\[0, 0\.5\)") for value in (-0.1, 0.5, math.nan)],
        *[({"winner_preserving": value}, r"objective\.winner_preserving is .*\[0, 1\]") for value in (-0.1, 1.1, math.nan)],
        *[
            ({"link": link, "label_smoothing": 0.1}, rf"label_smoothing is 0\.1: objective\.link {link} has no label")
            for link in ("ipo", "hinge", "sigmoid")
        ],
        *[
            ({"link": link, "soft_labels": True}, rf"soft_labels is true: objective\.link {link} takes no labels")
            for link in ("ipo", "hinge", "sigmoid", "robust")
        ],
        ({"label_smoothing": 0.1, "soft_labels": True}, "a pair's own label takes its place"),
        *[
            ({"name": name, **option}, rf"objective\.{next(iter(option))} is .*: {name} has a loss of its own")
            for name in ("sft", "dspo", "kto", "mapo")
            for option in (
                {"link": "ipo"},
                {"label_smoothing": 0.1},
                {"soft_labels": True},
                {"winner_preserving": 0.5},
                {"credit": "mean"},
            )
        ],
        *[
            ({"name": name, "single_shot": "calibrated"}, rf"single_shot is 'calibrated': {name} has no single-shot weight")
            for name in OBJECTIVES
            if name not in ("dde", "dde_single")
        ],
    ],
)
def test_what_has_no_meaning_is_refused(schedule, options, message):
    with pytest.raises(UserError, match=message):
        build_objective(**{"name": "dde"} | options, schedule=schedule)


def test_labels_that_are_none(schedule):
    policy, reference, noise = predictions()
    soft = build_objective("dde", schedule, soft_labels=True)
    with pytest.raises(UserError, match="soft_labels are missing"):
        soft(policy, reference, noise, T)
    with pytest.raises(UserError, match="soft_labels is off"):
        build_objective("dde", schedule)(policy, reference, noise, T, soft_labels=torch.ones(3))
    with pytest.raises(UserError, match="soft_labels has shape"):
        soft(policy, reference, noise, T, soft_labels=torch.ones(2))
    for wrong in (1.5, -0.1, math.nan):
        with pytest.raises(UserError, match=r"soft label .*\[0, 1\]"):
            soft(policy, reference, noise, T, soft_labels=torch.tensor([0.5, wrong, 1.0]))


def test_dspo_needs_more_than_errors(schedule):
    policy, _, noise = predictions()
    with pytest.raises(UserError, match="reference_errors are not enough"):
        build_objective("dspo", schedule)(policy, None, noise, T, reference_errors=torch.ones(2 * PAIRS))


def test_dspo_turns_around_above_a_beta_of_two(schedule):
    """From the reference, where s is one half, the winner's gradient is (1 - β/2) times that of its error."""
    _, reference, noise = predictions()
    policy = reference.clone().requires_grad_()
    for beta in (0.001, 1.9, 2.1, 2000.0):
        out = build_objective("dspo", schedule, beta=beta)(policy, reference, noise, T)
        (gradient,) = torch.autograd.grad(out.loss, policy)
        error = 2 * (reference[:PAIRS] - noise) / (PAIRS * math.prod(SHAPE))
        torch.testing.assert_close(gradient[:PAIRS], (1 - beta / 2) * error)


def test_ktos_reference_point_is_saved(schedule):
    policy, reference, noise = predictions()
    objective, resumed = (build_objective("kto", schedule, beta=50.0) for _ in range(2))
    objective(noise.repeat(2, 1, 1, 1), reference, noise, T)
    objective.commit()
    resumed.load_state_dict(safetensors.torch.load(safetensors.torch.save(objective.state_dict())))
    assert objective.state_dict()["reference_point"] > 0.05
    losses = [each(policy, reference, noise, T).loss for each in (objective, resumed, build_objective("kto", schedule, beta=50.0))]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    objective(reference, reference, noise, T)
    objective.discard()
    objective.commit()
    assert objective.state_dict()["reference_point"] == resumed.state_dict()["reference_point"], "a skipped step leaves it alone"


@pytest.mark.parametrize("name", ["dspo", "kto", "mapo"])
def test_gradcheck_of_losses_of_their_own(schedule, name):
    policy, reference, noise = predictions()
    objective = build_objective(name, schedule, beta=3.0)
    assert torch.autograd.gradcheck(lambda p: objective(p, reference if name != "mapo" else None, noise, T).loss, policy)
