"""The order of training: a pure function from (seed, position) to a sample.

The *position* is the number of pairs consumed since the start. It is the one clock of a run.

Each epoch permutes the shards. It then permutes the samples within consecutive blocks of shards, so that a reader keeps
few files open and still mixes well. If one block holds all shards, the result is a full shuffle. With several blocks, a
sample is still equally likely to come anywhere in the epoch, but it comes near the samples of its own block.

The order knows nothing of ranks, workers or batches: they take slices of one sequence. A run can therefore resume
anywhere from a single number.

Every sample comes exactly once an epoch. Epochs follow each other without a gap, and no sample is dropped at the end of
an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from dde_ds.errors import UserError


class PairOrder(Protocol):
    """The interface of an order that a reader needs.

    :class:`Order` implements it for one set of shards, and :class:`~dde_ds.data.mixture.MixedOrder` for a mixture of
    sets.
    """

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, row in the shard) of a position ≥ 0."""
        ...


class Order:
    """The order of the samples of one set of shards.

    Args:
        counts: number of samples in each shard.
        seed: selects the permutations.
        block: number of shards whose samples are shuffled together.

    Raises:
        UserError: the shards hold no sample.
    """

    def __init__(self, counts: Sequence[int], seed: int, block: int):
        self.counts, self.seed, self.block = np.asarray(counts, dtype=np.int64), seed, block
        self.samples = int(self.counts.sum())
        if self.samples == 0:
            raise UserError("the shards hold no sample")
        # These are only caches: a position near the previous one needs no new permutation.
        self._epoch = lru_cache(maxsize=2)(self._epoch)
        self._block = lru_cache(maxsize=4)(self._block)

    def __getstate__(self) -> tuple:
        return self.counts.tolist(), self.seed, self.block

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, row in the shard) of a position ≥ 0."""
        epoch, offset = divmod(position, self.samples)
        _, ends = self._epoch(epoch)
        block = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[block - 1]) if block else 0
        members, bounds, permutation = self._block(epoch, block)
        flat = int(permutation[offset - start])
        slot = int(np.searchsorted(bounds, flat, side="right"))
        return int(members[slot]), flat - (int(bounds[slot - 1]) if slot else 0)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's permutation of the shards, and the offset in the epoch at which each block ends."""
        shards = self._random(epoch, 0).permutation(len(self.counts))
        ends = np.cumsum(self.counts[shards])
        last = np.minimum(np.arange(self.block, len(shards) + self.block, self.block), len(shards)) - 1
        return shards, ends[last]

    def _block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return three things about one block: its shards, the offset in the block at which each shard ends, and the
        permutation of the block's samples.
        """
        members = self._epoch(epoch)[0][block * self.block : (block + 1) * self.block]
        bounds = np.cumsum(self.counts[members])
        return members, bounds, self._random(epoch, block + 1).permutation(int(bounds[-1]))

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, stream])
