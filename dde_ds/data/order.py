"""The order of training: a pure function from (seed, position) to a sample.

*Position*, the number of pairs consumed since the start, is the one clock of a run. Each epoch permutes the shards, then
the samples within consecutive blocks of shards, so that a reader has few files open and still mixes well: a full shuffle
where a block holds all shards; with more, each sample is still equally likely anywhere, but near those of its own block. Nothing here
knows of ranks, workers or batches: they take slices of one sequence, and a run goes on anywhere from a single number.

Every sample comes exactly once an epoch, and epochs follow each other without a gap: nothing is dropped at their ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from dde_ds.errors import UserError


class PairOrder(Protocol):
    """What a reader needs of an order: of one set's, :class:`Order`, or of a mixture's, :class:`~dde_ds.data.mixture.MixedOrder`."""

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, row in the shard) of a position ≥ 0."""
        ...


class Order:
    """``counts``: samples of each shard; ``block``: shards that are shuffled into one another."""

    def __init__(self, counts: Sequence[int], seed: int, block: int):
        self.counts, self.seed, self.block = np.asarray(counts, dtype=np.int64), seed, block
        self.samples = int(self.counts.sum())
        if self.samples == 0:
            raise UserError("the shards hold no sample")
        # Caches only: a position near the last one needs no new permutation.
        self._epoch = lru_cache(maxsize=2)(self._epoch)
        self._block = lru_cache(maxsize=4)(self._block)

    def __getstate__(self) -> tuple:
        return self.counts.tolist(), self.seed, self.block

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, row in the shard) of a position ≥ 0."""
        epoch, offset = divmod(position, self.samples)
        _, ends = self._epoch(epoch)
        block = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[block - 1]) if block else 0
        members, bounds, permutation = self._block(epoch, block)
        flat = int(permutation[offset - start])
        slot = int(np.searchsorted(bounds, flat, side="right"))
        return int(members[slot]), flat - (int(bounds[slot - 1]) if slot else 0)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permutation of shards, and where in the epoch each block ends."""
        shards = self._random(epoch, 0).permutation(len(self.counts))
        ends = np.cumsum(self.counts[shards])
        last = np.minimum(np.arange(self.block, len(shards) + self.block, self.block), len(shards)) - 1
        return shards, ends[last]

    def _block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The shards of one block, where each ends among the block's samples, and the permutation of those."""
        members = self._epoch(epoch)[0][block * self.block : (block + 1) * self.block]
        bounds = np.cumsum(self.counts[members])
        return members, bounds, self._random(epoch, block + 1).permutation(int(bounds[-1]))

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, stream])
