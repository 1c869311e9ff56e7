"""Requests to stop: TERM, USR1, Ctrl-C, a file named STOP in the run folder, the end of a run's time, or a launcher that is gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dde_ds.distributed import any_rank


class Interrupted(Exception):
    """Raised on all ranks together, out of what is no training step, by :meth:`StopRequest.poll`."""


class StopRequest:
    """Remembers a request until a point that all ranks reach.

    ``deadline``, if any, is in seconds of ``time.monotonic``.
    """

    def __init__(self, run_folder: Path, device: torch.device, deadline: float | None = None):
        self._file, self._device, self._deadline = run_folder / "STOP", device, deadline
        self._launchers = launchers()
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, *_) -> None:
        self._asked = True

    def __bool__(self) -> bool:
        """Whether this rank was asked. Ranks must agree before they act."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        return self._asked or late or self._file.exists() or launchers() != self._launchers

    def agreed(self) -> bool:
        """Whether any rank was asked; once it is so it stays so. Collective."""
        found = any_rank(bool(self), self._device)
        if found:  # otherwise nothing is written: a signal may have come during the collective, and counts in the next one
            self._asked = True
        return found

    def poll(self) -> None:
        """Collective.

        Raises:
            Interrupted: a rank was asked to stop.
        """
        if self.agreed():
            raise Interrupted


def unless_stopped(work: Callable[[], Any]) -> Any:
    """What ``work()`` gives; None where a request to stop cut it short."""
    try:
        return work()
    except Interrupted:
        return None


def launchers() -> list[str]:
    """Process ids of what started this rank, where that is a launcher that may go without a word to its ranks, which would train on
    unwatched: torchrun, or deepspeed's two, the outer of which takes TERM for itself alone. Empty for others: node.py and srun end
    their ranks, and a shell may leave its processes behind on purpose.
    """
    parent = str(os.getppid())
    command = _process_file(parent, "cmdline")
    if "deepspeed.launcher.launch" in command:
        # Second field behind the name, which stands in brackets and may hold anything: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
        return [parent, *_process_file(parent, "stat").rpartition(")")[2].split()[1:2]]
    return [parent] if "torchrun" in command or "torch.distributed.run" in command else []


def _process_file(process: str, name: str) -> str:
    """Empty where there is none: the process is gone, or the system is not Linux."""
    try:
        return Path("/proc", process, name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
