from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from dde_ds import NoiseSchedule, UserError, build_objective

# Of Stable Diffusion's schedule: t, ᾱ, w, λ, Σ_{j>t} λ_j.
TABLE = [
    (0, 0.99915, 0.00085, 0.0, 6.5277),
    (1, 0.99830, 0.00171, 0.50319, 6.0245),
    (100, 0.89422, 0.11829, 0.00663, 3.7657),
    (500, 0.27633, 2.61883, 0.00335, 2.2107),
    (900, 0.01415, 69.66568, 0.00529, 0.5634),
    (999, 0.00466, 213.58774, 0.00610, 0.0),
]


@pytest.mark.parametrize(("t", "alpha", "w", "lam", "tail"), TABLE)
def test_numbers_of_stable_diffusion(schedule, t, alpha, w, lam, tail):
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.alphas_cumprod[t].item() == pytest.approx(alpha, abs=5e-6)
    assert schedule.single_shot_weight[t].item() == pytest.approx(w, abs=5e-6)
    assert schedule.stepwise_weight[t].item() == pytest.approx(lam, abs=5e-6)
    assert schedule.stepwise_weight[t + 1 :].sum().item() == pytest.approx(tail, abs=5e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"},
        {"trained_betas": [0.01 * (i + 1) for i in range(50)], "num_train_timesteps": 50},
        *(
            {"beta_schedule": name, "rescale_betas_zero_snr": True}
            for name in ("linear", "squaredcos_cap_v2", "sigmoid", "laplace")
        ),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
    ],
)
def test_agrees_with_diffusers(options):
    theirs = (DDPMScheduler if options.get("beta_schedule") in ("sigmoid", "laplace") else DDIMScheduler)(**options)
    ours = NoiseSchedule.from_scheduler(theirs)
    # diffusers accumulates its product in float32.
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-4, atol=1e-6)
    for variance in ("posterior", "beta"):
        ours = NoiseSchedule.from_scheduler(theirs, variance)
        for table in (ours.alphas_cumprod, ours.single_shot_weight, ours.stepwise_weight):
            assert table.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["scaled_linear", "linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_zero_terminal_snr_trains_without_nan(name, prediction_type, dtype):
    """Train two steps at timesteps where w would be infinite. Loss, gradient, metrics and table stay finite, also with the second step's correction."""
    config = {"beta_schedule": name, "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True}
    schedule = NoiseSchedule.from_scheduler(config | {"prediction_type": prediction_type})
    objective = build_objective("dde", schedule, beta=5000.0)
    t = torch.tensor([0, 500, 996, 999])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 4, 8, 8, generator=generator)
    clean, policy, reference = torch.randn(3, 8, 4, 8, 8, generator=generator)
    noisy = schedule.add_noise(clean, noise.repeat(2, 1, 1, 1), t.repeat(2))
    policy = policy.to(dtype).requires_grad_()
    for _ in range(2):
        out = objective(policy, reference.to(dtype), noise, t, noisy)
        (gradient,) = torch.autograd.grad(out.loss, policy)
        objective.commit()
        for value in (out.loss, gradient, objective.table.correction, *out.metrics.values()):
            assert value.isfinite().all()


def test_stepwise_weight_is_the_kl_of_one_reverse_step(schedule):
    """λ_t ‖ε - ε_θ‖² against ‖μ_q - μ_θ‖²/(2σ²) with both means written out (eq. 3, 6, 7)."""
    generator = torch.Generator().manual_seed(0)
    clean, noise, predicted = torch.randn(3, 16, dtype=torch.float64, generator=generator)
    for t in (1, 250, 700, 999):
        alpha_bar, previous = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1]
        alpha = alpha_bar / previous
        beta = 1 - alpha
        noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise

        def mean(estimate, noisy=noisy, previous=previous, alpha=alpha, beta=beta, alpha_bar=alpha_bar):
            return previous.sqrt() * beta / (1 - alpha_bar) * estimate + alpha.sqrt() * (1 - previous) / (1 - alpha_bar) * noisy

        estimate = (noisy - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
        variance = beta * (1 - previous) / (1 - alpha_bar)
        kl = (mean(clean) - mean(estimate)).square().sum() / (2 * variance)
        assert kl.item() == pytest.approx((schedule.stepwise_weight[t] * (noise - predicted).square().sum()).item(), rel=1e-9)


def test_beta_as_the_variance(schedule):
    """λ_t = β_t/(2 α_t (1-ᾱ_t)) where σ² = β: the factor (1-ᾱ_{t-1})/(1-ᾱ_t) of the posterior variance is gone."""
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    found = NoiseSchedule.from_scheduler(config, variance="beta").stepwise_weight
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    cumulative = torch.cumprod(1 - beta, 0)
    torch.testing.assert_close(found[1:], (beta / (2 * (1 - beta) * (1 - cumulative)))[1:])
    assert found[0] == 0
    assert (found[1:] < schedule.stepwise_weight[1:]).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_implied_noise_undoes_the_parameterisation(prediction_type):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    clean, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([10, 500, 990])
    noisy = schedule.add_noise(clean, noise, t)
    output = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, t)}[prediction_type]
    target = schedule.target(noise, t, noisy)
    if target.scale is not None:
        output = target.scale.view(-1, 1, 1, 1) * output + target.shift.view(-1, 1, 1, 1) * target.noisy
    torch.testing.assert_close(output, noise, rtol=1e-4, atol=1e-4)  # diffusers' velocity has float32 coefficients


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"beta_schedule": "scaled_liner", "beta_start": 0.1, "beta_end": 0.2}, "did you mean 'scaled_linear'"),
        ({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "flow"}, "prediction_type"),
        (FlowMatchEulerDiscreteScheduler(), "no beta_schedule, beta_start.*flow matching"),
        (EDMEulerScheduler(), "no beta_schedule"),
        ({"beta_schedule": "linear", "beta_end": 0.02}, "no beta_start"),
        (CogVideoXDDIMScheduler(), "snr_shift_scale"),
        ({"trained_betas": [0.1, -0.1]}, "betas"),
        ({"trained_betas": [0.1, 0.5, 1.0]}, r"betas must lie in \(0, 1\)"),  # ᾱ would be 0 and w infinite
        ({"trained_betas": [0.5] * 1000}, "weight w at timestep 39 is .* too near to 0 or 1"),  # ᾱ ends at 2⁻¹⁰⁰⁰
        ({"beta_schedule": "linear", "beta_start": 1e-20, "beta_end": 0.02}, "weight λ at timestep 1 is inf"),
        ({"trained_betas": []}, "0 training timesteps"),
        ({"trained_betas": [0.01], "rescale_betas_zero_snr": True}, "1 training timesteps"),
        ({"trained_betas": "many"}, "trained_betas: expected a list of numbers"),
    ],
)
def test_unusable_scheduler(config, named):
    with pytest.raises(UserError, match=named):
        NoiseSchedule.from_scheduler(config)
    with pytest.raises(UserError, match="variance"):
        NoiseSchedule.from_scheduler({"beta_schedule": "squaredcos_cap_v2"}, variance="posteriori")
