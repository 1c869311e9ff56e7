from __future__ import annotations

import copy
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from dde_ds import UserError
from dde_ds.models.checkpointing import set_checkpointing
from dde_ds.models.compute_options import compile_blocks, use_channels_last
from dde_ds.models.encode import Encoder
from dde_ds.models.family import Conditioning
from dde_ds.models.lora import add_adapters
from dde_ds.models.unet import load_unet, predict, unet_digest
from dde_ds.training.reference import adapters_off


def test_pickled_weights_are_refused(sd_model, tmp_path):
    """``.bin`` files are pickles: reading one would run what it holds."""
    StableDiffusionPipeline.from_pretrained(sd_model).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model.bin is a pickle.* convert it: DiffusionPipeline"):
        load_unet(str(tmp_path))
    with pytest.raises(UserError, match=r"vae/diffusion_pytorch_model.bin is a pickle"):
        Encoder(str(tmp_path))


def test_the_digest_is_that_of_what_is_loaded(sd_model, tmp_path):
    """All shards of the weights and the architecture; not a variant that lies beside them, nor the version that saved them."""
    model = shutil.copytree(sd_model, tmp_path / "model")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    shutil.rmtree(model / "unet")
    unet.save_pretrained(model / "unet", max_shard_size="40KB")
    files = sorted((model / "unet").glob("*-of-*.safetensors"))
    assert len(files) > 1
    first = unet_digest(str(model))
    (model / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    config = model / "unet" / "config.json"
    config.write_text(config.read_text().replace('"_diffusers_version"', '"_older_version"'))
    assert unet_digest(str(model)) == first

    whole = config.read_text()
    config.write_text(whole.replace('"norm_num_groups": 4', '"norm_num_groups": 8'))
    assert unet_digest(str(model)) != first
    config.write_text(whole)
    files[-1].write_bytes(files[-1].read_bytes()[:-1] + b"x")
    assert unet_digest(str(model)) != first
    files[-1].unlink()
    with pytest.raises(UserError, match="unet holds no diffusion_pytorch_model-"):
        unet_digest(str(model))


@pytest.mark.parametrize("model", ["sd_model", "sdxl_model"])
def test_attention_is_pytorchs_fused_one(request, model):
    unet = load_unet(str(request.getfixturevalue(model)))
    assert {type(processor).__name__ for processor in unet.attn_processors.values()} == {"AttnProcessor2_0"}


def test_channels_last_carries_through(sd_model):
    """Every convolution of images sees it, though the weights lie as ZeRO leaves them, and the numbers stay."""
    unet, found = load_unet(str(sd_model)), []
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), Conditioning(torch.randn(2, 7, 16))
    expected = predict(unet, *inputs)
    use_channels_last(unet)
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda module, args, out: found.append(args[0].stride(1)))
    assert torch.allclose(predict(unet, *inputs), expected, atol=1e-5)
    assert len(found) > 10
    assert set(found) == {1}


@pytest.mark.slow
def test_compiled_blocks(sd_model):
    """Every way of checkpointing has the same gradients, eager PyTorch's but for bfloat16's rounding, and a pass without gradients predicts
    what training does, to the bit: a reference begins where its policy does."""
    eager = load_unet(str(sd_model)).bfloat16()
    inputs = torch.randn(4, 4, 8, 8), torch.tensor([3, 700, 3, 700]), Conditioning(torch.randn(4, 7, 16))

    def passes(unet, mode):
        set_checkpointing(unet, mode)
        unet.zero_grad()
        out = predict(unet, *inputs)
        out.float().square().mean().backward()
        return out.detach(), torch.cat([parameter.grad.flatten() for parameter in unet.parameters()])

    unet = copy.deepcopy(eager)
    compile_blocks(unet)
    predicted, gradients = passes(unet, "none")
    for mode in ("selective", "every_2", "full"):
        found = passes(unet, mode)
        assert torch.equal(found[0], predicted), mode
        assert torch.equal(found[1], gradients), mode
    with torch.no_grad():
        assert torch.equal(predict(unet, *inputs), predicted)
    expected, expected_gradients = passes(eager, "none")
    assert torch.allclose(predicted, expected, atol=0.03)
    assert (gradients - expected_gradients).float().norm() < 0.02 * expected_gradients.float().norm()


@pytest.mark.slow
def test_compiled_blocks_with_adapters(sd_model):
    """Which come and go between two passes of the same compiled UNet."""
    unet = load_unet(str(sd_model))
    inputs = torch.randn(4, 4, 8, 8), torch.tensor([3, 700, 3, 700]), Conditioning(torch.randn(4, 7, 16))
    with torch.no_grad():
        base = predict(unet, *inputs)
    add_adapters(unet, 4, 4.0, ["to_q", "ff.net.2"], seed=0)
    adapters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in adapters:
            parameter.add_(0.3)

    def step():
        with torch.no_grad():
            reference = adapters_off(unet)(*inputs)
        unet.zero_grad()
        predicted = predict(unet, *inputs)
        predicted.square().mean().backward()
        return reference, predicted.detach(), torch.cat([parameter.grad.flatten() for parameter in adapters])

    expected = step()
    compile_blocks(unet)
    for _ in range(2):
        for found, wanted in zip(step(), expected, strict=True):
            assert torch.allclose(found, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(expected[0], base)
    assert (expected[1] - base).abs().max() > 0.01
