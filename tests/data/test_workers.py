"""Loader workers that the system kills, or does not let start."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time

import pytest
import torch

from dde_ds import UserError
from dde_ds.data.order import Order
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset, RankSlices, micro_batches
from dde_ds.data.shards import ShardSet
from tests.support.tiny import write_tiny


@pytest.fixture
def batches(tmp_path):
    shards = ShardSet(write_tiny(tmp_path / "shards"))
    dataset = PairDataset(shards, Order(shards.counts, 0, 2), PairRng(0, torch.full((10,), 0.1), False, 0.0, False))
    return micro_batches(dataset, RankSlices(2, 2, 0, 1, 0, 1000), 2, pin_memory=False)


@pytest.fixture(autouse=True)
def another_loader():
    """Iterate a loader of PyTorch alone first, which leaves its handler for dead children in the process."""
    assert len(list(torch.utils.data.DataLoader(range(4), num_workers=1))) == 4


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (
            signal.SIGKILL,
            "a worker was killed by SIGKILL, most likely by the system for want of memory: lower data.workers, or give",
        ),
        (signal.SIGBUS, "a worker was killed by SIGBUS, most likely for want of room in /dev/shm: give the container more"),
    ],
)
def test_a_killed_worker_is_told_in_one_line(batches, number, expected):
    """The next request for a batch reports the killed worker. Until then the current step goes on."""
    next(batches)
    worker, *_ = multiprocessing.active_children()
    os.kill(worker.pid, number)
    deadline = time.monotonic() + 5
    while worker.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(UserError) as error:
        for _ in batches:
            pass
    assert f"data.workers is 2: {expected}" in str(error.value)
    assert str(error.value).endswith("; then go on with --resume")
    assert "\n" not in str(error.value)


def test_a_worker_that_cannot_be_started(batches, monkeypatch):
    def fork():
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(UserError, match=r"data\.workers is 2: one could not be started: Cannot allocate memory; lower it"):
        next(batches)
