"""``model.trainable``: which parameters a word or a pattern selects, and what is refused."""

from __future__ import annotations

import pytest
import torch

from dde_ds import UserError, load_config
from dde_ds.config import ModelConfig
from dde_ds.models.trainable import train_part, trained_names
from dde_ds.models.unet import load_unet
from dde_ds.planning.cost import Selection, parameter_sizes, training_pass
from dde_ds.planning.gpus import DEVICES
from dde_ds.planning.plan import checkpoint_bytes, export_bytes, make_plan
from dde_ds.planning.workload import workload_of
from dde_ds.training.prepare import open_shards
from tests.planning.test_plan import LATENT, TINY, TOKENS
from tests.support.launching import write_config


@pytest.mark.parametrize(
    ("trainable", "wanted"),
    [
        ("all", lambda name: True),
        ("attention", lambda name: ".attn1." in name or ".attn2." in name),
        ("cross_attention", lambda name: ".attn2." in name),
        (("mid_block.*", "*.to_k.weight"), lambda name: name.startswith("mid_block.") or name.endswith(".to_k.weight")),
    ],
)
def test_what_is_trained(trainable, wanted, sd_model, sdxl_model):
    for model in (sd_model, sdxl_model):
        unet = load_unet(str(model))
        patterns = ModelConfig("path", trainable=trainable).trained_patterns
        train_part(unet, patterns)
        chosen = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
        assert chosen == [name for name, _ in unet.named_parameters() if wanted(name)] == trained_names(unet, patterns)
        assert chosen


def test_what_is_refused(tmp_path, sd_model, sd_shards):
    unet = load_unet(str(sd_model))
    with pytest.raises(UserError, match=r"model\.trainable names '\*\.attn3\.\*': no parameter .*; near it: .*\*\.attn[12]\.\*"):
        train_part(unet, ("mid_block.*", "*.attn3.*"))
    with pytest.raises(UserError, match=r"near it: conv_in\.\*, "):
        train_part(unet, ("~~~",))
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    assert load_config(config, ['model.trainable=["*.attn2.*", mid_block.*]']).model.trainable == ("*.attn2.*", "mid_block.*")
    for override, message in (
        ("model.trainable=atention", r"model\.trainable is 'atention': must be all, attention, cross_attention, or a list"),
        ("model.trainable=[]", r"model\.trainable is \(\): must be all"),
        ("model.trainable=null", r"model\.trainable is None: expected text"),
        ("model.trainable=[3]", r"model\.trainable\[0\] is 3: expected text"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(config, [override])
    with pytest.raises(UserError, match=r"model\.trainable is 'attention': must be all with lora"):
        load_config(config, ["model.trainable=attention", "lora={rank: 4}"])


def test_the_plan_counts_the_part(tmp_path, sd_model, sd_shards):
    sizes, whole = parameter_sizes(TINY, Selection(("*.attn2.*",))), parameter_sizes(TINY)
    assert sorted(sizes.trained + sizes.frozen) == sorted(whole.trained)
    thin, full = (
        training_pass(TINY, LATENT, "none", torch.bfloat16, TOKENS, part=part)
        for part in (Selection(("*.attn1.*", "*.attn2.*")), None)
    )
    assert thin.flops < full.flops
    run = load_config(write_config(tmp_path / "run.yaml", sd_model, sd_shards), ["model.trainable=cross_attention"])
    unet = load_unet(str(sd_model))
    trained = sum(value.numel() for name, value in unet.named_parameters() if ".attn2." in name)
    everything = sum(value.numel() for value in unet.parameters())
    task = workload_of(run, open_shards(run)[0])
    assert checkpoint_bytes(run, task.sizes) == 12 * trained
    assert export_bytes(run, task.sizes) == 4 * everything
    memory = make_plan(run, task, 1, 2, DEVICES[0])["memory"]
    assert memory["reference"] == 4 * everything
