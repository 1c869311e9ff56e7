from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from dde_ds import NoiseSchedule, UserError, build_objective
from dde_ds.config import ObjectiveConfig
from dde_ds.objective.objective import BY_TIMESTEP, configured_objective
from dde_ds.objective.specs import COMPARING, LINKED, OBJECTIVES

PAIRS, SHAPE = 3, (4, 5, 7)
T = torch.tensor([3, 417, 950])


def predictions(dtype=torch.float64, scale=0.02, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(PAIRS, *SHAPE, generator=generator, dtype=torch.float64)
    reference = noise.repeat(2, 1, 1, 1) + 0.3 * torch.randn(2 * PAIRS, *SHAPE, generator=generator, dtype=torch.float64)
    policy = reference + scale * torch.randn(2 * PAIRS, *SHAPE, generator=generator, dtype=torch.float64)
    return policy.to(dtype).requires_grad_(), reference.to(dtype), noise.to(dtype)


def fill_table(objective, seed=5, observations=4000):
    """Two committed steps of made-up margins."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        t = torch.randint(1000, (observations,), generator=generator)
        m = 1e-3 * torch.randn(observations, generator=generator)
        objective.table.add(t, m, torch.rand(4, observations, generator=generator))
        objective.commit()


def written_out(name, schedule, policy, reference, noise, beta, eta=1.0, table=None, kappa=0.0):
    """The loss pair by pair, element by element, as the paper writes it."""
    losses = []
    for i, t in enumerate(T.tolist()):
        d = {}
        for who, prediction in (("policy", policy), ("reference", reference)):
            for side, row in (("w", i), ("l", PAIRS + i)):
                d[who, side] = sum((noise[i].flatten() - prediction[row].flatten()) ** 2) / math.prod(SHAPE)
        m = (d["policy", "w"] - d["reference", "w"]) - (d["policy", "l"] - d["reference", "l"])
        gain = {
            "dde": schedule.single_shot_weight[t],
            "dde_single": schedule.single_shot_weight[t],
            "dde_step": 1.0,
            "uniform": 1.0,
        }
        gain["discounted"] = (0.9 ** (50 / 1000)) ** (999 - t)
        k = sum(schedule.stepwise_weight[j] * table[j] for j in range(t + 1, 1000)) if name in ("dde", "dde_step") else 0.0
        if name == "sft":
            losses.append(d["policy", "w"])
            continue
        if name == "mapo":
            f = {side: 0.5 * d["policy", side] / (torch.exp(0.5 * d["policy", side]) - 1) for side in "wl"}
            losses.append(d["policy", "w"] - 0.1 * torch.log(1 / (1 + torch.exp(-1000 * (f["w"] - f["l"])))))
            continue
        if name == "kto":
            lead = {side: d["reference", side] - d["policy", side] - kappa for side in "wl"}
            happy = 1 / (1 + torch.exp(-beta * lead["w"])) + 1 / (1 + torch.exp(beta * lead["l"]))
            losses.append(1 - happy / 2)
            continue
        if name == "dspo":
            s = 1 - 1 / (1 + torch.exp(beta / 2 * m))
            own, other = policy[i].flatten(), reference[i].flatten()
            losses.append(sum((own - noise[i].flatten() - beta * s * (own - other)) ** 2) / math.prod(SHAPE))
            continue
        z = -(beta / 2) * (gain[name] * m + eta * k)
        losses.append(-torch.log(1 / (1 + torch.exp(-z))))
    return sum(losses) / PAIRS


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_formula_in_float64(schedule, name, dtype):
    policy, reference, noise = predictions(dtype)
    objective = build_objective(name, schedule, beta=50.0)
    if name in COMPARING:
        fill_table(objective)
    kappa = 0.0
    if name == "kto":  # the step before, in which the policy was the reference's better half way
        before = noise.repeat(2, 1, 1, 1) + 0.9 * (reference - noise.repeat(2, 1, 1, 1))
        objective(before, reference, noise, T)
        objective.commit()
        kappa = (0.19 * (reference - noise.repeat(2, 1, 1, 1)).double().square().mean()).item()
    out = objective(policy, reference if name in COMPARING else None, noise, T)
    out.loss.backward()

    exact = policy.detach().double().requires_grad_()
    table = objective.table.average[0][torch.arange(1000) * 50 // 1000]
    expected = written_out(name, schedule, exact, reference.double(), noise.double(), 50.0, table=table, kappa=kappa)
    expected.backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]
    if name == "mapo":
        tolerance *= 1000  # T multiplies the difference of two errors
    assert out.loss.item() == pytest.approx(expected.item(), rel=tolerance)
    torch.testing.assert_close(
        policy.grad.double(), exact.grad, rtol=10 * tolerance, atol=tolerance * exact.grad.abs().max().item()
    )


@pytest.mark.parametrize("name", LINKED)
def test_equal_models_give_log_2(schedule, name):
    _, reference, noise = predictions(torch.float32)
    out = build_objective(name, schedule, beta=5000.0)(reference.clone().requires_grad_(), reference, noise, T)
    assert out.loss.item() == torch.tensor(2.0).log().item()
    assert not out.logits.any()


def test_no_correction_weight_equals_dde_single_bit_for_bit(schedule):
    policy, reference, noise = predictions(torch.float32)
    losses = []
    for name, options in (("dde", {"correction_weight": 0.0}), ("dde_single", {})):
        objective = build_objective(name, schedule, beta=2000.0, **options)
        fill_table(objective)
        losses.append(objective(policy, reference, noise, T).loss)
    assert torch.equal(*losses)


def test_gradient_of_one_winner_element(schedule):
    """β g_t σ(-z) (ε_θ - ε)/(C·H·W·pairs) for a winner, minus that for its loser."""
    policy, reference, noise = predictions()
    out = build_objective("dde_single", schedule, beta=100.0)(policy, reference, noise, T)
    out.loss.backward()
    factor = 100.0 * schedule.single_shot_weight[T] * torch.sigmoid(-out.logits) / (math.prod(SHAPE) * PAIRS)
    expected = factor.view(-1, 1, 1, 1) * (policy.detach()[:PAIRS] - noise)
    torch.testing.assert_close(policy.grad[:PAIRS], expected)
    expected = -factor.view(-1, 1, 1, 1) * (policy.detach()[PAIRS:] - noise)
    torch.testing.assert_close(policy.grad[PAIRS:], expected)


@pytest.mark.parametrize(("c", "peak"), [(1e-3, 417), (1e-4, 718)])
def test_credit_peaks_in_the_middle_if_all_pairs_have_one_margin(schedule, c, peak):
    """|∂loss/∂d| = (β/2) g_t σ(-z) with M_j = m = -c at every step: the paper's prioritisation."""
    objective = build_objective("dde", schedule, beta=2000.0)
    everywhere = torch.arange(1000)
    objective.table.add(everywhere, torch.full((1000,), -c, dtype=torch.float64), torch.zeros(4, 1000, dtype=torch.float64))
    objective.commit()
    # One element a sample, so that a prediction sets its error: winner √(1-c) off, all others 1.
    noise = torch.zeros(1000, 1, 1, 1, dtype=torch.float64)
    reference = torch.ones(2000, 1, 1, 1, dtype=torch.float64)
    policy = reference.clone()
    policy[:1000] = math.sqrt(1 - c)
    policy.requires_grad_()
    objective(policy, reference, noise, everywhere).loss.backward()
    # d = p², so ∂loss/∂d = ∂loss/∂p / 2p.
    credit = (policy.grad[:1000] / (2 * policy[:1000].detach())).flatten()
    assert credit.argmax().item() == peak


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_prediction_types_give_the_loss_of_the_implied_noise(prediction_type):
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = NoiseSchedule.from_scheduler(config | {"prediction_type": prediction_type})
    policy, reference, noise = predictions()
    noisy = torch.randn(2 * PAIRS, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    target = schedule.target(noise, T.repeat(2), noisy)
    a, b = (each.view(-1, 1, 1, 1) for each in (target.scale, target.shift))
    out = build_objective("dde", schedule, beta=50.0)(policy, reference, noise, T, noisy)
    plain = build_objective("dde", NoiseSchedule.from_scheduler(config), beta=50.0)
    expected = plain(a * policy + b * noisy, a * reference + b * noisy, noise, T)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(torch.autograd.grad(out.loss, policy), torch.autograd.grad(expected.loss, policy))
    with pytest.raises(UserError, match="noisy_latents"):
        build_objective("dde", schedule)(policy, reference, noise, T)


def test_unshared_noise(schedule):
    policy, reference, noise = predictions()
    objective = build_objective("uniform", schedule)
    shared = objective(policy, reference, noise, T)
    repeated = objective(policy, reference, noise.repeat(2, 1, 1, 1), T)
    assert torch.equal(shared.loss, repeated.loss)
    # Each image against its own noise, by the formula.
    other = torch.cat([noise, noise.roll(1, 0)])
    winner, loser = ((policy - other).square() - (reference - other).square()).mean((1, 2, 3)).chunk(2)
    found = objective(policy, reference, other, T)
    torch.testing.assert_close(found.logits, -(2000.0 / 2) * (winner - loser).detach())
    assert (found.logits - shared.logits).abs().min() > 1e-3


def test_discount_by_sampling_has_no_gain(schedule):
    policy, reference, noise = predictions()
    sampled = build_objective("discounted", schedule, discount_mode="sample")(policy, reference, noise, T)
    assert torch.equal(sampled.logits, build_objective("uniform", schedule)(policy, reference, noise, T).logits)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_references_errors_in_its_place_give_the_same_bits(prediction_type):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = NoiseSchedule.from_scheduler({**betas, "prediction_type": prediction_type})
    policy, reference, noise = predictions(torch.bfloat16)
    noise = noise.float()
    noisy = schedule.add_noise(torch.ones(2 * PAIRS, *SHAPE), noise.repeat(2, 1, 1, 1), T.repeat(2))
    found = []
    for _ in range(2):
        objective = build_objective("dde", schedule, beta=50.0)
        fill_table(objective)
        given = {"reference_errors": found[0][0].reference_errors} if found else {}
        out = objective(policy, None if given else reference, noise, T, noisy, **given)
        objective.commit()
        found.append((out, torch.autograd.grad(out.loss, policy)[0], objective.state_dict()))
    (model, gradient, table), (precomputed, again, same_table) = found
    assert model.reference_errors.shape == (2 * PAIRS,) and model.reference_errors.dtype == torch.float32
    assert torch.equal(model.loss, precomputed.loss) and torch.equal(gradient, again)
    shared = model.metrics.keys() - {"drift/path_kl", "error/reference_path"}
    assert shared == precomputed.metrics.keys()
    assert all(torch.equal(model.metrics[name], precomputed.metrics[name]) for name in shared)
    assert torch.equal(model.by_timestep, precomputed.by_timestep)
    assert all(torch.equal(value, same_table[name]) for name, value in table.items())


def test_a_skipped_step_leaves_the_table_alone(schedule):
    policy, reference, noise = predictions()
    objective = build_objective("dde", schedule)
    objective(policy, reference, noise, T)
    objective.discard()
    objective.commit()
    assert not objective.table.count.any()
    assert not objective.table.correction.any()


def test_metrics(schedule):
    policy, reference, noise = predictions()
    out = build_objective("dde", schedule, beta=500.0)(policy, reference, noise, T)
    metrics = {name: value.item() for name, value in out.metrics.items()}
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])
    assert metrics["rewards/margins"] == pytest.approx(out.logits.mean().item())  # no correction yet
    assert metrics["rewards/accuracies"] == pytest.approx((out.logits > 0).double().mean().item())
    assert metrics["loss"] == out.loss.item()
    expected = (policy[:PAIRS] - noise).square().mean().item()
    assert metrics["error/policy_chosen"] == pytest.approx(expected)
    assert all(value.ndim == 0 and not value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("name", ["dde", "uniform"])
def test_the_offset_is_the_correction_in_units_of_z(schedule, name):
    policy, reference, noise = predictions()
    objective = build_objective(name, schedule, beta=500.0, correction_weight=0.5)
    fill_table(objective)
    out = objective(policy, reference, noise, T)
    without = build_objective({"dde": "dde_single"}.get(name, name), schedule, beta=500.0)(policy, reference, noise, T)
    expected = (out.logits - without.logits).double().mean().item()
    assert out.metrics["dde/offset_mean"].item() == pytest.approx(expected, rel=1e-4)
    assert (expected == 0) == (name == "uniform")


@pytest.mark.parametrize("sampling", [{}, {"timestep_range": (300, 980)}, {"name": "discounted", "discount_mode": "sample"}])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_path_kl(prediction_type, sampling):
    """D λ_t ‖ε_θ - ε_ref‖² / p(t), the mean of all samples, written out; ε = √ᾱ v + √(1-ᾱ) x_t."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": prediction_type}
    schedule = NoiseSchedule.from_scheduler(config)
    policy, reference, noise = predictions()
    t = torch.tensor([417, 950, 303])
    noisy = torch.randn(2 * PAIRS, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    objective = build_objective(**{"name": "dde"} | sampling, schedule=schedule)
    found = objective(policy, reference, noise, t, noisy).metrics
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    drawn = torch.arange(1000)
    drawn = (0.9 ** (0.05 * (999 - drawn.double()))) if sampling.get("name") else torch.ones(1000, dtype=torch.float64)
    low, high = sampling.get("timestep_range", (0, 1000))
    kl = bound = 0.0
    for i, step in enumerate(t.tolist()):
        weight = betas[step] / (2 * (1 - betas[step]) * (1 - alphas[step - 1])) * drawn[low:high].sum() / drawn[step]
        for row in (i, PAIRS + i):
            own, other = policy[row].detach(), reference[row]
            if prediction_type == "v_prediction":
                own, other = (alphas[step].sqrt() * each + (1 - alphas[step]).sqrt() * noisy[row] for each in (own, other))
            kl += weight * (own - other).square().sum() / (2 * PAIRS)
            bound += weight * (other - noise[i]).square().sum() / (2 * PAIRS)
    assert found["drift/path_kl"].item() == pytest.approx(kl.item(), rel=1e-9)
    assert found["error/reference_path"].item() == pytest.approx(bound.item(), rel=1e-9)


def test_path_kl_is_the_sum_over_the_path(schedule):
    """Over all timesteps once: Σ_t λ_t D ‖ε_θ - ε_ref‖², whatever they are drawn from; a micro-batch's share is its own."""
    every = torch.arange(1000)
    generator = torch.Generator().manual_seed(0)
    reference, noise = torch.randn(2000, 1, 2, 2, generator=generator), torch.randn(1000, 1, 2, 2, generator=generator)
    policy = reference + 0.1
    objective = build_objective("uniform", schedule)
    expected = 4 * 0.01 * schedule.stepwise_weight.sum().item()
    assert objective(policy, reference, noise, every).metrics["drift/path_kl"].item() == pytest.approx(expected, rel=1e-4)
    parts = []
    for own in every.split(250):
        both = torch.cat([own, 1000 + own])
        parts.append(objective(policy[both], reference[both], noise[own], own).metrics["drift/path_kl"].item())
    assert sum(parts) / 4 == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["dde", "dde_step", "uniform", "discounted"])
