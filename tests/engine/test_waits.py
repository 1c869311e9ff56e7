"""No timer of DeepSpeed's makes the host wait for the device in a micro-batch. Counted on the CPU, whose engine asks for it as a GPU's does."""

from __future__ import annotations

import json
import os

import pytest
import torch

from tests.conftest import ROOT

STEPS, ACCUMULATION = 4, 2


def waits(name: str, monkeypatch, **changes) -> int:
    """How often an engine and its reference had the accelerator waited for in some steps: DeepSpeed's timers do from the third on."""
    from deepspeed.accelerator import get_accelerator

    from dde_ds import initialize
    from dde_ds.distributed.group import start

    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    start()
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text()) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        **changes,
    }
    policy, reference = initialize(torch.nn.Linear(3, 1), torch.nn.Linear(3, 1), config)
    counted = []
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_: counted.append(1))
    x = torch.ones(1, 3, dtype=torch.bfloat16)
    for _ in range(STEPS * ACCUMULATION):
        with torch.no_grad():
            reference(x)
        policy.backward(policy(x).sum())
        policy.step()
    return len(counted)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_none(name, monkeypatch):
    assert waits(name, monkeypatch) == 0


def test_with_the_timer_there_would_be(monkeypatch):
    assert waits("zero2", monkeypatch, timers={"throughput": {"enabled": True}}) >= 2 * (STEPS - 2) * ACCUMULATION
