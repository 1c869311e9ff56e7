"""Several sources in fixed shares, and the reader over a grid of ranks, micro-batches, workers and stops."""

from __future__ import annotations

import ast
import io
import os
import pickle
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dde_ds import UserError
from dde_ds.data.mixture import ROUND, MixedOrder, open_sources, order_of, shares
from dde_ds.data.order import Order
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset, RankSlices, micro_batches
from tests.support.tiny import write_tiny

counts = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@settings(max_examples=200, deadline=None)
@given(counts=counts, seed=st.integers(0, 2**63 - 1), block=st.integers(1, 14), epoch=st.integers(0, 10**6))
def test_order_is_a_permutation_of_any_epoch(counts, seed, block, epoch):
    order = Order(counts, seed, block)
    found = [order.locate(epoch * order.samples + offset) for offset in range(order.samples)]
    assert sorted(found) == [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    assert Order(counts, seed, block).locate(epoch * order.samples + order.samples // 2) == found[order.samples // 2]


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_are_those_of_the_weights(weights):
    exact = np.array(weights) / sum(weights) * ROUND
    if exact.min() < 1:
        return
    found = shares(weights)
    assert sum(found) == ROUND
    assert np.abs(found - exact).max() < 1


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(counts, min_size=2, max_size=4),
    weights=st.lists(st.sampled_from((0.5, 1.0, 2.5)), min_size=4, max_size=4),
    seed=st.integers(0, 2**32),
    first=st.integers(0, 10**9),
)
def test_each_source_runs_through_its_own_order(counts, weights, seed, first):
    orders = [Order(own, seed, 2) for own in counts]
    mixed = MixedOrder(orders, weights[: len(counts)], seed)
    start = first * ROUND
    # Any position without those before it, in any order of asking.
    there = {offset: pickle.loads(pickle.dumps(mixed)).locate(start + offset) for offset in (999, 0, 500)}
    found = [mixed.locate(start + offset) for offset in range(ROUND)]
    assert all(found[offset] == place for offset, place in there.items())
    source_of = [int(np.searchsorted(mixed.first_shard, shard, side="right")) - 1 for shard, _ in found]
    assert [Counter(source_of)[source] for source in range(len(counts))] == mixed.quotas
    for source, order in enumerate(orders):
        own = [(shard - mixed.first_shard[source], row) for (shard, row), of in zip(found, source_of, strict=True) if of == source]
        assert own == [order.locate(first * mixed.quotas[source] + k) for k in range(len(own))]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 50), st.integers(0, 3))
def test_slices_partition_every_global_batch(world, micro, accumulation, start, steps):
    pairs = world * micro * accumulation
    per_rank = [list(RankSlices(pairs, micro, rank, world, start, start + steps)) for rank in range(world)]
    assert {len(batches) for batches in per_rank} == {steps * accumulation}
    for step in range(steps):
        own = [batches[step * accumulation : (step + 1) * accumulation] for batches in per_rank]
        assert [p for batches in own for batch in batches for p in batch] == list(
            range((start + step) * pairs, (start + step + 1) * pairs)
        )


