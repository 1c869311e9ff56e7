"""A file whose age shows that a run still moves: for health checks, and for people who look from outside."""

from __future__ import annotations

import json
import time
from pathlib import Path

from dde_ds.warn import reason, warn_once

EVERY_SECONDS = 10.0


class Heartbeat:
    """Write ``heartbeat``, ``{"time": seconds since 1970, "step": …}``, at most every ten seconds.

    One rank writes it for all: the other ranks move with this rank or not at all.
    """

    def __init__(self, run_folder: Path | None):
        """Prepare to write in ``run_folder``. On the other ranks ``run_folder`` is None, and nothing is written."""
        self._file = run_folder / "heartbeat" if run_folder else None
        self._written = -float("inf")

    def beat(self, step: int) -> None:
        """Write the file if ten seconds have passed since the last time. A failure is a warning."""
        now = time.monotonic()
        if self._file is None or now - self._written < EVERY_SECONDS:
            return
        self._written = now
        staged = self._file.with_name(".heartbeat.partial")
        try:
            staged.write_text(json.dumps({"time": time.time(), "step": step}) + "\n", encoding="utf-8")
            staged.replace(self._file)  # a reader never finds it empty
        except OSError as error:
            warn_once(
                f"{self._file} could not be written: {reason(error)}; the run goes on, though a health check may hold it for dead"
            )
