"""Count what all ranks have read of the shards since the last row of metrics, and what they have replaced."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dde_ds.data.reader import ReadingTotals
from dde_ds.distributed.collectives import mean_over_ranks, union_over_ranks
from dde_ds.errors import UserError

COUNTED = ("bytes", "pairs", "cache_hits", "cache_misses")


def reading_row(reading: ReadingTotals, max_bad_samples: int, pairs_per_s: float, device: torch.device) -> dict[str, float]:
    """Return ``data/bytes_per_s``, ``data/substitutions`` since the start or resume, and with a cache ``data/cache_hits``.

    ``data/cache_hits`` is the share of ranges that were found in the cache. Collective: the limit on damaged samples is the
    run's, not a rank's.

    Raises:
        UserError: the ranks have met more damaged samples than the run may replace.
    """
    values = torch.tensor([reading.counters[name] for name in COUNTED] + [len(reading.bad)], dtype=torch.float64, device=device)
    reading.counters.clear()
    *sums, met = (mean_over_ranks(values) * dist.get_world_size()).tolist()
    totals = dict(zip(COUNTED, sums, strict=True))
    bad = len(union_over_ranks(set(reading.bad))) if met else 0  # two ranks may have met the same sample
    if bad > max_bad_samples:
        raise UserError(f"{bad} damaged samples on all ranks, reported above; data.max_bad_samples is {max_bad_samples}")
    # Loaders read ahead of training. So take the bytes of each pair that was read, times the rate of pairs that were trained on.
    row = {"data/bytes_per_s": totals["bytes"] / max(1.0, totals["pairs"]) * pairs_per_s, "data/substitutions": bad}
    lookups = totals["cache_hits"] + totals["cache_misses"]
    return row | ({"data/cache_hits": totals["cache_hits"] / lookups} if lookups else {})