def uniformity(order: Order, epochs: int) -> float:
    """Chi-square, by degree of freedom, of where in an epoch each sample comes, in eight equal parts."""
    hits = np.zeros((order.samples, 8))
    numbers = np.concatenate([[0], np.cumsum(order.counts)])
    for epoch in range(epochs):
        for offset in range(order.samples):
            shard, row = order.locate(epoch * order.samples + offset)
            hits[numbers[shard] + row, offset * 8 // order.samples] += 1
    expected = epochs / 8
    return float(((hits - expected) ** 2 / expected).sum() / (order.samples * 7))


def neighbours(order: Order, epochs: int) -> int:
    """Count how often training takes two samples side by side that are stored side by side."""
    numbers = np.concatenate([[0], np.cumsum(order.counts)])
    found = 0
    for epoch in range(epochs):
        places = [order.locate(epoch * order.samples + offset) for offset in range(order.samples)]
        sequence = np.array([numbers[shard] + row for shard, row in places])
        found += int((np.abs(np.diff(sequence)) == 1).sum())
    return found


def test_order_looks_like_a_full_shuffle():
    """Up to eight shards a block of eight is a full shuffle. Beyond, positions stay uniform, and neighbours as rare as in a shuffle of one block."""
    full = Order([16] * 8, seed=5, block=8)
    assert uniformity(full, 80) == pytest.approx(1, abs=0.15)
    # 2(n-1)/n a shuffle of n; Poisson.
    assert neighbours(full, 80) == pytest.approx(80 * 2, abs=5 * (80 * 2) ** 0.5)
    wide = Order([16] * 32, seed=5, block=8)
    assert uniformity(wide, 40) == pytest.approx(1, abs=0.15)
    assert neighbours(wide, 40) == pytest.approx(40 * 2 * 4, abs=5 * (40 * 2 * 4) ** 0.5)
    ordered = Order([16] * 32, seed=5, block=1)
    assert neighbours(ordered, 40) > 2 * 40 * 2 * 4, "the statistic would see a poorer shuffle"


def mixed_dataset(tmp_path, weights=(3, 1), **options) -> PairDataset:
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    if not (tmp_path / "a").exists():
        write_tiny(tmp_path / "a", (3, 4, 2, 5), prompts=3)
        write_tiny(tmp_path / "b", (2, 6), prompts=2, first=1000)
    shards = open_sources(list(zip(paths, weights, strict=True)))
    return PairDataset(shards, order_of(shards, 7, 2), PairRng(7, torch.ones(10), caption_dropout=0.2), **options)


def test_mixed_sources(tmp_path):
    data = mixed_dataset(tmp_path)
    found = [data.pair(position) for position in range(ROUND)]
    kinds = Counter(bool(pair["latents"].flatten()[0] >= 1000) for pair in found)
    assert kinds == {False: 750, True: 250}
    dropped = 0
    for pair in found:
        number = int(pair["latents"].flatten()[0])
        prompt = number % 3 if number < 1000 else (number - 1000) % 2  # each source's own prompts
        dropped += int(pair["prompt_embeds"].unique().item()) != prompt
        assert pair["prompt_embeds"].unique().item() in (prompt, 0)
    assert 0 < dropped < 300
    assert mixed_dataset(tmp_path, (1, 3)).shards.digest != data.shards.digest
    write_tiny(tmp_path / "c", shape=(1, 2, 4))
    with pytest.raises(UserError, match=r"data\.sources: the latents' shape is \[1, 2, 2\] in .*a and \[1, 2, 4\] in"):
        open_sources([(str(tmp_path / "a"), 1.0), (str(tmp_path / "c"), 1.0)])
    with pytest.raises(UserError, match=r"data\.sources\[1\]\.weight is 1.0: below a thousandth"):
        open_sources([(str(tmp_path / "a"), 5000.0), (str(tmp_path / "b"), 1.0)])


def fingerprint(batch: dict) -> dict[int, tuple]:
    size = len(batch["positions"])
    return {
        position: tuple(
            round(float(value[i].double().sum()), 6)
            + (round(float(value[i + size].double().sum()), 6) if len(value) == 2 * size else 0)
            for key, value in sorted(batch.items())
            if key != "positions"
        )
        for i, position in enumerate(batch["positions"].tolist())
    }


def read_all(data: PairDataset, world: int, micro: int, workers: int, start: int, end: int) -> dict[int, tuple]:
    found: dict[int, tuple] = {}
    for rank in range(world):
        for batch in micro_batches(data, RankSlices(12, micro, rank, world, start, end), workers, False):
            found |= fingerprint(batch)
    return found


@pytest.mark.parametrize("source", ["one", "mixed"])
def test_grid(tmp_path, source):
    """Six steps of twelve pairs, more than three epochs: whoever reads them, and however often it stopped between."""
    if source == "one":
        shards = open_sources([(str(write_tiny(tmp_path / "a", (3, 4, 2, 5), latents="mean+logvar", flip=True)), 1.0)])
        data = PairDataset(shards, order_of(shards, 7, 2), PairRng(7, torch.ones(10), caption_dropout=0.2, flip=True))
    else:
        data = mixed_dataset(tmp_path)
    expected = read_all(data, 1, 12, 0, 0, 6)
    assert sorted(expected) == list(range(72))
    assert len(set(expected.values())) > 60
    for world in (1, 2, 3, 4):
        for micro in (1, 12 // world):
            assert read_all(data, world, micro, 0, 0, 6) == expected, (world, micro)
    for world, micro, workers in ((1, 4, 2), (2, 2, 1), (3, 4, 3)):
        assert read_all(data, world, micro, workers, 0, 6) == expected, (world, micro, workers)
    for cut in range(1, 6):  # in mid-epoch and past its end, by another number of ranks
        parts = read_all(data, 2, 2, 0, 0, cut) | read_all(data, 1 + cut % 4, 1, 0, cut, 6)
        assert parts == expected, cut


def read_in_a_process(path: Path, rank: int, world: int, step: int) -> tuple[int, io.TextIOBase]:
    """A process with two loader workers that prints what it reads, until it is killed; its id and what it prints."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, os.fdopen(reading)
    try:
        os.setsid()
        with os.fdopen(writing, "w") as output:
            data = tiny_dataset(path)
            slices = RankSlices(12, 12 // world, rank, world, step, 10_000)
            for number, batch in enumerate(micro_batches(data, slices, 2, False), step):
                print(number, fingerprint(batch), file=output, flush=True)
    finally:
        os._exit(1)


def tiny_dataset(path: Path) -> PairDataset:
    shards = open_sources([(str(path), 1.0)])
    return PairDataset(shards, order_of(shards, 7, 2), PairRng(7, torch.ones(10), caption_dropout=0.2))


def test_killed_readers_go_on_where_the_trainer_was(tmp_path):
    """Processes with two workers each, killed in mid-epoch with batches prefetched; others, of another number, go on from the step counted."""
    write_tiny(tmp_path / "a", (3, 4, 2, 5))
    found: dict[int, tuple] = {}
    step = 0
    for world in (2, 3, 1):
        processes = [read_in_a_process(tmp_path / "a", rank, world, step) for rank in range(world)]
        for _, output in processes:
            for number in range(step, step + 7):
                printed, values = output.readline().split(" ", 1)
                own = ast.literal_eval(values)
                assert int(printed) == number
                assert not own.keys() & found.keys()
                found |= own
        for process, output in processes:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            output.close()
        step += 7
    assert found == read_all(tiny_dataset(tmp_path / "a"), 1, 12, 0, 0, 21)
