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
    """Raised on all ranks together, out of what is no training step, by :meth:`StopRequest.poll`."""


class StopRequest:
    """Remembers a request until a point that all ranks reach. Signals count while the process is
    :func:`~dde_ds.training.signals.listening`, and those from before this object was made.

    ``deadline``, if any, is in seconds of ``time.monotonic``.
    """

    def __init__(self, run_folder: Path, device: torch.device, deadline: float | None = None):
        self._file, self._device, self._deadline = run_folder / "STOP", device, deadline
        self._agreed = False

    def __bool__(self) -> bool:
        """Whether this rank was asked. Ranks must agree before they act."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        return self._agreed or late or self._file.exists() or asked()

    def agreed(self) -> bool:
        """Whether any rank was asked; once it is so it stays so. Collective."""
        self._agreed = any_rank(bool(self), self._device)
        return self._agreed

    def poll(self) -> None:
        """Collective.

        Raises:
            Interrupted: a rank was asked to stop.
        """
        if self.agreed():
            raise Interrupted


def none_if_stopped(work: Callable[[], Any]) -> Any:
    """What ``work()`` gives; None where a request to stop cut it short."""
    try:
        return work()
    except Interrupted:
        return None
