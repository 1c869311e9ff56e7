"""End a rank's process without the waits of Python's own exit."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End this process: ``sys.exit``, unless it has joined a process group. What is registered with ``atexit`` runs first, as trackers
    rely on.

    With a group, Python's own exit takes the interpreter down while gloo's threads may still drop the tensors of the last collective, which now and
    then aborts the process right behind a collective, with -6 (https://github.com/pytorch/pytorch/pull/179291).
    ``destroy_process_group`` does not help, since DeepSpeed keeps references to the groups. A finished run would count as failed.
    """
    torch = sys.modules.get("torch")
    if not (torch and torch.distributed.is_initialized()):
        sys.exit(code)
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also where who read the output is gone
        os._exit(code)
