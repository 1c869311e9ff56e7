"""Requests to stop: TERM, USR1, Ctrl-C, a file named STOP in the run folder, the end of a run's time, or a launcher that is gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dde_ds.distributed.collectives import any_rank
from dde_ds.training.signals import asked


class Interrupted(Exception):
    """Interrupt work that is no training step. :meth:`StopRequest.poll` raises this on all ranks together."""


class StopRequest:
    """Remember a request to stop until a point that all ranks reach.

    Signals count while the process is :func:`~dde_ds.training.signals.listening`, even those from before this object was made.

    Args:
        deadline: end of the run's time in seconds of ``time.monotonic``, or None.
    """

    def __init__(self, run_folder: Path, device: torch.device, deadline: float | None = None):
        self._file, self._device, self._deadline = run_folder / "STOP", device, deadline
        self._agreed = False

    def __bool__(self) -> bool:
        """Return whether this rank was asked to stop. Ranks must agree before they act."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        return self._agreed or late or self._file.exists() or asked()

    def agreed(self) -> bool:
        """Return whether any rank was asked to stop. Once true, the answer stays true. Collective."""
        self._agreed = any_rank(bool(self), self._device)
        return self._agreed

    def poll(self) -> None:
        """Interrupt all ranks if any of them was asked to stop. Collective.

        Raises:
            Interrupted: a rank was asked to stop.
        """
        if self.agreed():
            raise Interrupted


def none_if_stopped(work: Callable[[], Any]) -> Any:
    """Return ``work()``, or None if a request to stop cut it short."""
    try:
        return work()
    except Interrupted:
        return None
