"""From positions to micro-batches: a map-style dataset, a sampler of this rank's slices, a DataLoader around both.

A micro-batch of B pairs is a dict of tensors: ``latents`` (2B,C,H,W) winners then losers, ``noise`` (B or 2B,C,H,W),
``timesteps`` (B,), ``prompt_embeds`` (2B,S,D), for SDXL ``pooled_prompt_embeds`` (2B,P) and ``time_ids`` (2B,6), and ``positions`` (B,).

Position, which the trainer counts at its optimizer steps, is all the state there is: what was prefetched beyond it is
simply read again after a resume. So ranks, workers, prefetch and micro-batches change nothing of what is trained on.
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

from dde_ds.data.order import PairOrder
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.shards import Shards
from dde_ds.data.storage import DamagedData
from dde_ds.errors import RankError, UserError
from dde_ds.models.family import BATCH_NAMES, PAIR_TENSORS
from dde_ds.warn import reason

AHEAD = 4
"""Micro-batches whose bytes are asked of a local disk before their turn, whatever the loader's processes are at: the pages are theirs in common."""

MENDS = {
    "SIGKILL": ", most likely by the system for want of memory: lower data.workers, or give the job more memory",
    "SIGBUS": ", most likely for want of room in /dev/shm: give the container more (docker run --shm-size), or lower data.workers",
}
"""What to do where a worker was killed by a signal."""

REPORT = "report"
"""Key under which a worker hands over its :class:`Report` beside the tensors."""


class PairDataset(Dataset):
    """Micro-batches by their positions. Indexed by what :class:`LookAhead` gives, so that a worker hands over one whole micro-batch.

    Args:
        shards, order: of one set, or a mixture of several (:mod:`dde_ds.data.mixture`).
        max_bad_samples: how many damaged samples may be replaced. The replacement is the next whole sample after it, for
            every reader and after every resume: what is trained on stays a function of (seed, position) and of the shards' bytes.
    """

    def __init__(self, shards: Shards, order: PairOrder, draws: PairRng, max_bad_samples: int = 0):
        self.shards, self.order, self.draws, self.max_bad_samples = shards, order, draws, max_bad_samples
        self.bad: dict[tuple[int, int], str] = {}
        """Damaged samples that this process has met, and what was said of them."""
        self._reported = Counter()

    def __getitems__(self, batch: tuple[list[int], list[int]]) -> dict | UserError:
        positions, coming = batch
        # An exception that leaves a worker is rewritten with its traceback; handed over as a value it keeps its one line.
        try:
            for position in coming:
                self.shards.prefetch(*self.order.locate(position))
            tensors = self.collate([self.pair(position) for position in positions])
        except UserError as error:
            return error
        return {**tensors, REPORT: self._report(len(positions))}

    def pair(self, position: int) -> dict[str, torch.Tensor]:
        """One pair: the shard's latents, its prompt's embeddings, its noise and timestep.

        Raises:
            DamagedData: a damaged sample, and none (more) may be replaced.
            UserError: shards that cannot be read.
        """
        place = first = self.order.locate(position)
        while True:
            # Never taken from memory: whether a pair can be had follows from its bytes and its position alone.
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
        # One coin for both images of a pair: what tells them apart must not be which way they face.
        latents = sample["latents_flipped" if self.draws.flipped(position) else "latents"]
        if "logvar" in sample:
            latents = (latents + (0.5 * sample["logvar"].float()).exp() * self.draws.posterior_noise(position, shape)).half()
        kept = {name: sample[name] for name in PAIR_TENSORS if name in sample}
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
        except DamagedData as error:  # not the sample's fault: no other sample would do
            raise UserError(str(error)) from None

    def _limit(self) -> str:
        return f" (data.max_bad_samples {self.max_bad_samples} is used up)" if self.max_bad_samples else ""

    def _report(self, pairs: int) -> dict:
        """What this process read since its last report, and every damaged sample it has met so far."""
        counters = Counter(self.shards.counters)
        since = {name: counters[name] - self._reported[name] for name in counters}
        self._reported = counters
        return {"counters": {**since, "pairs": pairs}, "bad": dict(self.bad)}

    @staticmethod
    def collate(pairs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        # default_collate puts a worker's batch into shared memory at once: each tensor is copied once on its way to the trainer.
        batch = {}
        for key in pairs[0]:
            values = [pair[key] for pair in pairs]
            if key in ("latents", "noise", *PAIR_TENSORS):  # (2,…) each → winners, then losers; shared noise is (1,…)
                values = [value[side] for side in range(len(values[0])) for value in values]
            elif key in BATCH_NAMES.values():  # one caption for both
                values = values * 2
            batch[key] = default_collate(values)
        return batch


class Slices(Sized, Iterable[list[int]], Protocol):
    """The positions of each micro-batch, in order. It may be gone through more than once."""


class RankSlices(Sampler):
    """Positions of one rank's micro-batches, step after step.

    Global batch g is positions [g·B, (g+1)·B); rank r takes the r-th of its equal parts, micro-batches lie inside that.
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
    """Each micro-batch with the positions to announce when it is read: those that come ``AHEAD`` micro-batches later, and at first all before them."""

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
    """What a rank's loader processes have read and replaced since the run was started or resumed."""

    def __init__(self):
        self.counters: Counter = Counter()
        self.bad: dict[tuple[int, int], str] = {}

    def add(self, report: dict, dataset: PairDataset) -> None:
        self.counters.update(report["counters"])
        for place, problem in report["bad"].items():
            if place not in self.bad:
                self.bad[place] = problem
                print(f"warning: {problem}; the next whole sample is trained on in its place", file=sys.stderr, flush=True)
        if len(self.bad) > dataset.max_bad_samples:
            raise RankError(f"{list(self.bad.values())[-1]}{dataset._limit()}")


def _leave_signals_to_the_trainer(_: int) -> None:
    # Launchers send TERM to the whole process group; a worker that died of it would break the step that saves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.set_num_threads(1)


def micro_batches(
    dataset: PairDataset, slices: Slices, workers: int, pin_memory: bool, totals: ReadingTotals | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches, in order. ``totals`` takes account of what was read and replaced.

    Raises:
        RankError: a sample that cannot be used, or one more than may be replaced; nothing is skipped. Or a worker that could not be
            started, or was killed.
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
    """The loader's batches. A worker that was killed is told in one line, by whoever asks for the next batch."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        batches = iter(loader)
    except OSError as error:
        raise RankError(f"data.workers is {workers}: one could not be started: {reason(error)}; lower it") from None
    if in_main_thread:
        # PyTorch's own handler would raise wherever the main thread stands, in the middle of a step or of a save. Another loader of
        # this process may have installed it before.
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
    """How one of the loader's workers was killed, and what to do; None where all live, or ended by themselves."""
    killed = [-worker.exitcode for worker in getattr(batches, "_workers", ()) if (worker.exitcode or 0) < 0]
    if not killed:
        return None
    name = signal.Signals(killed[0]).name
    return f"a worker was killed by {name}" + MENDS.get(name, "") + "; then go on with --resume"


def _as_is(batch):
    return batch
