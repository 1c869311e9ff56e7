from __future__ import annotations

import json

import pytest
import torch

from dde_ds import build_objective
from dde_ds.distributed import start
from dde_ds.training.metrics import Averages, Clock, RowFile, RunLog, read_rows


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    start()


def outputs(objective, timesteps, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = len(timesteps)
    noise = torch.randn(pairs, 2, 3, 3, generator=generator)
    reference = noise.repeat(2, 1, 1, 1) + 0.3 * torch.randn(2 * pairs, 2, 3, 3, generator=generator)
    policy = reference + 0.02 * torch.randn(2 * pairs, 2, 3, 3, generator=generator)
    return objective(policy, reference, noise, timesteps)


def test_averages_by_timestep(schedule):
    """Two micro-batches: means over the pairs of each tenth of the timesteps, and nothing for a tenth without pairs."""
    objective = build_objective("dde", schedule, beta=50.0)
    objective.table.fill(-1.0)  # every z is above 0 by the correction alone
    timesteps = [torch.tensor([0, 99, 100, 999]), torch.tensor([50, 999, 999, 450])]
    outs = [outputs(objective, t, seed) for seed, t in enumerate(timesteps)]
    averages = Averages()
    for out in outs:
        averages.add(out)
    row = averages.read(1000)
    t = torch.cat(timesteps)
    z = torch.cat([out.logits for out in outs]) + (50 / 2) * objective.correction(t)  # without the correction
    for first in range(0, 1000, 100):
        inside = (t >= first) & (t < first + 100)
        span = f"{first:03d}-{first + 99:03d}"
        if inside.any():
            assert row[f"accuracy_by_t/{span}"] == pytest.approx((z[inside] > 0).float().mean().item())
            assert row[f"margin_by_t/{span}"] == pytest.approx(z[inside].mean().item(), rel=1e-4, abs=1e-5)
            assert f"drift_by_t/{span}" in row
        else:
            assert f"accuracy_by_t/{span}" not in row
    assert row["rewards/accuracies"] > 0.7 > row["rewards/margin_accuracies"] == pytest.approx((z > 0).float().mean().item())
    assert row["drift/chosen"] == pytest.approx(row["error/policy_chosen"] - row["error/reference_chosen"], abs=1e-7)
    averages.add(outs[0])  # reading starts anew
    assert averages.read(1000)["rewards/margins"] == pytest.approx(z[:4].mean().item(), rel=1e-4)


def test_sft_has_no_buckets(schedule):
    averages = Averages()
    averages.add(outputs(build_objective("sft", schedule), torch.tensor([1, 2]), 0))
    assert set(averages.read(1000)) == {"loss", "error/policy_chosen", "error/policy_rejected"}


def test_the_clock_leaves_out_what_is_no_training(monkeypatch):
    times = iter([10.0, 12.0, 500.0, 513.0, 513.0])  # made, stopped, going again, read
    monkeypatch.setattr("dde_ds.training.metrics.time.perf_counter", lambda: next(times))
    clock = Clock()
    clock.add(30)
    with clock.stopped():
        pass
    assert clock.read()["perf/pairs_per_s"] == 30 / (2 + 13)


def test_a_resumed_file_has_each_step_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"step": step, "old": True}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "cut sh')
    file = RowFile(path, resume_step=2)
    file.write({"step": 3})
    assert read_rows(path) == [{"step": 1, "old": True}, {"step": 2, "old": True}, {"step": 3}]


def test_the_correction_is_logged(schedule, tmp_path):
    objective = build_objective("dde", schedule, beta=50.0)
    outputs(objective, torch.tensor([100, 600, 800]), 0)
    objective.commit()
    RunLog(tmp_path, 0).write(7, 56, {"loss": 0.5}, objective)
    (row,) = read_rows(tmp_path / "correction.jsonl")
    assert row["step"] == 7
    assert row["timesteps"] == list(range(0, 1000, 50))
    assert row["correction"][2] == objective.correction(torch.tensor([100])).item() != 0
    assert row["correction"][-1] == 0
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 7, "position": 56, "loss": 0.5}]