def test_the_credit_is_summed_over_pairs_by_timestep(schedule, name):
    """Σ g_t σ(-z) of each fiftieth of the timesteps, with g written out; the credit is (β/2) times it."""
    policy, reference, noise = predictions(torch.float64)
    objective = build_objective(name, schedule, beta=50.0)
    fill_table(objective)
    out = objective(policy, reference, noise, T)
    gain = {"dde": schedule.single_shot_weight, "discounted": 0.9 ** (0.05 * torch.arange(999, -1, -1, dtype=torch.float64))}
    gain = gain.get(name, torch.ones(1000, dtype=torch.float64))
    expected = torch.zeros(2, 50, dtype=torch.float64)
    for t, z in zip(T.tolist(), out.logits.tolist(), strict=True):
        expected[0, t // 20] += gain[t] / (1 + math.exp(z))
        expected[1, t // 20] += 1
    found = out.by_timestep[[BY_TIMESTEP.index("credit"), BY_TIMESTEP.index("pairs")]]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_saturated_pairs_are_told_apart_by_their_side(schedule):
    """One winner far better than the reference's, one far worse: both at the noisy end, where w_t is large."""
    _, reference, noise = predictions()
    t = torch.full((PAIRS,), 999)
    policy = reference.clone()
    policy[0] = noise[0]  # no error
    policy[1] = noise[1] + 3 * (reference[1] - noise[1])
    metrics = build_objective("dde", schedule, beta=2000.0)(policy, reference, noise, t).metrics
    assert metrics["dde/saturated_learnt"].item() == pytest.approx(1 / PAIRS)
    assert metrics["dde/saturated_wrong"].item() == pytest.approx(1 / PAIRS)


def test_pairs_that_are_level_count_one_half(schedule):
    """Before the first step all pairs are level. A coin toss is right on half of them."""
    _, reference, noise = predictions()
    level = build_objective("dde", schedule)(reference, reference, noise, T)
    assert level.metrics["rewards/accuracies"] == level.metrics["rewards/margin_accuracies"] == 0.5
    assert level.by_timestep[0].sum() == PAIRS / 2
    half = reference.clone()
    half[0] = noise[0]  # the first winner is predicted without an error, all others as before
    out = build_objective("dde", schedule)(half, reference, noise, T)
    assert out.metrics["rewards/accuracies"].item() == pytest.approx((1 + (PAIRS - 1) / 2) / PAIRS)
    assert out.metrics["rewards/accuracies"] == out.metrics["rewards/margin_accuracies"]


def test_timestep_probabilities(schedule):
    segment = build_objective("dde", schedule, timestep_range=(200, 700)).timestep_probabilities
    assert not segment[:200].any()
    assert not segment[700:].any()
    assert segment[200:700].unique().tolist() == pytest.approx([1 / 500])
    sampled = build_objective("discounted", schedule, discount_mode="sample", discount=0.99).timestep_probabilities
    assert (sampled[500] / sampled[501]).item() == pytest.approx(0.99)
    assert sampled.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "ddee"}, "did you mean 'dde'"),
        *[({"name": "dde", "beta": value}, "beta") for value in (0.0, math.inf, math.nan)],
        *[({"name": "dde", "correction_weight": value}, "correction_weight") for value in (-0.1, math.inf, math.nan)],
        ({"name": "dde", "correction_ema": 1.0}, "correction_ema"),
        *[({"name": "dde", "correction_buckets": value}, "must lie in 1 to 1000") for value in (0, 1001)],
        ({"name": "dde", "timestep_range": (500, 1001)}, "timestep_range"),
        ({"name": "discounted", "discount": 1.5}, "discount"),
        ({"name": "discounted", "discount_mode": "both"}, "discount_mode"),
    ],
)
def test_bad_options(schedule, options, named):
    with pytest.raises(UserError, match=named):
        build_objective(schedule=schedule, **options)


