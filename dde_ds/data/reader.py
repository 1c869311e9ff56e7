"""Turn positions into micro-batches: a map-style dataset, a sampler of this rank's slices, and a DataLoader around
both.

A micro-batch of B pairs is a dict of tensors: ``latents`` (2B,C,H,W) with all winners before all losers, ``noise`` (B
or 2B,C,H,W), ``timesteps`` (B,), ``prompt_embeds`` (2B,S,D), for SDXL ``pooled_prompt_embeds`` (2B,P) and ``time_ids``
(2B,6), ``positions`` (B,) and, if the shards have soft labels, ``soft_label`` (B,) float32.

The position is the only state. The trainer counts it at its optimizer steps. Micro-batches that were prefetched beyond
it are simply read again after a resume. So the number of ranks, workers, prefetched batches and micro-batches does not
change what is trained on.
"""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dde_ds.data.manifest import SOFT_LABEL
from dde_ds.data.order import PairOrder
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.shards import Shards
from dde_ds.data.storage import DamagedData
from dde_ds.errors import RankError, UserError
from dde_ds.models.family import BATCH_NAMES, PAIR_TENSORS
from dde_ds.warn import reason

AHEAD = 4
"""Number of micro-batches whose bytes are requested from a local disk before their turn.

This does not depend on what the loader's processes are doing: they share the page cache.
"""

MENDS = {
    "SIGKILL": ", most likely by the system for want of memory: lower data.workers, or give the job more memory",
    "SIGBUS": ", most likely for want of room in /dev/shm: give the container more (docker run --shm-size), or lower data.workers",
}
"""Advice for the user when a worker was killed by this signal."""

REPORT = "report"
"""Key under which a worker returns its report beside the tensors: what it read, and the damaged samples that it met."""


