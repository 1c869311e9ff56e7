"""Gradient checkpointing changes memory and time, never a gradient."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dde_ds import UserError
from dde_ds.config import ModelConfig
from dde_ds.models.checkpointing import set_checkpointing
from dde_ds.models.family import Conditioning
from dde_ds.models.unet import load_unet, predict

MODES = ("none", "selective", "every_2", "every_3", "full")


@pytest.fixture(params=["sd_model", "sdxl_model"])
def unet(request) -> UNet2DConditionModel:
    return load_unet(str(request.getfixturevalue(request.param))).train()


def conditioning_of(unet: UNet2DConditionModel) -> Conditioning:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(4, 7, unet.config.cross_attention_dim, generator=generator)
    if unet.config.addition_embed_type == "text_time":
        return Conditioning(embeds, torch.randn(4, 16, generator=generator), torch.full((4, 6), 16.0))
    return Conditioning(embeds)


def forward(unet: UNet2DConditionModel) -> torch.Tensor:
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return predict(unet, latents, torch.tensor([3, 700, 3, 700]), conditioning_of(unet))


def gradients(unet: UNet2DConditionModel) -> list[torch.Tensor]:
    unet.zero_grad()
    forward(unet).square().mean().backward()
    return [parameter.grad.clone() for parameter in unet.parameters()]


def kept_bytes(unet: UNet2DConditionModel) -> int:
    """Return the bytes that a forward pass has allocated and not freed at its end. Hooks on saved tensors would miss the tensors that ``selective`` keeps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        output = forward(unet)
    assert output.requires_grad  # still alive here, and the graph with it
    return sum(event.self_cpu_memory_usage for event in found.key_averages())


def test_gradients_are_those_without(unet):
    expected = gradients(unet)
    for mode in MODES:
        set_checkpointing(unet, mode)
        assert all(torch.equal(a, b) for a, b in zip(gradients(unet), expected, strict=True)), mode


def test_each_mode_keeps_less(unet):
    forward(unet)  # what is made once is not counted
    kept = {}
    for mode in MODES:
        set_checkpointing(unet, mode)
        kept[mode] = kept_bytes(unet)
    assert kept["none"] > 1.2 * kept["selective"] > 1.2 * kept["full"]
    assert kept["none"] > 1.2 * kept["every_2"] > 1.2 * kept["every_3"] > 1.2 * kept["full"]


def test_what_is_computed_twice(unet):
    """Matrix products and convolutions of a forward and a backward pass: none but those of whole blocks is done again."""
    counted: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            counted.append(operator.name())
            return operator(*args, **(kwargs or {}))

    def products(mode: str) -> int:
        set_checkpointing(unet, mode)
        counted.clear()
        with Count():
            gradients(unet)
        return sum(name in ("aten::convolution", "aten::addmm", "aten::mm", "aten::bmm") for name in counted)

    found = {mode: products(mode) for mode in MODES}
    assert found["none"] == found["selective"] < found["every_2"] < found["every_3"] < found["full"]


def test_modes_that_are_none(unet):
    for mode in ("every", "every_1", "every_0", "every_02", "Full", "", "half"):
        with pytest.raises(ValueError, match="must be none, selective, every_2"):
            set_checkpointing(unet, mode)
        with pytest.raises(UserError, match=r"model\.gradient_checkpointing is .*must be auto, none, selective, every_2"):
            ModelConfig("m", gradient_checkpointing=mode)
