"""Requests to stop: TERM, USR1, Ctrl-C, or a file named STOP in the run folder."""

from __future__ import annotations

import signal
from pathlib import Path


class StopRequest:
    """Remembers a signal until the running step is over. Ranks must agree on it before they act: see ``any_rank``."""

    def __init__(self, run_folder: Path):
        self._file = run_folder / "STOP"
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, *_) -> None:
        self._signalled = True

    def __bool__(self) -> bool:
        return self._signalled or self._file.exists()
