"""Train several runs, one after another, in two real ranks with faults.

The faults are put into the running process, because no option of the product makes a fault.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing as mp

from dde_ds import UserError, load_config
from dde_ds.engine.state import _masters
from tests.support.launching import spawn


@dataclass(frozen=True)
class Leg:
    """One call of ``train`` on all ranks. Steps count from 1."""

    overrides: Sequence[str] = ()
    resume: str | None = None
    bad_loss: tuple[tuple[int, int], ...] = ()
    """(rank, step): the last micro-batch's loss there is NaN."""
    bad_gradient: tuple[tuple[int, int], ...] = ()
    """(rank, step): the loss is finite, but its gradient is NaN."""
    bad_weights: int | None = None
    """The step after which the float32 weights of all ranks are infinite, although its gradient was finite."""
    signal_in: tuple[str, int] | None = None
    """("draw" or "errors", n): rank 1 gets a signal when it enters the n-th drawing or the n-th held-out evaluation."""


def run_legs(config: Path, legs: Sequence[Leg], look_at: Callable[[Path], Any] | None = None, world: int = 2) -> list:
    """Run the legs, and return how each ended: its exit code, or its error in one line. All ranks must end alike.

    If ``look_at`` is given, each end comes with the result of ``look_at(run folder)`` after the leg. ``look_at`` must be a function
    of a module, because it goes to another process.
    """
    with mp.Manager() as manager:
        outcomes = manager.dict()
        spawn(_one_rank, world, config, legs, look_at, outcomes)
        by_leg = [[outcomes[number, rank] for rank in range(world)] for number in range(len(legs))]
        views = [outcomes.get((number, "folder")) for number in range(len(legs))]
    assert all(len(set(outcome)) == 1 for outcome in by_leg), f"ranks disagree: {by_leg}"
    ends = [outcome[0] for outcome in by_leg]
    return list(zip(ends, views, strict=True)) if look_at else ends


def _one_rank(rank: int, config: Path, legs: Sequence[Leg], look_at, outcomes: dict) -> None:
    signal.alarm(280)  # a hang is a failure, not a wait
    from dde_ds.training.loop import train

    for number, leg in enumerate(legs):
        run = load_config(config, leg.overrides)
        with faults(leg, rank):
            try:
                outcomes[number, rank] = train(run, leg.resume)
            except UserError as error:
                outcomes[number, rank] = str(error)
        if look_at and rank == 0:
            outcomes[number, "folder"] = look_at(Path(run.output))


@contextlib.contextmanager
def faults(leg: Leg, rank: int) -> Iterator[None]:
    from dde_ds.evaluation.generate import PromptSet
    from dde_ds.training import loop
    from dde_ds.training.heldout import HeldOut

    original, original_step = loop.micro_step, loop.optimizer_step

    def micro_step(policy, reference, objective, batch, device):
        out = original(policy, reference, objective, batch, device)
        step = batch.step(8) + 1
        if policy.is_gradient_accumulation_boundary():
            if (rank, step) in leg.bad_loss:
                out.loss = out.loss * torch.nan
            if (rank, step) in leg.bad_gradient:
                out.loss.register_hook(lambda gradient: gradient * torch.nan)
        return out

    def optimizer_step(session, step):
        grad_norm = original_step(session, step)
        if step == leg.bad_weights:
            for weights in _masters(session.policy):
                weights.detach().fill_(torch.inf)
        return grad_norm

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "micro_step", micro_step))
        stack.enter_context(mock.patch.object(loop, "optimizer_step", optimizer_step))
        for kind in (PromptSet, HeldOut):
            name = "draw" if kind is PromptSet else "_predicted"
            stack.enter_context(mock.patch.object(kind, name, _signalling(kind, name, leg, rank)))
        yield


def _signalling(kind: type, name: str, leg: Leg, rank: int):
    original, calls = getattr(kind, name), 0

    def method(*arguments, **options):
        nonlocal calls
        calls += 1
        if (name, calls) == leg.signal_in and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*arguments, **options)

    return method
