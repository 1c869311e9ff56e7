"""What becomes of gradients over a step: summed in float32 under bfloat16 at every stage that trains in it, and by one rank in place."""

from __future__ import annotations

import json
import math
import os
from contextlib import nullcontext

import pytest
import torch

from dde_ds.engine.update import apply_if_finite, gradient_accumulation
from dde_ds.engine.zero import complete_config
from dde_ds.errors import UserError
from tests.conftest import ROOT
from tests.engine.test_zero_config import run_with

# The first micro-batch's gradient is 1, those of the others 1/512: half of what bfloat16 can tell from 1.
MICRO_BATCHES = 256
EXACT = 1 + (MICRO_BATCHES - 1) / 512


def summed(name: str, grad_accum_dtype: str) -> float:
    """The gradient of a single weight over a step, as the engine reports its norm."""
    from dde_ds import initialize
    from dde_ds.distributed.group import start

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


def engine(name: str, precision: str = "fp32"):
    from dde_ds import initialize
    from dde_ds.distributed.group import start

    os.environ["DS_ACCELERATOR"] = "cpu"
    start()
    config = complete_config(run_with(ROOT / "ds_configs" / f"{name}.json", precision=precision), world=1)
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 13), torch.nn.Tanh(), torch.nn.Linear(13, 3))
    return initialize(module, None, config | {"gradient_accumulation_steps": 3, "train_batch_size": 6})[0]


def backward(policy, number: int, factor: float = 1.0) -> None:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(number)).to(next(policy.parameters()).dtype)
    policy.backward(factor * (policy(x).float() - 1).square().mean())
    if not policy.is_gradient_accumulation_boundary():
        policy.step()


def reductions(name: str, precision: str, monkeypatch) -> list[int]:
    """All-reduces of gradients within each of a step's three micro-batches, and as the step is over."""
    policy, counted, original = engine(name, precision), [0], torch.distributed.all_reduce

    def all_reduce(tensor, *arguments, **options):
        counted[-1] += tensor.numel() > 100  # not of a flag or a norm
        return original(tensor, *arguments, **options)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with gradient_accumulation(policy):
        for number in range(3):
            backward(policy, number)
            counted.append(0)
    apply_if_finite(policy)
    return counted


def test_one_rank_reduces_once_a_step(monkeypatch):
    assert reductions("zero2", "fp32", monkeypatch) == [0, 0, 0, 1]


def test_but_where_the_float32_sums_are_a_part_of_it(monkeypatch):
    assert reductions("zero2", "bf16", monkeypatch) == [1, 1, 1, 0]


def trained(steps: list[list[float]], summed_in_place: bool) -> tuple[list[torch.Tensor], list[float], int]:
    """Weights, norms and steps made, where a step is the factors of its micro-batches' losses."""
    policy, norms = engine("zero2"), []
    for number, factors in enumerate(steps):
        with gradient_accumulation(policy) if summed_in_place else nullcontext():
            for micro, factor in enumerate(factors):
                backward(policy, 3 * number + micro, factor)
        norms.append(apply_if_finite(policy))
    return [parameter.detach().clone() for parameter in policy.module.parameters()], norms, policy.global_steps


@pytest.mark.parametrize("bad", [None, 0, 2])
def test_to_the_same_numbers(bad):
    """To the last bit; a gradient that is not a number leaves out its own step in the same way."""
    steps = [[1.0, 3.0, 100.0] for _ in range(4)]
    if bad is not None:
        steps[1][bad] = math.nan
    (weights, norms, made), (others, other_norms, other_made) = (trained(steps, in_place) for in_place in (True, False))
    assert [math.isfinite(norm) for norm in norms] == [bad is None or number != 1 for number in range(4)]
    assert str(norms) == str(other_norms)
    assert made == other_made
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))
    assert not torch.equal(weights[0], trained(steps[:1], True)[0][0])


@pytest.mark.parametrize("micro", [0, 1])
def test_an_error_within_is_told_as_it_is(micro):
    policy = engine("zero2")
    with pytest.raises(UserError, match="a shard is bad"), gradient_accumulation(policy):
        for number in range(micro):
            backward(policy, number)
        raise UserError("a shard is bad")
