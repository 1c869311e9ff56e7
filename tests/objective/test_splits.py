"""One global batch, split in every way over real ranks and micro-batches: the same table, the same losses, and so after a resume."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dde_ds import build_objective
from tests.support.launching import spawn

PAIRS, STEPS = 8, 3


def made_up(step):
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(PAIRS, 2, 4, 4, generator=generator)
    reference = noise.repeat(2, 1, 1, 1) + 0.3 * torch.randn(2 * PAIRS, 2, 4, 4, generator=generator)
    policy = reference + 0.2 * torch.randn(2 * PAIRS, 2, 4, 4, generator=generator)
    # Few timesteps, so that ranks and micro-batches meet the same ones, and a step those of the step before.
    timesteps = torch.tensor([100, 400, 700])[torch.randint(3, (PAIRS,), generator=generator)]
    return policy, reference, noise, timesteps


def run(objective, steps, rank, world, micro):
    """Mean loss of each step over this rank's pairs."""
    losses = []
    for step in steps:
        policy, reference, noise, timesteps = made_up(step)
        share, total = PAIRS // world, 0.0
        for low in range(rank * share, (rank + 1) * share, micro):
            own = slice(low, low + micro)
            both = torch.cat([torch.arange(PAIRS)[own], torch.arange(PAIRS, 2 * PAIRS)[own]])
            out = objective(policy[both], reference[both], noise[own], timesteps[own])
            total += out.loss.item() * micro / share
        objective.commit()
        losses.append(total)
    return losses


def one_rank(rank, world, micro, folder, schedule):
    if world > 1:
        dist.init_process_group("gloo")
    first = build_objective("dde", schedule, beta=50.0)
    losses = run(first, range(STEPS - 1), rank, world, micro)
    # As a checkpoint does: the last step runs on a table that was saved and loaded.
    second = build_objective("dde", schedule, beta=50.0)
    second.load_state_dict(first.state_dict())
    losses += run(second, range(STEPS - 1, STEPS), rank, world, micro)
    torch.save({"losses": losses, **second.state_dict()}, f"{folder}/{rank}.pt")


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 4), (1, 2), (1, 1), (2, 4), (2, 2), (2, 1)])
def test_every_split_gives_the_same_table(schedule, tmp_path, world, micro):
    unbroken = build_objective("dde", schedule, beta=50.0)
    expected = run(unbroken, range(STEPS), 0, 1, PAIRS)
    assert unbroken.correction(torch.tensor([50])).abs().item() > 1e-4
    arguments = (world, micro, str(tmp_path), schedule)
    if world == 1:
        one_rank(0, *arguments)
    else:
        spawn(one_rank, world, *arguments)

    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    assert all(torch.equal(ranks[0][name], rank[name]) for rank in ranks for name in ("average", "count"))
    torch.testing.assert_close(ranks[0]["average"], unbroken.state_dict()["average"], rtol=1e-6, atol=1e-9)
    assert torch.equal(ranks[0]["count"], unbroken.state_dict()["count"])
    means = torch.tensor([rank["losses"] for rank in ranks]).mean(0).tolist()
    assert means == pytest.approx(expected, abs=1e-6)
