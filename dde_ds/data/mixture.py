"""Train on several shard folders as if they were one, each with a fixed share of the pairs.

The order is a pure function of (seed, position). Positions come in rounds of 1,000. In each round, every source has
exactly its share of the places, in a random order drawn for that round. The places of a source are counted through all
rounds. That count is a position in the source's own :class:`~dde_ds.data.order.Order`. So each source runs through its
epochs at its own pace, and any position can be located without the positions before it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from dde_ds.data.cache import Cache
from dde_ds.data.manifest import SOFT_LABEL
from dde_ds.data.order import Order
from dde_ds.data.shards import ShardSet
from dde_ds.errors import UserError

ROUND = 1000
"""Number of positions in a round."""


class MixedOrder:
    """The order of a mixture of several sets of shards. Shards are numbered consecutively through all sources.

    Args:
        orders: the order of each source.
        weights: the share of each source, rounded to a thousandth of the sum of all weights.
        seed: selects the order of the sources in each round.

    Raises:
        UserError: a weight is too small for one place in a round.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int):
        self.orders, self.weights, self.seed = list(orders), list(weights), seed
        self.quotas = shares(weights)
        self.first_shard = np.cumsum([0, *(len(order.counts) for order in orders)]).tolist()
        self.samples = sum(order.samples for order in orders)
        self._round = lru_cache(maxsize=4)(self._round)  # only a cache

    def __getstate__(self) -> tuple:
        return self.orders, self.weights, self.seed

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, row in the shard) of a position ≥ 0."""
        number, offset = divmod(position, ROUND)
        sources, ranks = self._round(number)
        source = int(sources[offset])
        shard, row = self.orders[source].locate(number * self.quotas[source] + int(ranks[offset]))
        return self.first_shard[source] + shard, row

    def _round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each place in a round, and how many earlier places of the round have the same source."""
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
        # This stream differs from every stream of an Order, which draws from [seed, epoch, stream].
        sources = np.random.default_rng([self.seed, number, 0, 1]).permutation(sources)
        ranks = np.empty(ROUND, dtype=np.int64)
        for source, quota in enumerate(self.quotas):
            ranks[sources == source] = np.arange(quota)
        return sources, ranks


class MixedShards:
    """Several :class:`ShardSet` of the same kind. Shards and prompts are numbered consecutively through all sets.

    Args:
        sets: the sets of shards, at least one.
        weights: the share of each set.

    Raises:
        UserError: the sets differ in model, settings or shapes, so that they cannot be trained on together.
    """

    def __init__(self, sets: Sequence[ShardSet], weights: Sequence[float]):
        self.sets, self.weights = list(sets), list(weights)
        self.manifest = sets[0].manifest
        self.latent_shape = sets[0].latent_shape
        self._soft = any(one.manifest["settings"].get(SOFT_LABEL) for one in sets)
        self.counts = [count for one in sets for count in one.counts]
        self._places = [(one, shard) for one in sets for shard in range(len(one.counts))]
        self._first_prompt = np.cumsum([0, *(one.manifest["prompts"]["distinct"] for one in sets)]).tolist()
        self._set_of = [number for number, one in enumerate(sets) for _ in one.counts]
        for other in sets[1:]:
            for what, ours, theirs in _kinds(sets[0].manifest, other.manifest):
                if ours != theirs:
                    raise UserError(
                        f"data.sources: {what} is {ours!r} in {sets[0].folder} and {theirs!r} in {other.folder}; "
                        "shard them with the same model and settings"
                    )
        mixed = "".join(f"{one.digest} {quota}\n" for one, quota in zip(sets, shares(weights), strict=True))
        self.digest = hashlib.sha256(mixed.encode()).hexdigest()

    @property
    def counters(self) -> Counter:
        """Return what this process has read of all sets together."""
        return sum((Counter(one.counters) for one in self.sets), Counter())

    def read(self, shard: int, row: int) -> dict[str, torch.Tensor]:
        """Return the tensors of one pair, as :meth:`ShardSet.read` does.

        The number of its prompt counts through all sets.
        """
        source, local_shard = self._places[shard]
        sample = source.read(local_shard, row)
        if self._soft:
            sample.setdefault(SOFT_LABEL, torch.tensor(1.0))  # a set without votes is sure of its winners
        return {**sample, "prompt": sample["prompt"] + self._first_prompt[self._set_of[shard]]}

    def prefetch(self, shard: int, row: int) -> None:
        """Announce that a pair will be read soon, as :meth:`ShardSet.prefetch` does."""
        source, local_shard = self._places[shard]
        source.prefetch(local_shard, row)

    def prompt(self, row: int) -> dict[str, torch.Tensor]:
        """Return the embeddings of one prompt, as :meth:`ShardSet.prompt` does."""
        number = int(np.searchsorted(self._first_prompt, row, side="right")) - 1
        return self.sets[min(number, len(self.sets) - 1)].prompt(row - self._first_prompt[min(number, len(self.sets) - 1)])

    def next_sample(self, shard: int, row: int) -> tuple[int, int]:
        """Return the place of the next sample of the same source, as :meth:`ShardSet.next_sample` does."""
        source, local_shard = self._places[shard]
        first = shard - local_shard
        next_shard, row = source.next_sample(local_shard, row)
        return first + next_shard, row


def open_sources(
    paths: Sequence[tuple[str, float]],
    cache_dir: str | None = None,
    cache_gb: float = 100.0,
    timeout: float = 60.0,
    strict: bool = True,
    key: str = "data.path",
) -> ShardSet | MixedShards:
    """Open the shards of one path, or of several paths with their weights.

    Args:
        paths: (path or URL, weight) of each source. The weight of a single source does not matter.
        cache_dir: folder in which ranges of remote shards are kept; None keeps none.
        cache_gb: limit of that folder, in units of 10^9 bytes.
        timeout: seconds that one attempt at a remote range may take.
        strict: compare the sizes of local files with the manifest now, instead of when they are read.
        key: the name of a single path in messages. Messages call one of several paths ``data.sources[…].path``.

    Raises:
        UserError: as :class:`ShardSet` and :class:`MixedShards` raise.
    """
    cache = Cache(cache_dir, int(cache_gb * 1e9)) if cache_dir else None
    keys = [key] if len(paths) == 1 else [f"data.sources[{number}].path" for number in range(len(paths))]
    sets = [ShardSet(path, cache, timeout, strict, key) for (path, _), key in zip(paths, keys, strict=True)]
    return sets[0] if len(sets) == 1 else MixedShards(sets, [weight for _, weight in paths])


def order_of(shards: ShardSet | MixedShards, seed: int, block: int) -> Order | MixedOrder:
    """Return the order in which ``shards`` are trained on.

    Args:
        shards: one set of shards or a mixture.
        seed: the seed of the order.
        block: number of shards whose samples are shuffled together.
    """
    if isinstance(shards, ShardSet):
        return Order(shards.counts, seed, block)
    return MixedOrder([Order(one.counts, seed, block) for one in shards.sets], shards.weights, seed)


def shares(weights: Sequence[float]) -> list[int]:
    """Return how many places each source has in a round. The places are rounded by largest remainders.

    Raises:
        UserError: a weight is too small for one place.
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
    """Yield (name, value in the first manifest, value in the other) of everything that must agree in a mixture."""
    for key in ("family", "latents", "flip", "scaling_factor", "weights"):
        yield key, first["settings"].get(key), other["settings"].get(key)
    yield "the latents' shape", first["latents"]["shape"], other["latents"]["shape"]
    yield "the prompts' shape", first["prompts"]["tensors"], other["prompts"]["tensors"]
