"""What all ranks have read of the shards since the last row of metrics, and what they have replaced."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dde_ds.data.reader import ReadingTotals
from dde_ds.distributed.collectives import mean_over_ranks, union_over_ranks
from dde_ds.errors import UserError

COUNTED = ("bytes", "pairs", "cache_hits", "cache_misses")


def reading_row(reading: ReadingTotals, max_bad_samples: int, pairs_per_s: float, device: torch.device) -> dict[str, float]:
    """``data/bytes_per_s``, ``data/substitutions`` since the start or resume, and where there is a cache ``data/cache_hits``, the
    share of ranges found in it. Collective: the limit on damaged samples is the run's, not a rank's.

    Raises:
        UserError: more damaged samples than a run may replace.
    """
    values = torch.tensor([reading.counters[name] for name in COUNTED] + [len(reading.bad)], dtype=torch.float64, device=device)
    reading.counters.clear()
    *sums, met = (mean_over_ranks(values) * dist.get_world_size()).tolist()
    found = dict(zip(COUNTED, sums, strict=True))
    bad = len(union_over_ranks(set(reading.bad))) if met else 0  # two ranks may have met the same
    if bad > max_bad_samples:
        raise UserError(f"{bad} damaged samples on all ranks, reported above; data.max_bad_samples is {max_bad_samples}")
    # Of the pairs that were read, at the rate of those that were trained on: loaders read ahead.
    row = {"data/bytes_per_s": found["bytes"] / max(1.0, found["pairs"]) * pairs_per_s, "data/substitutions": bad}
    asked = found["cache_hits"] + found["cache_misses"]
    return row | ({"data/cache_hits": found["cache_hits"] / asked} if asked else {})
