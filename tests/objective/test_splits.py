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
    # Ahead of the reference, winners more than losers: so K and KTO's reference point are not 0.
    better = torch.rand(2 * PAIRS, 1, 1, 1, generator=generator)
    better[:PAIRS] += 1
    policy = reference + 0.5 * better * (noise.repeat(2, 1, 1, 1) - reference)
    policy += 0.02 * torch.randn(2 * PAIRS, 2, 4, 4, generator=generator)
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
            labels = torch.linspace(0.4, 1, PAIRS)[own] if objective.options.soft_labels else None
            given = reference[both] if objective.needs_reference else None
            out = objective(policy[both], given, noise[own], timesteps[own], soft_labels=labels)
            total += out.loss.item() * micro / share
        objective.commit()
        losses.append(total)
    return losses


# What differs in the state or in the loss: K; κ; sums over a pair's elements; labels of the pairs; weights from the table.
SETTINGS = {
    "dde": {},
    "kto": {},
    "dspo": {},
    "mapo": {},
    "dde, sigmoid, calibrated": {"link": "sigmoid", "winner_preserving": 0.6, "single_shot": "calibrated"},
    "dde, mean credit": {"credit": "mean"},
    "dde, soft labels": {"link": "dmpo", "soft_labels": True},
}


def build(setting, schedule):
    return build_objective(setting.partition(",")[0], schedule, beta=50.0, **SETTINGS[setting])


def one_rank(rank, world, micro, folder, schedule, settings):
    if world > 1:
        dist.init_process_group("gloo")
    for setting in settings:
        first = build(setting, schedule)
        losses = run(first, range(STEPS - 1), rank, world, micro)
        # As a checkpoint does: the last step runs on a state that was saved and loaded.
        second = build(setting, schedule)
        second.load_state_dict(first.state_dict())
        losses += run(second, range(STEPS - 1, STEPS), rank, world, micro)
        torch.save({"losses": losses, **second.state_dict()}, f"{folder}/{setting}-{rank}.pt")


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 4), (1, 2), (1, 1), (2, 4), (2, 2), (2, 1)])
def test_every_split_gives_the_same_state(schedule, tmp_path, world, micro):
    arguments = (world, micro, str(tmp_path), schedule, list(SETTINGS))
    if world == 1:
        one_rank(0, *arguments)
    else:
        spawn(one_rank, world, *arguments)

    for setting in SETTINGS:
        unbroken = build(setting, schedule)
        expected = run(unbroken, range(STEPS), 0, 1, PAIRS)
        state = unbroken.state_dict()
        if setting == "dde":
            assert unbroken.correction(torch.tensor([50])).abs().item() > 1e-4
        if setting == "kto":
            assert state["reference_point"].item() > 1e-3
        ranks = [torch.load(tmp_path / f"{setting}-{rank}.pt") for rank in range(world)]
        for name, value in state.items():
            assert all(torch.equal(ranks[0][name], rank[name]) for rank in ranks), name
            torch.testing.assert_close(ranks[0][name], value, rtol=1e-6, atol=1e-9)
        means = torch.tensor([rank["losses"] for rank in ranks]).mean(0).tolist()
        assert means == pytest.approx(expected, rel=1e-5, abs=1e-6), setting
