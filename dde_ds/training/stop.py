"""Requests to stop: TERM, USR1, Ctrl-C, a file named STOP in the run folder, or the end of the time that a run has."""

from __future__ import annotations

import signal
import time
from pathlib import Path


class StopRequest:
    """Remembers a signal until the running step is over. Ranks must agree on it before they act: see ``any_rank``.

    ``deadline``, if any, is in seconds of ``time.monotonic``.
    """

    def __init__(self, run_folder: Path, deadline: float | None = None):
        self._file = run_folder / "STOP"
        self._deadline = deadline
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, *_) -> None:
        self._signalled = True

    def __bool__(self) -> bool:
        late = self._deadline is not None and time.monotonic() > self._deadline
        return self._signalled or late or self._file.exists()
