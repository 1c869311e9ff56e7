"""Several shard folders as one: drawn from in fixed shares, in an order that is a pure function of (seed, position).

Positions come in rounds of 1,000. In each, every source has exactly its share of the places, in a random order of that round's
own; a source's places, counted through all rounds, are the positions of its own :class:`~dde_ds.data.order.Order`. So each
source runs through its own epochs at its own pace, and any position is found without those before it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from dde_ds.data.cache import Cache
from dde_ds.data.order import Order
from dde_ds.data.shards import ShardSet
from dde_ds.errors import UserError

ROUND = 1000


class MixedOrder:
    """``weights``: the sources' shares, to a thousandth of their sum. Shards are numbered through the sources."""

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int):
        self.orders, self.weights, self.seed = list(orders), list(weights), seed
        self.quotas = shares(weights)
        self.first_shard = np.cumsum([0, *(len(order.counts) for order in orders)]).tolist()
        self.samples = sum(order.samples for order in orders)
        self._round = lru_cache(maxsize=4)(self._round)  # a cache only

    def __getstate__(self) -> tuple:
        return self.orders, self.weights, self.seed

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, row in the shard) of a position ≥ 0."""
        number, offset = divmod(position, ROUND)
        sources, ranks = self._round(number)
        source = int(sources[offset])
        shard, row = self.orders[source].locate(number * self.quotas[source] + int(ranks[offset]))
        return self.first_shard[source] + shard, row

    def _round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each place of a round, and how many places of that source come before it in the round."""
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
        # A stream of its own: an Order draws from [seed, epoch, stream] with streams from 0 up.
        sources = np.random.default_rng([self.seed, number, 0, 1]).permutation(sources)
        ranks = np.empty(ROUND, dtype=np.int64)
        for source, quota in enumerate(self.quotas):
            ranks[sources == source] = np.arange(quota)
        return sources, ranks


class MixedShards:
    """Several :class:`ShardSet` of the same kind, shards and prompts numbered through.

    Raises:
        UserError: sets that cannot be trained on together.
    """

    def __init__(self, sets: Sequence[ShardSet], weights: Sequence[float]):
        self.sets, self.weights = list(sets), list(weights)
        self.manifest = sets[0].manifest
        self.latent_shape = sets[0].latent_shape
        self.counts = [count for one in sets for count in one.counts]
        self._places = [(one, shard) for one in sets for shard in range(len(one.counts))]
        self._first_prompt = np.cumsum([0, *(one.manifest["prompts"]["distinct"] for one in sets)]).tolist()
        self._set_of = [number for number, one in enumerate(sets) for _ in one.counts]
        for other in sets[1:]:
            for what, own, theirs in _kinds(sets[0].manifest, other.manifest):
                if own != theirs:
                    raise UserError(
                        f"data.sources: {what} is {own!r} in {sets[0].folder} and {theirs!r} in {other.folder}; "
                        "shard them with the same model and settings"
                    )
        mixed = "".join(f"{one.digest} {quota}\n" for one, quota in zip(sets, shares(weights), strict=True))
        self.digest = hashlib.sha256(mixed.encode()).hexdigest()

    @property
    def counters(self) -> Counter:
        return sum((Counter(one.counters) for one in self.sets), Counter())

    def read(self, shard: int, row: int) -> dict[str, torch.Tensor]:
        """As :meth:`ShardSet.read`."""
        one, own = self._places[shard]
        sample = one.read(own, row)
        return {**sample, "prompt": sample["prompt"] + self._first_prompt[self._set_of[shard]]}

    def prefetch(self, shard: int, row: int) -> None:
        """As :meth:`ShardSet.prefetch`."""
        one, own = self._places[shard]
        one.prefetch(own, row)

    def prompt(self, row: int) -> dict[str, torch.Tensor]:
        """As :meth:`ShardSet.prompt`."""
        number = int(np.searchsorted(self._first_prompt, row, side="right")) - 1
        return self.sets[min(number, len(self.sets) - 1)].prompt(row - self._first_prompt[min(number, len(self.sets) - 1)])

    def next_sample(self, shard: int, row: int) -> tuple[int, int]:
        """As :meth:`ShardSet.next_sample`, within the same source."""
        one, own = self._places[shard]
        first = shard - own
        found, row = one.next_sample(own, row)
        return first + found, row


def open_sources(
    paths: Sequence[tuple[str, float]],
    cache_dir: str | None = None,
    cache_gb: float = 100.0,
    timeout: float = 60.0,
    strict: bool = True,
    key: str = "data.path",
) -> ShardSet | MixedShards:
    """The shards of one path, or of several with their weights. ``strict`` compares the files' sizes now, not as they are read.
    Messages call a single path ``key``, and one of several ``data.sources[…].path``.

    Raises:
        UserError: as :class:`ShardSet` and :class:`MixedShards`.
    """
    cache = Cache(cache_dir, int(cache_gb * 1e9)) if cache_dir else None
    keys = [key] if len(paths) == 1 else [f"data.sources[{number}].path" for number in range(len(paths))]
    sets = [ShardSet(path, cache, timeout, strict, key) for (path, _), key in zip(paths, keys, strict=True)]
    return sets[0] if len(sets) == 1 else MixedShards(sets, [weight for _, weight in paths])


def order_of(shards: ShardSet | MixedShards, seed: int, block: int) -> Order | MixedOrder:
    """The order in which they are trained on."""
    if isinstance(shards, ShardSet):
        return Order(shards.counts, seed, block)
    return MixedOrder([Order(one.counts, seed, block) for one in shards.sets], shards.weights, seed)


def shares(weights: Sequence[float]) -> list[int]:
    """Places of each source in a round, by largest remainders.

    Raises:
        UserError: a weight too small to get one.
    """
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * ROUND
    places = np.floor(exact).astype(np.int64)
    for source in np.argsort(places - exact, kind="stable")[: ROUND - int(places.sum())]:
        places[source] += 1
    if (places == 0).any():
        number = int(np.flatnonzero(places == 0)[0])
        raise UserError(f"data.sources[{number}].weight is {weights[number]!r}: below a thousandth of all weights; leave it out")
    return places.tolist()


def _kinds(first: dict, other: dict):
    for key in ("family", "latents", "flip", "scaling_factor", "weights"):
        yield key, first["settings"].get(key), other["settings"].get(key)
    yield "the latents' shape", first["latents"]["shape"], other["latents"]["shape"]
    yield "the prompts' shape", first["prompts"]["tensors"], other["prompts"]["tensors"]
