"""A NaN in one of two ranks: at every stage and precision no rank's weights, moments or counts move, and the next step is as ever."""

from __future__ import annotations

import math

import pytest
import torch
import torch.multiprocessing as mp

from dde_ds import NoiseSchedule, build_objective
from dde_ds.engine import checkpoint
from dde_ds.engine import state as training_state
from dde_ds.engine.update import apply_if_finite
from tests.support.launching import spawn

pytestmark = pytest.mark.slow
WORLD, ACCUMULATION = 2, 2


def engine(stage: int, bf16: bool):
    import deepspeed

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 13), torch.nn.Tanh(), torch.nn.Linear(13, 3))
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8 // WORLD // ACCUMULATION,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage}
        | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),  # shard even the smallest
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
    } | ({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {})
    return deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)[0]


def one_step(policy, rank: int, poison: bool = False) -> float:
    for micro in range(ACCUMULATION):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(micro))[rank::WORLD]
        loss = (policy(x.to(next(policy.parameters()).dtype)).float() - 1).square().mean()
        if poison and rank == 1 and micro == 0:  # what follows it must not hide it
            loss = loss * torch.nan
        policy.backward(loss)
        if not policy.is_gradient_accumulation_boundary():
            policy.step()
    return apply_if_finite(policy)


def everything(policy) -> list[torch.Tensor]:
    """Weights as the model runs on them; and float32 weights, moments and count where ZeRO has them."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(policy.module.parameters())):
        found = [parameter.detach().float().clone() for parameter in policy.module.parameters()]
    if policy.zero_optimization_stage() == 0:
        states = policy.optimizer.state.values()
        return found + [value.clone() for state in states for value in state.values()]
    found += [value.clone() for _, tensors in training_state.gather(policy) for value in tensors.values()]
    return [*found, torch.tensor(training_state.optimizer_steps(policy))]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def one_rank(rank: int, folder, results) -> None:
    from dde_ds.distributed.group import start

    start()
    for stage, bf16 in [(0, False), *((stage, bf16) for stage in (1, 2, 3) for bf16 in (False, True))]:
        policy = engine(stage, bf16)
        norms = [one_step(policy, rank)]
        before = everything(policy)
        norms.append(one_step(policy, rank, poison=True))
        untouched = same(before, everything(policy))
        norms.append(one_step(policy, rank))
        results[rank, stage, bf16] = (norms, untouched, same(before, everything(policy)))

    # Before the first update the optimizer has no state yet. Saved and restored, it starts as if nothing had been.
    schedule = NoiseSchedule.from_scheduler({"beta_schedule": "squaredcos_cap_v2"})
    for stage in (1, 2, 3):
        policy, objective = engine(stage, False), build_objective("dde", schedule)
        assert math.isinf(one_step(policy, rank, poison=True))
        saved, _ = checkpoint.save(folder / f"stage {stage}", policy, objective, {"step": 1}, keep=1)
        other = engine(stage, False)
        checkpoint.load(saved, other, objective)
        assert one_step(policy, rank) == one_step(other, rank) < math.inf
        results[rank, f"resumed at stage {stage}"] = same(everything(policy), everything(other))


def test_a_nan_in_one_rank_reaches_no_weight(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        spawn(one_rank, WORLD, tmp_path, results)
        results = dict(results)
    assert len(results) == WORLD * 10
    for key, value in results.items():
        if "resumed" in str(key):
            assert value, key
            continue
        norms, untouched, stuck = value
        assert [math.isfinite(norm) for norm in norms] == [True, False, True], key
        assert untouched, key
        assert not stuck, key
