"""The progress of a run for a person: a live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dde_ds.text import printable, verbatim
from dde_ds.warn import reason, warn_once

PLAIN_SECONDS = 10.0


class ProgressLine:
    """Show a run's progress, on the one rank that is ``visible``. Use it as a context manager."""

    def __init__(self, first_step: int, steps: int, visible: bool):
        self._steps, self._visible = steps, visible
        self._started, self._first = time.perf_counter(), first_step
        self._printed = 0.0
        self._live = None
        console = Console()
        if visible and console.is_terminal:
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
            )
            self._live = Progress(*columns, TextColumn("{task.description}"), console=console)
            self._task = self._live.add_task("", total=steps, completed=first_step)

    def __enter__(self) -> ProgressLine:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()

    def update(self, step: int, row: dict[str, float]) -> None:
        """Show the row of a finished step. In a pipe, print the first row, the last one, and one every ten seconds between."""
        if not self._visible:
            return
        text = f"loss {row['loss']:.4f}" if "loss" in row else "skipped"
        if "rewards/accuracies" in row:
            text += f"  accuracy {row['rewards/accuracies']:.2f}"
        text += f"  {row['perf/pairs_per_s']:.1f} pairs/s"
        if self._live:
            self._live.update(self._task, completed=step, description=text)
            return
        now = time.perf_counter()
        if step == self._first + 1 or step == self._steps or now - self._printed > PLAIN_SECONDS:
            self._printed = now
            left = (now - self._started) / (step - self._first) * (self._steps - step)
            self.say(f"step {step}/{self._steps}  eta {left:.0f} s  {text}")

    def say(self, message: str) -> None:
        """Print one line that stays."""
        if not self._visible:
            return
        try:
            if self._live:
                self._live.console.print(verbatim(message))
            else:
                print(printable(message), flush=True, file=sys.stdout)
        except OSError as error:  # the log's disk is full, or its reader is gone
            warn_once(f"standard output could not be written: {reason(error)}; the run goes on")