class PairDataset(Dataset):
    """Micro-batches by their positions.

    An index of this dataset is a pair of lists, as :class:`LookAhead` yields it. So a worker returns one whole
    micro-batch.

    Args:
        shards: one set of shards, or a mixture of several (:mod:`dde_ds.data.mixture`).
        order: the order of the same shards.
        draws: the random draws of each pair.
        max_bad_samples: how many damaged samples may be replaced. Every reader, also after a resume, replaces a damaged
            sample by the next undamaged one. So what is trained on stays a function of (seed, position) and of the
            shards' bytes.
    """

    def __init__(self, shards: Shards, order: PairOrder, draws: PairRng, max_bad_samples: int = 0):
        self.shards, self.order, self.draws, self.max_bad_samples = shards, order, draws, max_bad_samples
        self.bad: dict[tuple[int, int], str] = {}
        """The damaged samples that this process has met, with the message of each."""
        self._reported = Counter()

    def __getitems__(self, batch: tuple[list[int], list[int]]) -> dict | UserError:
        positions, coming = batch
        # PyTorch adds a traceback to the text of an exception that leaves a worker. An error that is returned as a
        # value keeps its single line.
        try:
            for position in coming:
                self.shards.prefetch(*self.order.locate(position))
            tensors = self.collate([self.pair(position) for position in positions])
        except UserError as error:
            return error
        return {**tensors, REPORT: self._report(len(positions))}

    def pair(self, position: int) -> dict[str, torch.Tensor]:
        """Return one pair: the latents of the shard, the embeddings of its prompt, its noise and its timestep.

        Raises:
            DamagedData: a sample is damaged, and no more samples may be replaced.
            UserError: the shards cannot be read.
        """
        place = first = self.order.locate(position)
        while True:
            # Read again instead of remembering the failure: whether a pair is usable must depend only on its bytes and
            # its position.
            try:
                return self._pair(position, place)
            except DamagedData as error:
                self.bad[place] = str(error)
            after = self.shards.next_sample(*place)
            if len(self.bad) > self.max_bad_samples or after == first:
                raise DamagedData(f"{self.bad[place]}{self._limit()}")
            place = after

    def _pair(self, position: int, place: tuple[int, int]) -> dict[str, torch.Tensor]:
        sample = self.shards.read(*place)
        shape = sample["latents"].shape
        timestep, noise, drop_caption = self.draws(position, shape)
        stored = self._empty_prompt() if drop_caption else self.shards.prompt(int(sample["prompt"]))
        prompt = {BATCH_NAMES[name]: value for name, value in stored.items()}
        # Both images of a pair are flipped or neither: the direction that they face must not tell them apart.
        latents = sample["latents_flipped" if self.draws.flipped(position) else "latents"]
        if "logvar" in sample:
            latents = (latents + (0.5 * sample["logvar"].float()).exp() * self.draws.posterior_noise(position, shape)).half()
        kept = {name: sample[name] for name in (*PAIR_TENSORS, SOFT_LABEL) if name in sample}
        return {
            "latents": latents,
            **kept,
            **prompt,
            "noise": noise,
            "timesteps": torch.tensor(timestep),
            "positions": torch.tensor(position),
        }

    def _empty_prompt(self) -> dict[str, torch.Tensor]:
        try:
            return self.shards.prompt(0)
        except DamagedData as error:  # no other sample could replace the empty prompt
            raise UserError(str(error)) from None

    def _limit(self) -> str:
        return f" (data.max_bad_samples {self.max_bad_samples} is used up)" if self.max_bad_samples else ""

    def _report(self, pairs: int) -> dict:
        """Return what this process has read since its last report, and every damaged sample that it has met so far."""
        counters = Counter(self.shards.counters)
        since = {name: counters[name] - self._reported[name] for name in counters}
        self._reported = counters
        return {"counters": {**since, "pairs": pairs}, "bad": dict(self.bad)}

    @staticmethod
    def collate(pairs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the tensors of a micro-batch from those of its pairs, with all winners before all losers."""
        # In a worker, default_collate writes the batch directly into shared memory. So each tensor is copied once on
        # its way to the trainer.
        batch = {}
        for key in pairs[0]:
            values = [pair[key] for pair in pairs]
            if key in ("latents", "noise", *PAIR_TENSORS):  # (2,…) each → winners, then losers; shared noise has shape (1,…)
                values = [value[side] for side in range(len(values[0])) for value in values]
            elif key in BATCH_NAMES.values():  # both images of a pair have the same caption
                values = values * 2
            batch[key] = default_collate(values)
        return batch


class Slices(Sized, Iterable[list[int]], Protocol):
    """The positions of each micro-batch, in order. They can be iterated over more than once."""


class RankSlices(Sampler):
    """The positions of one rank's micro-batches, step after step.

    Global batch g consists of the positions [g·B, (g+1)·B). It is split into equal parts: rank r takes the r-th part,
    and splits it into micro-batches.

    Args:
        pairs: B, the pairs of a global batch.
        micro: the pairs of a micro-batch.
        rank, world: this rank, and the number of ranks.
        start_step, end_step: the steps [start_step, end_step).
    """

    def __init__(self, pairs: int, micro: int, rank: int, world: int, start_step: int, end_step: int):
        self.pairs, self.micro, self.rank, self.world = pairs, micro, rank, world
        self.start_step, self.end_step = start_step, end_step

    def __iter__(self) -> Iterator[list[int]]:
        share = self.pairs // self.world
        for step in range(self.start_step, self.end_step):
            first = step * self.pairs + self.rank * share
            for low in range(first, first + share, self.micro):
                yield list(range(low, low + self.micro))

    def __len__(self) -> int:
        return (self.end_step - self.start_step) * (self.pairs // self.world // self.micro)


class LookAhead(Sampler):
    """Yield each micro-batch together with the positions to prefetch when it is read.

    These are the positions of the micro-batch that comes ``AHEAD`` micro-batches later. With the first micro-batch come
    the positions of all micro-batches up to that one.
    """

    def __init__(self, slices: Slices):
        self.slices = slices

    def __iter__(self) -> Iterator[tuple[list[int], list[int]]]:
        later = iter(self.slices)
        coming = [position for batch in itertools.islice(later, AHEAD) for position in batch]
        for batch in self.slices:
            coming += next(later, [])
            yield batch, coming
            coming = []

    def __len__(self) -> int:
        return len(self.slices)


class ReadingTotals:
    """Count what a rank's loader processes have read and replaced since the run was started or resumed."""

    def __init__(self):
        self.counters: Counter = Counter()
        self.bad: dict[tuple[int, int], str] = {}

    def add(self, report: dict, dataset: PairDataset) -> None:
        """Add the report of one micro-batch. Warn of each damaged sample once.

        Raises:
            RankError: more samples are damaged than may be replaced.
        """
        self.counters.update(report["counters"])
        for place, problem in report["bad"].items():
            if place not in self.bad:
                self.bad[place] = problem
                print(f"warning: {problem}; the next whole sample is trained on in its place", file=sys.stderr, flush=True)
        if len(self.bad) > dataset.max_bad_samples:
            raise RankError(f"{list(self.bad.values())[-1]}{dataset._limit()}")


def _leave_signals_to_the_trainer(_: int) -> None:
    # Launchers send TERM to the whole process group. A worker that died of it would break the step that saves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.set_num_threads(1)


def micro_batches(
    dataset: PairDataset, slices: Slices, workers: int, pin_memory: bool, totals: ReadingTotals | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this rank's micro-batches in order.

    Args:
        dataset: the micro-batches by their positions.
        slices: the positions of each micro-batch.
        workers: number of loader processes; 0 reads in this process.
        pin_memory: put the tensors into pinned memory.
        totals: counts what was read and replaced.

    Raises:
        RankError: a sample cannot be used, more samples are damaged than may be replaced, or a worker could not be
            started or was killed. No sample is skipped.
    """
    totals = ReadingTotals() if totals is None else totals
    loader = DataLoader(
        dataset,
        batch_sampler=LookAhead(slices),
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    for batch in _from_workers(loader, workers):
        if isinstance(batch, UserError):
            raise RankError(str(batch))
        totals.add(batch.pop(REPORT), dataset)
        yield batch


def _from_workers(loader: DataLoader, workers: int) -> Iterator[Any]:
    """Yield the loader's batches. If a worker was killed, the next request for a batch raises a one-line error."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        batches = iter(loader)
    except OSError as error:
        raise RankError(f"data.workers is {workers}: one could not be started: {reason(error)}; lower it") from None
    if in_main_thread:
        # PyTorch's own handler would raise wherever the main thread is, in the middle of a step or of a save. Another
        # loader of this process may have installed it before.
        pytorchs = getattr(before, "__module__", None) == "torch.utils.data._utils.signal_handling"
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if pytorchs or before is None else before)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError):
            if why := _death(batches):
                raise RankError(f"data.workers is {workers}: {why}") from None
            raise
        yield batch


def _death(batches: Iterator[Any]) -> str | None:
    """Return how one of the loader's workers was killed and what to do about it.

    Return None if all are alive or ended by themselves.
    """
    killed = [-worker.exitcode for worker in getattr(batches, "_workers", ()) if (worker.exitcode or 0) < 0]
    if not killed:
        return None
    name = signal.Signals(killed[0]).name
    return f"a worker was killed by {name}" + MENDS.get(name, "") + "; then go on with --resume"


def _as_is(batch):
    return batch
