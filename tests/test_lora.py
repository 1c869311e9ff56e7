from __future__ import annotations

import sys

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

from dde_ds import UserError, build_objective, load_config
from dde_ds.models import lora
from dde_ds.training.batches import Batch
from dde_ds.training.reference import adapters_off
from dde_ds.training.step import micro_step
from tests.conftest import ROOT

TARGETS = ("to_q", "to_out.0", "ff.net.2", "proj_in", "conv1")


def load(model) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(model, subfolder="unet")


def with_adapters(model, **options) -> UNet2DConditionModel:
    unet = load(model)
    lora.add_adapters(unet, **{"rank": 4, "alpha": 6, "targets": TARGETS, "seed": 0, **options})
    return unet


def adapters_of(unet) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in unet.named_parameters() if parameter.requires_grad}


def train_somewhat(unet) -> None:
    """Adapters that do something: B is zero at the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def predict(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (7, unet.config.cross_attention_dim)))
    conditions = {"text_embeds": torch.ones(2, 16), "time_ids": torch.full((2, 6), 16.0)}  # taken by SDXL's alone
    with torch.no_grad():
        return unet(latents, torch.tensor([100, 700]), text, added_cond_kwargs=conditions).sample


def test_only_the_adapters_are_trained_and_they_come_from_the_seed(sd_model):
    before = torch.get_rng_state()
    first, again, other = (adapters_of(with_adapters(sd_model, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in first)
    for target in TARGETS:
        assert any(f".{target}.lora_" in name for name in first), target
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("kind", ["sd_model", "sdxl_model"])
def test_merged_and_loaded_adapters_are_the_trained_model(tmp_path, request, kind):
    model = request.getfixturevalue(kind)
    trained = with_adapters(model)
    train_somewhat(trained)
    expected, base = predict(trained), load(model)
    assert (expected - predict(base)).abs().max() > 1e-2
    adapters, scale = adapters_of(trained), 6 / 4

    pipeline = DiffusionPipeline.from_pretrained(model)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=lora.to_file(adapters, scale))
    pipeline.load_lora_weights(tmp_path)
    assert torch.allclose(predict(pipeline.unet), expected, atol=1e-5)

    weights = base.state_dict()
    for name, difference in lora.differences(adapters, scale):
        weights[name] += difference.view_as(weights[name])
    assert torch.allclose(predict(base), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_the_base_with_the_adapters_off(sd_model, schedule, dtype):
    policy, base = with_adapters(sd_model).to(dtype), load(sd_model).to(dtype)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        latents=torch.randn(4, 4, 8, 8, generator=generator),
        noise=torch.randn(2, 4, 8, 8, generator=generator),
        timesteps=torch.tensor([300, 600]),
        prompt_embeds=torch.randn(4, 7, 16, generator=generator),
        positions=torch.arange(2),
    )
    objective, reference = build_objective("dde", schedule, beta=50), adapters_off(policy)

    def step():
        return micro_step(policy, reference, objective, batch, torch.device("cpu"))

    first = step()
    assert first.loss.item() == torch.tensor(2.0).log().item()
    first.loss.backward()
    assert {name for name, parameter in policy.named_parameters() if parameter.grad is not None} == set(adapters_of(policy))

    train_somewhat(policy)
    later = step()
    assert later.loss.item() != first.loss.item()
    with torch.no_grad():
        both = batch.timesteps.repeat(2)
        noisy = schedule.add_noise(batch.latents, batch.noise.repeat(2, 1, 1, 1), both).to(dtype)
        expected = base(noisy, both, batch.prompt_embeds.to(dtype)).sample
        assert torch.equal(reference(noisy, both, batch.conditioning), expected)
    assert len(adapters_of(policy)) > 0  # on again, and trained


@pytest.mark.parametrize(("target", "said"), [("to_kv", "nothing in the UNet"), ("norm1", "no linear layer or convolution")])
def test_a_target_that_is_none(sd_model, target, said):
    with pytest.raises(UserError, match=f"lora.targets names '{target}': {said}"):
        with_adapters(sd_model, targets=("to_q", target))


def test_without_peft(sd_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lora is set, but peft is not installed: pip install -e '.\[lora\]'"):
        with_adapters(sd_model)


def test_settings():
    recipe = ROOT / "launchers" / "recipes" / "sd15_lora.yaml"
    run = load_config(recipe, ["lora.rank=16", "ema.decay=0.9"])  # ema is null there
    assert (run.lora.rank, run.lora.scale, run.ema.decay) == (16, 1.0, 0.9)
    assert load_config(recipe, ["lora.alpha=4"]).lora.scale == 0.5
    with pytest.raises(UserError, match=r"reference\.placement is 'cpu': must be auto with lora"):
        load_config(recipe, ["reference.placement=cpu"])
    with pytest.raises(UserError, match=r"ema\.decay is 1\.0"):
        load_config(recipe, ["ema.decay=1"])
