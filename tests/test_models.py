from __future__ import annotations

import shutil

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from dde_ds import UserError
from dde_ds.models.encode import Encoder
from dde_ds.models.unet import load_unet, unet_digest


def test_pickled_weights_are_refused(sd_model, tmp_path):
    """``.bin`` files are pickles: reading one would run what it holds."""
    StableDiffusionPipeline.from_pretrained(sd_model).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(UserError, match=r"model.path .*no file named diffusion_pytorch_model.safetensors"):
        load_unet(str(tmp_path))
    with pytest.raises(UserError, match=r"--model .*no file named"):
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
