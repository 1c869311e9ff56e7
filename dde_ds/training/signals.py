"""What asks a run to stop from outside its folder: TERM, USR1, Ctrl-C, or a launcher that is gone.

Nothing heavy is imported here: a launcher listens before it imports what takes seconds, so that nothing that comes then is lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_came: list[int] = []
_started_by: list[list[str]] = []


def listen() -> dict[signal.Signals, Any]:
    """Remember from now on what asks to stop, and return the handlers that the signals had before.

    Python allows handlers in the main thread alone: in another one none is installed and none returned. Signals that the parent
    process blocked, so that none would be lost before this call, come in now.
    """
    if not _started_by:
        _started_by.append(launchers())
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.signal(number, lambda number, _: _came.append(number)) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return before


def asked() -> bool:
    """Return whether a signal came, or the launcher went, since this process listens."""
    return bool(_came) or (bool(_started_by) and launchers() != _started_by[0])


@contextlib.contextmanager
def listening() -> Iterator[list[int]]:
    """Listen within the block, which gets the list of signals that came. Where the process listened before, what came then is in it.

    Afterwards the handlers are those from before, and what came is forgotten.
    """
    before = listen()
    try:
        yield _came
    finally:
        for number, handler in before.items():
            # None: it was not installed by Python, which cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _came.clear()
        _started_by.clear()


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
