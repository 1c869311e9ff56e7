"""Requests to stop that come from outside the run folder: TERM, USR1, Ctrl-C, or a launcher that is gone.

Nothing heavy is imported here. So a launcher can listen before it imports libraries for seconds, and loses no signal
meanwhile.
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
    """Record from now on the signals that ask to stop. Return the handlers that the signals had before.

    Python allows handlers in the main thread only. In another thread none is installed and none returned. The parent process
    may have blocked signals, so that none is lost before this call. Such signals arrive now.
    """
    if not _started_by:
        _started_by.append(launchers())
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.signal(number, lambda number, _: _came.append(number)) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return before


def asked() -> bool:
    """Return whether a signal came, or the launcher went, since this process began to listen."""
    return bool(_came) or (bool(_started_by) and launchers() != _started_by[0])


@contextlib.contextmanager
def listening() -> Iterator[list[int]]:
    """Listen within the block, and yield the list of signals that came. If the process has listened before, earlier signals are
    in the list.

    After the block, the earlier handlers are back and the signals are forgotten.
    """
    before = listen()
    try:
        yield _came
    finally:
        for number, handler in before.items():
            # None: the handler was not installed by Python, and Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _came.clear()
        _started_by.clear()


def launchers() -> list[str]:
    """Return the process ids of this rank's launcher, if the launcher may end without a word to its ranks. The ranks would then
    train on unwatched.

    Such launchers are torchrun and deepspeed's two processes. deepspeed's outer process takes TERM for itself alone. The list
    is empty for other launchers. node.py and srun end their ranks, and a shell may leave its processes behind on purpose.
    """
    parent = str(os.getppid())
    command = _process_file(parent, "cmdline")
    if "deepspeed.launcher.launch" in command:
        # The second field after the name, which is in brackets and may hold any character:
        # https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
        return [parent, *_process_file(parent, "stat").rpartition(")")[2].split()[1:2]]
    return [parent] if "torchrun" in command or "torch.distributed.run" in command else []


def _process_file(process: str, name: str) -> str:
    """Return the text of a process's file in ``/proc``. Empty if the process is gone, or if the system is not Linux."""
    try:
        return Path("/proc", process, name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
