"""``metrics.jsonl``: one row of numbers per logged step, averaged over ranks and over the steps since the last row."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dde_ds.distributed.collectives import mean_over_ranks
from dde_ds.objective.objective import BY_TIMESTEP, Objective, ObjectiveOutput
from dde_ds.rows import RowFile, is_metrics, last_numbers, read_rows
from dde_ds.training.track import finish, send_images, send_row
from dde_ds.warn import reason, warn_once

TENTHS = 10


class Averages:
    """Running means of what the objective reports, on the device until they are read. A step's count when it is committed."""

    def __init__(self):
        self._step: list[tuple[dict[str, Tensor], Tensor | None]] = []
        self._sums: dict[str, Tensor] = {}
        self._counts = Counter[str]()
        self._by_timestep: Tensor | None = None
        self._count = 0
        self.credit: dict[str, list[float]] = {}
        """Of the last :meth:`read`: ``credit``, the sum of g_t · (the link's weight) over the pairs of each fiftieth of the timesteps, and
        ``pairs``, how many."""

    def add(self, out: ObjectiveOutput) -> None:
        """Take in one micro-batch."""
        self._step.append((out.metrics, out.by_timestep))

    def commit(self) -> None:
        """The step was made; done by :meth:`read` as well."""
        for metrics, by_timestep in self._step:
            for name, value in metrics.items():
                self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()
                self._counts[name] += 1
            if by_timestep is not None:
                self._by_timestep = by_timestep.double() + (0 if self._by_timestep is None else self._by_timestep)
            self._count += 1
        self._step.clear()

    def discard(self) -> None:
        """The step was skipped: its numbers are none."""
        self._step.clear()

    def read(self, timesteps: int) -> dict[str, float]:
        """Means over all micro-batches and ranks since the last call. Collective.

        Share of pairs with m < 0 (those with m = 0 count one half), reward margin, and the winners' drift in parts of the reference's error also by tenths of the
        ``timesteps``, as ``accuracy_by_t/000-099``, where any pair fell into one. Nothing where all steps were skipped.
        """
        self.commit()
        self.credit = {}
        if not self._count:
            return {}
        row, by_timestep = self._means()
        credit, pairs = (by_timestep[[BY_TIMESTEP.index("credit"), -1]] * dist.get_world_size()).tolist()
        self.credit = {"credit": credit, "pairs": pairs} if any(credit) else {}
        sums = by_timestep.view(len(BY_TIMESTEP), TENTHS, -1).sum(2).T.tolist() if credit else []
        width = len(str(timesteps - 1))
        for i, (accuracy, margin, drift, reference, _, pairs) in enumerate(sums):
            if pairs:
                first, last = (-(-timesteps * k // len(sums)) for k in (i, i + 1))
                span = f"{first:0{width}d}-{last - 1:0{width}d}"
                row |= {f"accuracy_by_t/{span}": accuracy / pairs, f"margin_by_t/{span}": margin / pairs}
                row[f"drift_by_t/{span}"] = drift / max(reference, 1e-12)
        self._sums, self._counts, self._by_timestep, self._count = {}, Counter(), None, 0
        return row

    def state(self, accumulation: int) -> dict:
        """What a checkpoint keeps, so that a resumed run's first row averages over the steps before it as well. Collective.

        Args:
            accumulation: micro-batches of a step on this rank, which may be others after a resume, as may the ranks.
        """
        if not self._count:
            return {}
        means, by_timestep = self._means()
        pairs = by_timestep * dist.get_world_size()
        return {"steps": self._count // accumulation, "means": means, "by_timestep": pairs.tolist()}

    def restore(self, state: dict, accumulation: int, device: torch.device) -> None:
        """Go on from :meth:`state` of a checkpoint: as if this rank had seen its share of those steps."""
        if not state:
            return
        self._count = state["steps"] * accumulation
        sums = torch.tensor(list(state["means"].values()), dtype=torch.float64, device=device) * self._count
        self._sums = dict(zip(state["means"], sums, strict=True))
        self._counts = Counter(dict.fromkeys(self._sums, self._count))
        by_timestep = torch.tensor(state["by_timestep"], dtype=torch.float64, device=device) / dist.get_world_size()
        self._by_timestep = by_timestep if by_timestep.numel() else None

    def _means(self) -> tuple[dict[str, float], Tensor]:
        """Means by name, and the sums by timestep, (numbers, buckets) float64, as the mean over ranks. Collective."""
        # A number that some steps lack, as with a partly precomputed reference, is a mean of others than the rest.
        names = sorted(name for name in self._sums if self._counts[name] == self._count)
        values = torch.stack([self._sums[name] for name in names]) / self._count
        buckets = values.new_zeros(len(BY_TIMESTEP), 0) if self._by_timestep is None else self._by_timestep
        means = mean_over_ranks(torch.cat([values, buckets.flatten()])).tolist()
        by_timestep = torch.tensor(means[len(names) :], dtype=torch.float64).view(len(BY_TIMESTEP), -1)
        return dict(zip(names, means[: len(names)], strict=True)), by_timestep


class Clock:
    """Throughput of training since the last row, and the share of it spent waiting for data."""

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

    @contextmanager
    def stopped(self):
        """What is done inside is no training: drawing, saving, evaluating."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._started
        values = {"perf/pairs_per_s": self._pairs / elapsed, "perf/data_wait": self._waited / elapsed}
        self._started, self._waited, self._pairs = time.perf_counter(), 0.0, 0
        return values


class RunLog:
    """``metrics.jsonl``; ``correction.jsonl``, the table's K at every twentieth of the timesteps; ``credit.jsonl``, the credit over pairs.

    Args:
        folder: the run's; None on ranks that write nothing.
        resume_step: later rows of an earlier try are dropped.
        every, steps: a row is due every so many steps, and after the last.
    """

    def __init__(self, folder: Path | None, resume_step: int, trackers: Sequence[Any] = (), every: int = 1, steps: int = 0):
        self._trackers, self._every, self._steps = trackers, every, steps
        self.last: dict[str, float] = last_numbers(read_rows(folder / "metrics.jsonl", is_metrics)) if folder else {}
        """Numbers of the last row."""
        self._metrics = RowFile(folder / "metrics.jsonl", resume_step) if folder else None
        self._correction = RowFile(folder / "correction.jsonl", resume_step) if folder else None
        self._credit = RowFile(folder / "credit.jsonl", resume_step) if folder else None

    def due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._steps

    def write(
        self,
        step: int,
        position: int,
        row: dict[str, float],
        objective: Objective | None = None,
        credit: dict[str, list[float]] | None = None,
    ) -> None:
        """Write a step's row; without ``objective`` its table gets none, without ``credit``, :attr:`Averages.credit`, that gets none."""
        self.last = row
        if not self._metrics or not self._correction or not self._credit:
            return
        self._metrics.write({"step": step, "position": position, **row})
        with _going_on():
            send_row(self._trackers, step, row)
        if objective and objective.correction_weight:
            steps = objective.schedule.num_train_timesteps
            timesteps = torch.arange(0, steps, max(1, steps // 20))
            values = objective.correction(timesteps.to(objective.table.correction.device)).tolist()
            self._correction.write({"step": step, "timesteps": timesteps.tolist(), "correction": values})
        if credit:
            self._credit.write({"step": step, **credit})

    def amend(self, step: int, position: int, numbers: dict[str, float]) -> None:
        """Write more numbers of the last row's step: of an evaluation that a request to stop had cut off."""
        whole = self.last | numbers
        self.write(step, position, numbers)
        self.last = whole

    def show(self, step: int, images: Tensor) -> None:
        """Send sample images, (N,3,H,W) uint8, to the trackers."""
        with _going_on():
            send_images(self._trackers, step, images)

    def close(self) -> None:
        """Let the trackers send what they still hold back."""
        with _going_on():
            finish(self._trackers)


@contextmanager
def _going_on():
    try:
        yield
    except Exception as error:  # each tracker has its own kinds of error: no room, no network
        warn_once(f"log.trackers: one refused what was sent to it: {type(error).__name__}: {reason(error)}; the run goes on")
