from __future__ import annotations

import pytest
from diffusers import StableDiffusionPipeline

from dde_ds import UserError
from dde_ds.models.encode import Encoder
from dde_ds.models.unet import load_unet


def test_pickled_weights_are_refused(sd_model, tmp_path):
    """``.bin`` files are pickles: reading one would run what it holds."""
    StableDiffusionPipeline.from_pretrained(sd_model).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(UserError, match=r"model.path .*no file named diffusion_pytorch_model.safetensors"):
        load_unet(str(tmp_path))
    with pytest.raises(UserError, match=r"--model .*no file named"):
        Encoder(str(tmp_path))
