"""Real runs that train a part of the UNet, against a plain loop, from the launch to the exported model."""

from __future__ import annotations

import pytest
import torch

from dde_ds import load_config
from dde_ds.engine.checkpoint import WeightReader, list_checkpoints
from dde_ds.models.unet import load_unet
from tests.support.launching import Run, launch_many, rows, shipped, write_config
from tests.support.reference_loop import plain_steps

pytestmark = pytest.mark.slow


def test_a_part_from_the_launch_to_the_user(tmp_path, sd_model, sd_shards):
    """Cross-attention by ZeRO-2 and then by ZeRO-3, and patterns by ZeRO-3, on two ranks."""
    config = write_config(
        tmp_path / "run.yaml", sd_model, sd_shards, optimizer={"learning_rate": 2e-3, "warmup_steps": 2}, ema={"decay": 0.5}
    )
    cross, patterns = "model.trainable=cross_attention", 'model.trainable=[up_blocks.*.bias, "*.attn1.*"]'
    first, other = [f"output={tmp_path / name}" for name in ("first", "other")]
    zero2, zero3 = shipped(tmp_path, "zero2"), shipped(tmp_path, "zero3")
    outcomes = launch_many(
        [
            Run(config, [first, cross, zero2, "steps=2"]),
            Run(config, [first, "model.trainable=attention", zero2], resume="required"),
            Run(config, [first, cross, zero3, "model.gradient_checkpointing=full"], resume="required"),
            Run(config, [other, patterns, zero3]),
        ]
    )
    assert [outcome.code for outcome in outcomes] == [0, 1, 0, 0], [outcome.errors for outcome in outcomes]
    assert 'model.trainable is "attention", was "cross_attention"' in outcomes[1].errors[0]

    base = load_unet(str(sd_model)).state_dict()
    for name, override, wanted in (
        ("first", cross, lambda key: ".attn2." in key),
        ("other", patterns, lambda key: ".attn1." in key or (key.startswith("up_blocks.") and key.endswith(".bias"))),
    ):
        found = [(row["loss"], row["grad_norm"]) for row in rows(tmp_path / name)]
        plain = plain_steps(load_config(config, [override]), torch.float64)
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in plain], abs=1e-5)
        assert [norm for _, norm in found] == pytest.approx([norm for _, norm in plain], rel=1e-3)
        assert max(found)[0] - min(found)[0] > 1e-4, "a run that learns nothing would agree as well"
        held = WeightReader(list_checkpoints(tmp_path / name / "checkpoints")[-1])
        trained = {key for key in base if wanted(key)}
        assert {key.rpartition("/")[0] for key in held.names} == trained
        exported = load_unet(str(tmp_path / name / "export")).state_dict()
        assert exported.keys() == base.keys()
        for key, value in exported.items():
            assert torch.equal(value, held.read(f"{key}/ema") if key in trained else base[key])
        assert any(not torch.equal(exported[key], base[key]) for key in trained)
    assert "| trained part | cross attention |" in (tmp_path / "first" / "export" / "README.md").read_text()
