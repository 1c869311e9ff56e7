"""What the shipped files do to gradients: summed in float32 under bfloat16, at every stage that trains in it."""

from __future__ import annotations

import json
import os

import pytest
import torch

from tests.conftest import ROOT

# The first micro-batch's gradient is 1, those of the others 1/512: half of what bfloat16 can tell from 1.
MICRO_BATCHES = 256
EXACT = 1 + (MICRO_BATCHES - 1) / 512


def summed(name: str, grad_accum_dtype: str) -> float:
    """The gradient of a single weight over a step, as the engine reports its norm."""
    from dde_ds import initialize
    from dde_ds.distributed import start

    os.environ["DS_ACCELERATOR"] = "cpu"
    start()
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text()) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "data_types": {"grad_accum_dtype": grad_accum_dtype},
    }
    policy, _ = initialize(torch.nn.Linear(1, 1, bias=False), None, config)
    for number in range(MICRO_BATCHES):
        x = torch.full((1, 1), 1.0 if number == 0 else 1 / 512, dtype=torch.bfloat16)
        policy.backward(policy(x).sum())
        policy.step()
    return float(policy.get_global_grad_norm()) * MICRO_BATCHES


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_the_late_terms_count(name):
    assert summed(name, "fp32") == pytest.approx(EXACT, rel=2e-3)  # the sum itself may be rounded, on its way between ranks


def test_in_bfloat16_they_would_not():
    assert summed("zero2", "bf16") == pytest.approx(1.0, rel=1e-2)
