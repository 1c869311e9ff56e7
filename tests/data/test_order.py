from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from dde_ds import UserError
from dde_ds.data.order import Order
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import AHEAD, LookAhead, RankSlices

COUNTS = [7, 5, 0, 9, 6, 3, 8]


@pytest.mark.parametrize("block", [1, 2, 3, 8])
def test_every_sample_once_an_epoch(block):
    order = Order(COUNTS, seed=3, block=block)
    everything = sorted((shard, row) for shard, count in enumerate(COUNTS) for row in range(count))
    epochs = [[order.locate(epoch * 38 + offset) for offset in range(38)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == everything
    assert epochs[0] != epochs[1] != epochs[2]


def test_pure_function_of_seed_and_position():
    positions = [500, 3, 77, 3, 10**9, 0]
    forwards = [Order(COUNTS, 1, 2).locate(p) for p in positions]
    warm = Order(COUNTS, 1, 2)
    for p in range(100):
        warm.locate(p)
    assert [pickle.loads(pickle.dumps(warm)).locate(p) for p in positions] == forwards == [warm.locate(p) for p in positions]
    assert [Order(COUNTS, 2, 2).locate(p) for p in positions] != forwards


def test_a_block_mixes_its_shards():
    order = Order([100] * 8, seed=0, block=8)
    shards = np.array([order.locate(p)[0] for p in range(800)])
    assert (shards[1:] == shards[:-1]).mean() < 0.2  # 1/8 in a full shuffle, 1 without one


def test_no_samples():
    with pytest.raises(UserError, match="no sample"):
        Order([0, 0], 0, 1)


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 2), (2, 4), (4, 1)])
def test_ranks_and_micro_batches_partition_each_global_batch(world, micro):
    per_rank = [list(RankSlices(8, micro, rank, world, 2, 5)) for rank in range(world)]
    assert {len(batches) for batches in per_rank} == {len(RankSlices(8, micro, 0, world, 2, 5))}
    count = 8 // world // micro
    for step in range(3):
        positions = [p for batches in per_rank for batch in batches[step * count : (step + 1) * count] for p in batch]
        assert sorted(positions) == list(range((step + 2) * 8, (step + 3) * 8))


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_every_position_is_announced_once_and_in_time(steps):
    slices = RankSlices(8, 2, 1, 2, 0, steps)
    assert [batch for batch, _ in LookAhead(slices)] == list(slices)
    announced = []
    for number, (batch, coming) in enumerate(LookAhead(slices)):
        announced += coming
        assert set(batch) <= set(announced)
        assert len(announced) == min(2 * (number + 1 + AHEAD), 8 * steps // 2)
    assert announced == [position for batch in slices for position in batch]


def test_draws_depend_on_seed_and_position_only():
    draws = PairRng(5, torch.ones(1000), caption_dropout=0.3)
    t, noise, drop = draws(123456789, (2, 4, 8, 8))
    again = PairRng(5, torch.ones(1000), caption_dropout=0.3)
    again(7, (2, 4, 8, 8))
    t2, noise2, drop2 = again(123456789, (2, 4, 8, 8))
    assert (t, drop) == (t2, drop2)
    assert torch.equal(noise, noise2)
    assert not torch.equal(noise, PairRng(6, torch.ones(1000))(123456789, (2, 4, 8, 8))[1])
    assert PairRng(5, torch.ones(1000), shared_noise=False)(0, (2, 4, 8, 8))[1].shape == (2, 4, 8, 8)


def test_draws_have_their_distributions():
    probabilities = torch.zeros(1000)
    probabilities[200:700] = 1
    draws = PairRng(0, probabilities, caption_dropout=0.2)
    found = [draws(position, (2, 1, 2, 2)) for position in range(4000)]
    t = torch.tensor([t for t, _, _ in found]).float()
    assert t.min() >= 200
    assert t.max() < 700
    assert t.mean().item() == pytest.approx(449.5, abs=4 * 500 / 12**0.5 / 4000**0.5)
    assert np.mean([drop for _, _, drop in found]) == pytest.approx(0.2, abs=0.03)
    noise = torch.stack([n for _, n, _ in found]).flatten()
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.03)


def of_ranges(steps: int, low: int, high: int) -> torch.Tensor:
    return torch.cat([torch.zeros(low), torch.ones(high - low), torch.zeros(steps - high)])


