"""The one place that turns errors into a line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from types import MappingProxyType

from dde_ds.cli.parsing import with_options
from dde_ds.distributed.environment import read_environment
from dde_ds.errors import OtherRankError, RankError, UserError
from dde_ds.text import without_passwords
from dde_ds.training.signals import SIGNALS, asked


def report_errors(
    act: Callable[[], int | None],
    over_ranks: bool = True,
    of_a_run: bool = False,
    kept: str = "what is whole is kept",
    options: Mapping[str, str] | None = None,
) -> int:
    """Return the exit code of ``act``: bad input ends in one line and 1. Of several ranks that met it, the first one says it.

    Args:
        over_ranks: whether ``act`` may run on several ranks. What does not never looks at the launcher's variables, which may be
            there in part: in a batch script of Slurm, say.
        of_a_run: ``act`` trains. Any exception then ends in a line, behind its traceback, and this process ends at once: Python's own
            exit would wait for loader workers.
        kept: what Ctrl-C leaves, for the line that says so.
        options: how the arguments of ``act`` are typed, as :func:`dde_ds.cli.parsing.options_of` says.
    """
    rank = 0
    try:
        rank = read_environment().rank if over_ranks else 0
        return act() or 0
    except UserError as error:
        return _leave(error, rank, of_a_run, options or {})
    except KeyboardInterrupt:
        if not rank:
            print(f"stopped by Ctrl-C; {kept}", file=sys.stderr, flush=True)
        return _end(130, of_a_run)
    except Exception as error:  # whatever a library may raise
        if not of_a_run:
            raise
        from dde_ds.distributed.group import is_lost_peer

        if is_lost_peer(error):
            return _leave(
                RankError(f"the connection to another rank was lost: {without_passwords(str(error))[-160:]}"), rank, of_a_run
            )
        traceback.print_exc()
        return _leave(RankError(f"{type(error).__name__}: this is a bug; please report it with the lines above"), rank, of_a_run)


def _leave(error: UserError, rank: int, at_once: bool, options: Mapping[str, str] = MappingProxyType({})) -> int:
    reported = isinstance(error, OtherRankError)
    if rank and not isinstance(error, RankError) and not reported:
        # Most likely all ranks met it and the first one reports it: the launcher then ends this one while it sleeps, or did before.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        reported = asked()
        if not reported:
            time.sleep(10)
    if not reported:
        print(f"error{f' (rank {rank})' if rank else ''}: {with_options(str(error), options)}", file=sys.stderr, flush=True)
    return _end(1, at_once)


def _end(code: int, at_once: bool) -> int:
    """Return ``code``, or end this process with it where it must not wait, or has met other ranks: what runs at exit may wait for these."""
    torch = sys.modules.get("torch")
    if at_once or (torch and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        os._exit(code)
    return code
