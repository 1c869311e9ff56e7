from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from diffusers import UNet2DConditionModel

from dde_ds import NoiseSchedule, build_objective
from dde_ds.training.batches import Batch
from dde_ds.training.reference import frozen_model
from dde_ds.training.step import errors_of, micro_step

ZERO_TERMINAL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True}


def test_the_rounding_of_x_t_stays_out_of_a_v_models_error(sd_model):
    """At zero terminal SNR the implied noise is x_t but for √ᾱ·v: of a bfloat16 x_t only the rounding would be left.

    d = ‖√ᾱ (v + x₀)‖² ≈ 1e-7 there; the rounding alone makes it 1e-6.
    """
    policy = UNet2DConditionModel.from_pretrained(sd_model, subfolder="unet").bfloat16()
    reference = copy.deepcopy(policy).requires_grad_(False)
    objective = build_objective("dde", NoiseSchedule.from_scheduler(ZERO_TERMINAL | {"prediction_type": "v_prediction"}))
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        latents=torch.randn(8, 4, 8, 8, generator=generator).half(),
        noise=torch.randn(4, 4, 8, 8, generator=generator),
        timesteps=torch.full((4,), 999),
        prompt_embeds=torch.randn(8, 7, policy.config.cross_attention_dim, generator=generator),
        positions=torch.arange(2),
    )
    out = micro_step(policy, frozen_model(reference), objective, batch, torch.device("cpu"))
    assert out.loss.item() == torch.tensor(2.0).log().item()
    assert 1e-8 < out.metrics["error/policy_chosen"].item() < 5e-7
    assert 1e-8 < out.metrics["error/policy_rejected"].item() < 5e-7


def test_each_of_a_pair_may_have_its_own_noise(sd_model, schedule):
    """With ``shared_noise: false``, noise of shape (2B,…) reaches both models and the error."""
    policy = UNet2DConditionModel.from_pretrained(sd_model, subfolder="unet")
    reference = copy.deepcopy(policy).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    text = torch.randn(4, 7, policy.config.cross_attention_dim, generator=generator)
    timesteps = torch.tensor([300, 600])
    batch = Batch(latents=latents, noise=noise, timesteps=timesteps, positions=torch.arange(2), prompt_embeds=text)
    modes = []
    reference.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    out = micro_step(policy, frozen_model(reference), build_objective("uniform", schedule), batch, torch.device("cpu"))
    assert modes == [False], "the reference's pass keeps nothing for a backward pass"
    with torch.no_grad():
        noisy = schedule.add_noise(latents, noise, timesteps.repeat(2))
        errors = (policy(noisy, timesteps.repeat(2), text).sample - noise).square().mean((1, 2, 3))
    assert torch.allclose(out.metrics["error/policy_chosen"], errors[:2].mean(), rtol=1e-5)
    assert torch.allclose(out.metrics["error/policy_rejected"], errors[2:].mean(), rtol=1e-5)


@pytest.mark.parametrize("policy_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reference_type", [torch.float32, torch.bfloat16])
def test_a_reference_alone_finds_the_errors_that_it_finds_beside_a_policy(sd_model, schedule, policy_type, reference_type):
    """To the last bit, whichever types the two have: x_t is rounded to the policy's, then to the reference's."""
    policy = UNet2DConditionModel.from_pretrained(sd_model, subfolder="unet").to(policy_type)
    reference = frozen_model(copy.deepcopy(policy).to(reference_type).requires_grad_(False))
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        latents=torch.randn(4, 4, 8, 8, generator=generator).half(),
        noise=torch.randn(2, 4, 8, 8, generator=generator),
        timesteps=torch.tensor([300, 900]),
        prompt_embeds=torch.randn(4, 7, policy.config.cross_attention_dim, generator=generator).half(),
        positions=torch.arange(2),
    )
    objective = build_objective("dde", schedule)
    out = micro_step(policy, reference, objective, batch, torch.device("cpu"))
    alone = errors_of(reference, schedule, batch, torch.device("cpu"), policy_type)
    assert alone.dtype == torch.float32 and alone.equal(out.reference_errors)
    # What the precomputed reference hands over takes the reference's place.
    again = micro_step(policy, None, objective, dataclasses.replace(batch, reference_errors=alone), torch.device("cpu"))
    assert again.loss.equal(out.loss)
