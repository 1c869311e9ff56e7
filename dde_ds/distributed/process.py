"""End a rank's process without the waits of Python's own exit."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End this process with ``sys.exit``, or more abruptly if it has joined a process group.

    Functions that are registered with ``atexit`` run in both cases, since experiment trackers rely on them.

    With a process group, Python's own exit can abort the process. It takes the interpreter down while gloo's threads
    may still drop the tensors of the last collective. Now and then this aborts the process right behind a collective,
    with exit code -6 (https://github.com/pytorch/pytorch/pull/179291). A finished run would then count as failed.
    ``destroy_process_group`` does not help, since DeepSpeed keeps references to the groups.
    """
    torch = sys.modules.get("torch")
    if not (torch and torch.distributed.is_initialized()):
        sys.exit(code)
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also if the reader of the output is gone
        os._exit(code)
