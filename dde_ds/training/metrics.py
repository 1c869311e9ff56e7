"""Write ``metrics.jsonl``: one row of numbers per logged step, averaged over ranks and over the steps since the last row."""

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
    """Running means of the objective's metrics. They stay on the device until they are read. A step counts once it is committed."""

    def __init__(self):
        self._step: list[tuple[dict[str, Tensor], Tensor | None]] = []
        self._sums: dict[str, Tensor] = {}
        self._counts = Counter[str]()
        self._by_timestep: Tensor | None = None
        self._count = 0
        self.credit: dict[str, list[float]] = {}
        """The credit of the last :meth:`read`, for each fiftieth of the timesteps. ``credit`` is the sum of g_t · (the link's weight) over
        its pairs, and ``pairs`` is their number."""

    def add(self, out: ObjectiveOutput) -> None:
        """Add one micro-batch to the current step."""
        self._step.append((out.metrics, out.by_timestep))

    def commit(self) -> None:
        """Count the current step, because its update was made. :meth:`read` does this too."""
        for metrics, by_timestep in self._step:
            for name, value in metrics.items():
                self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()
                self._counts[name] += 1
            if by_timestep is not None:
                self._by_timestep = by_timestep.double() + (0 if self._by_timestep is None else self._by_timestep)
            self._count += 1
        self._step.clear()

    def discard(self) -> None:
        """Drop the current step's numbers, because its update was skipped."""
        self._step.clear()

    def read(self, timesteps: int) -> dict[str, float]:
        """Return the means over all micro-batches and ranks since the last call. Collective.

        Three numbers are also given by tenths of the ``timesteps``, as in ``accuracy_by_t/000-099``, for each tenth with any pair. These
        are the share of pairs with m < 0 (a pair with m = 0 counts one half), the reward margin, and the winners' drift as a fraction of
        the reference's error. The result is empty where all steps were skipped.
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
        """Return the state for a checkpoint, so that a resumed run's first row also averages over the steps before it. Collective.

        Args:
            accumulation: micro-batches of a step on this rank. Their number and the number of ranks may change on resume.
        """
        if not self._count:
            return {}
        means, by_timestep = self._means()
        pairs = by_timestep * dist.get_world_size()
        return {"steps": self._count // accumulation, "means": means, "by_timestep": pairs.tolist()}

    def restore(self, state: dict, accumulation: int, device: torch.device) -> None:
        """Continue from a checkpoint's :meth:`state`, as if this rank had seen its share of those steps."""
        if not state:
            return
        self._count = state["steps"] * accumulation
        sums = torch.tensor(list(state["means"].values()), dtype=torch.float64, device=device) * self._count
        self._sums = dict(zip(state["means"], sums, strict=True))
        self._counts = Counter(dict.fromkeys(self._sums, self._count))
        by_timestep = torch.tensor(state["by_timestep"], dtype=torch.float64, device=device) / dist.get_world_size()
        self._by_timestep = by_timestep if by_timestep.numel() else None

    def _means(self) -> tuple[dict[str, float], Tensor]:
        """Return the means by name, and the sums by timestep, (numbers, buckets) float64, averaged over ranks. Collective."""
        # With a partly precomputed reference, some steps lack some numbers. Leave these numbers out: their mean would cover fewer steps.
        names = sorted(name for name in self._sums if self._counts[name] == self._count)
        values = torch.stack([self._sums[name] for name in names]) / self._count
        buckets = values.new_zeros(len(BY_TIMESTEP), 0) if self._by_timestep is None else self._by_timestep
        means = mean_over_ranks(torch.cat([values, buckets.flatten()])).tolist()
        by_timestep = torch.tensor(means[len(names) :], dtype=torch.float64).view(len(BY_TIMESTEP), -1)
        return dict(zip(names, means[: len(names)], strict=True)), by_timestep


class Clock:
    """The throughput of training since the last row, and the share of time spent waiting for data."""

    def __init__(self):
        self._started = time.perf_counter()
        self._waited = 0.0
        self._pairs = 0

    def timed(self, batches):
        """Yield the same batches. The time to get a batch counts as waiting."""
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
        """Exclude the time inside, such as for drawing, saving and evaluating, from the training time."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._started
        values = {"perf/pairs_per_s": self._pairs / elapsed, "perf/data_wait": self._waited / elapsed}
        self._started, self._waited, self._pairs = time.perf_counter(), 0.0, 0
        return values


class RunLog:
    """The logs of a run: ``metrics.jsonl``, ``correction.jsonl`` and ``credit.jsonl``.

    ``correction.jsonl`` holds the table's K at every twentieth of the timesteps. ``credit.jsonl`` holds the credit over pairs.

    Args:
        folder: the run's folder. None on ranks that write nothing.
        resume_step: the step of the resume. Rows that an earlier try wrote for later steps are dropped.
        trackers: trackers that also receive each row.
        every: a row is due every ``every`` steps.
        steps: the number of steps of the run. A row is due after the last step as well.
    """

    def __init__(self, folder: Path | None, resume_step: int, trackers: Sequence[Any] = (), every: int = 1, steps: int = 0):
        self._trackers, self._every, self._steps = trackers, every, steps
        self.last: dict[str, float] = last_numbers(read_rows(folder / "metrics.jsonl", is_metrics)) if folder else {}
        """The numbers of the last row."""
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
        """Write a step's row.

        ``correction.jsonl`` gets a row only with ``objective``, and ``credit.jsonl`` only with ``credit``, from :attr:`Averages.credit`.
        """
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
        """Write more numbers for the last row's step, from an evaluation that a request to stop had cut off."""
        whole = self.last | numbers
        self.write(step, position, numbers)
        self.last = whole

    def show(self, step: int, images: Tensor) -> None:
        """Send sample images, (N,3,H,W) uint8, to the trackers."""
        with _going_on():
            send_images(self._trackers, step, images)

    def close(self) -> None:
        """Let the trackers send the data that they still buffer."""
        with _going_on():
            finish(self._trackers)


@contextmanager
def _going_on():
    try:
        yield
    except Exception as error:  # Each tracker raises its own kinds of errors, such as for a full disk or a lost network.
        warn_once(f"log.trackers: one refused what was sent to it: {type(error).__name__}: {reason(error)}; the run goes on")