def numbers(objective):
    """Return numbers of an objective of any name and options: p(t), λ, the logits after two steps, and the table with its sums."""
    policy, reference, noise = predictions()
    policy = (
        policy.detach() + torch.linspace(-0.3, 0.3, SHAPE[-1])
    ).requires_grad_()  # a winner's and its loser's errors are alike
    fill_table(objective)
    out = objective(policy, reference, noise, T)
    (gradient,) = torch.autograd.grad(out.loss, policy)
    tables = [objective.timestep_probabilities, objective.table.weight, objective.table.average, objective.table.correction]
    return [*tables, out.logits, out.loss, gradient]


# (what both have, what differs from the default)
EVERY_OPTION = [
    ({}, {"name": "dde_single"}),
    ({}, {"beta": 50.0}),
    ({}, {"correction_weight": 0.5}),
    ({}, {"correction_ema": 0.5}),
    ({}, {"correction_buckets": 20}),
    ({}, {"variance": "beta"}),
    ({"name": "discounted"}, {"discount": 0.99}),
    ({"name": "discounted"}, {"discount_mode": "sample"}),
    ({}, {"timestep_range": (200, 700)}),
    ({}, {"link": "sigmoid"}),
    ({}, {"label_smoothing": 0.1}),
    ({}, {"winner_preserving": 1.0}),
    ({}, {"credit": "mean"}),
    ({}, {"single_shot": "calibrated"}),
]