PROBABILITIES = {
    "uniform": torch.full((1000,), 1e-3, dtype=torch.float64),
    "a range": of_ranges(1000, 200, 700),
    "an odd range": of_ranges(1000, 13, 347) / 334,
    "one timestep": of_ranges(1000, 400, 401),
    "discounted": 0.99 ** torch.arange(999, -1, -1, dtype=torch.float64),
    "few": torch.tensor([0.1, 0.0, 0.25, 0.65, 0.0]),
}


@pytest.mark.parametrize("name", PROBABILITIES)
def test_a_stratum_has_each_timestep_as_often_as_its_probability_says(name):
    """In T positions, T·P(t < k) timesteps are below k, rounded down or up. This number is computed here from p(t) alone."""
    probabilities = PROBABILITIES[name].double()
    steps = len(probabilities)
    expected = steps * (probabilities / probabilities.sum()).numpy().cumsum()
    draws = PairRng(3, PROBABILITIES[name])
    orders = []
    for stratum in (0, 1, 7_000_000):
        found = [draws.timestep(stratum * steps + place) for place in range(steps)]
        below = np.bincount(found, minlength=steps).cumsum()
        assert (np.abs(below - expected) < 1 + 1e-9).all()
        assert not np.bincount(found, minlength=steps)[probabilities.numpy() == 0].any()
        orders.append(found)
    if name == "uniform":
        assert all(sorted(found) == list(range(steps)) for found in orders)
    if name != "one timestep":
        assert orders[0] != orders[1] != orders[2], "each stratum has a permutation of its own"
        assert orders[0] != [PairRng(4, PROBABILITIES[name]).timestep(place) for place in range(steps)]


def test_a_timestep_alone_keeps_its_distribution():
    """Over seeds, one position's timestep follows p(t): Kolmogorov's distance of 4,000 draws."""
    probabilities = PROBABILITIES["discounted"]
    cumulative = (probabilities / probabilities.sum()).numpy().cumsum()
    found = np.sort([PairRng(seed, probabilities).timestep(1234) for seed in range(4000)])
    empirical = np.searchsorted(found, np.arange(1000), side="right") / 4000
    assert np.abs(empirical - cumulative).max() < 1.95 / 4000**0.5  # p = 0.001


@pytest.mark.parametrize(("ranks", "micro"), [(1, 64), (2, 8), (4, 2), (8, 1)])
def test_any_split_into_ranks_sees_the_same_timesteps(ranks, micro):
    """Also where a worker jumps back and forth between strata of ten positions."""
    probabilities = torch.full((10,), 0.1)
    one = PairRng(5, probabilities)
    expected = {position: one.timestep(position) for position in range(192)}
    found = {}
    for rank in range(ranks):
        draws = PairRng(5, probabilities)
        positions = [position for own in RankSlices(64, micro, rank, ranks, 0, 3) for position in own]
        for position in positions[::2] + positions[1::2]:
            found[position] = draws(position, (2, 1, 2, 2))[0]
    assert found == expected
    assert all(sorted(found[10 * k + i] for i in range(10)) == list(range(10)) for k in range(19))


@pytest.mark.parametrize(("micro", "pairs"), [(4, 2048), (2, 4096)])
def test_512_ranks_share_the_data_out(micro, pairs):
    """Each pair of an epoch exactly once, by exactly one rank, and each rank as many."""
    ranks, counts = 512, [211] * 97 + [13]
    order, epoch = Order(counts, seed=11, block=8), sum(counts)
    steps = -(-epoch // pairs)
    shares = [np.array([list(batch) for batch in RankSlices(pairs, micro, rank, ranks, 0, steps)]) for rank in range(ranks)]
    assert {share.shape for share in shares} == {(steps * pairs // ranks // micro, micro)}
    positions = np.concatenate([share.ravel() for share in shares])
    assert len(np.unique(positions)) == len(positions) == steps * pairs
    assert (positions.min(), positions.max()) == (0, steps * pairs - 1)
    places = [order.locate(position) for position in range(epoch)]
    assert len(set(places)) == epoch
    # What one rank reads, it reads alone: the pairs of another have other positions, within an epoch other places.
    owner = np.empty(steps * pairs, dtype=int)
    for rank, share in enumerate(shares):
        owner[share.ravel()] = rank
    per_step = owner.reshape(steps, pairs)
    assert all((np.bincount(step, minlength=ranks) == pairs // ranks).all() for step in per_step)
