"""``metrics.jsonl``: one row of numbers per logged step, averaged over ranks and over the steps since the last row."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from dde_ds.distributed import mean_over_ranks


class Averages:
    """Running means of 0-d device tensors. Reading them is the one host synchronisation of a logged step."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()
        self._count += 1

    def read(self) -> dict[str, float]:
        """Means over all micro-batches and ranks since the last call. Collective."""
        names = sorted(self._sums)
        values = mean_over_ranks(torch.stack([self._sums[name] for name in names]) / self._count)
        self._sums, self._count = {}, 0
        return dict(zip(names, values.tolist(), strict=True))


class Clock:
    """Throughput since the last row, and the share of it spent waiting for data."""

    def __init__(self):
        self._started = time.perf_counter()
        self._waited = 0.0
        self._pairs = 0

    def timed(self, batches):
        """The same batches; time spent in getting them counts as waiting."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            yield batch

    def add(self, pairs: int) -> None:
        self._pairs += pairs

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._started
        values = {"perf/pairs_per_s": self._pairs / elapsed, "perf/data_wait": self._waited / elapsed}
        self._started, self._waited, self._pairs = time.perf_counter(), 0.0, 0
        return values


class MetricsFile:
    """Appends rows; on resume drops those of steps that will be run again, so that every step has one row."""

    def __init__(self, path: Path, resume_step: int):
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        staged = path.with_name(f".{path.name}.partial")
        staged.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        staged.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def read_metrics(path: Path) -> list[dict]:
    """Rows of a ``metrics.jsonl``; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