@pytest.mark.parametrize(("common", "changed"), EVERY_OPTION, ids=str)
def test_every_option_of_a_configuration_reaches_the_objective(common, changed):
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    options = common | changed
    direct = {name: value for name, value in options.items() if name != "variance"}
    schedule = NoiseSchedule.from_scheduler(scheduler, options.get("variance", "posterior"))
    found = numbers(configured_objective(ObjectiveConfig(**options), scheduler))
    expected = numbers(build_objective(**{"name": "dde"} | direct, schedule=schedule))
    unchanged = numbers(configured_objective(ObjectiveConfig(**common), scheduler))
    assert all(map(torch.equal, found, expected))
    assert not all(map(torch.equal, found, unchanged))


def test_every_option_of_a_configuration_is_tested_above():
    tested = {name for _, changed in EVERY_OPTION for name in changed}
    # What the noise is shared by is drawn elsewhere. Labels come with each call: tests/objective/test_links.py.
    assert tested == {field.name for field in fields(ObjectiveConfig)} - {"shared_noise", "soft_labels"}


def test_bad_shapes(schedule):
    policy, reference, noise = predictions()
    objective = build_objective("dde", schedule)
    with pytest.raises(UserError, match="winners then losers"):
        objective(policy[:-1], reference[:-1], noise, T)
    with pytest.raises(UserError, match="reference"):
        objective(policy, None, noise, T)
    errors = torch.ones(2 * PAIRS)
    with pytest.raises(UserError, match="Give one"):
        objective(policy, reference, noise, T, reference_errors=errors)
    with pytest.raises(UserError, match="reference_errors has shape"):
        objective(policy, None, noise, T, reference_errors=errors[1:])
    with pytest.raises(UserError, match="noise"):
        objective(policy, reference, noise[:, :2], T)
    with pytest.raises(UserError, match="empty batch"):
        objective(policy[:0], reference[:0], noise[:0], T[:0])
