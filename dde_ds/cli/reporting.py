"""The one place where an error becomes one line of text and an exit code."""

from __future__ import annotations

import errno
import os
import select
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
from dde_ds.warn import reason

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def report_errors(
    act: Callable[[], int | None],
    over_ranks: bool = True,
    of_a_run: bool = False,
    kept: str = "what is whole is kept",
    options: Mapping[str, str] | None = None,
) -> int:
    """Call ``act`` and return its exit code. Bad input is reported in one line and gives exit code 1.

    If several ranks meet the same error, rank 0 reports it.

    Args:
        over_ranks: whether ``act`` may run on several ranks. If not, the launcher's variables are not read, because only some of
            them may be set: in a batch script of Slurm, for example.
        of_a_run: whether ``act`` trains. Then any other exception is reported too, by its traceback and one line; a lost rank is
            reported without a traceback. The process ends at once, because Python's own exit would wait for loader workers.
        kept: the words that say what Ctrl-C leaves behind.
        options: the options by argument name, from :func:`dde_ds.cli.parsing.options_of`.
    """
    rank = 0
    try:
        rank = read_environment().rank if over_ranks else 0
        code = act() or 0
        if not of_a_run:  # which goes on without its output, and has its own end
            sys.stdout.flush()  # here, where it can still be answered for
        return code
    except UserError as error:
        return _leave(error, rank, of_a_run, options or {})
    except KeyboardInterrupt:
        if not rank:
            print(f"stopped by Ctrl-C; {kept}", file=sys.stderr, flush=True)
        return _end(130, of_a_run)
    except Exception as error:  # a library may raise anything
        if isinstance(error, OSError) and error.errno in FULL:  # anything that writes may meet it: no bug
            named = f"{error.filename}: " if error.filename else ""
            try:
                sys.stdout.flush()
            except OSError:  # it was the output itself, which Python would try to write again
                write_nowhere([1])
            return _leave(RankError(f"{named}{reason(error).lower()}; make room, then start it again"), rank, of_a_run)
        if not of_a_run:
            raise
        if isinstance(error, BrokenPipeError) and (outputs := unread()):
            write_nowhere(outputs)
            return _leave(RankError("nobody reads what this run prints any more (`| head`?); go on with --resume"), rank, of_a_run)
        from dde_ds.distributed.group import is_lost_peer

        if is_lost_peer(error):
            return _leave(
                RankError(f"the connection to another rank was lost: {without_passwords(str(error))[-160:]}"), rank, of_a_run
            )
        traceback.print_exc()
        return _leave(RankError(f"{type(error).__name__}: this is a bug; please report it with the lines above"), rank, of_a_run)


def unread() -> list[int]:
    """Return which of standard output (1) and standard error (2) are pipes that nobody reads any more."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return [number for number, event in poll.poll(0) if event & select.POLLERR]


def write_nowhere(outputs: list[int]) -> None:
    """Let what is still printed there go nowhere: Python's exit would complain that it cannot be written."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in outputs:
        os.dup2(nowhere, number)
    os.close(nowhere)


def _leave(error: UserError, rank: int, at_once: bool, options: Mapping[str, str] = MappingProxyType({})) -> int:
    reported = isinstance(error, OtherRankError)
    if rank and not isinstance(error, RankError) and not reported:
        # Most likely all ranks met this error and rank 0 reports it. The launcher then ends this rank while it sleeps here, or has
        # already asked it to stop.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        reported = asked()
        if not reported:
            time.sleep(10)
    if not reported:
        print(f"error{f' (rank {rank})' if rank else ''}: {with_options(str(error), options)}", file=sys.stderr, flush=True)
    return _end(1, at_once)


def _end(code: int, at_once: bool) -> int:
    """Return ``code``, or end this process with it at once.

    The process ends at once if asked to, or if it has joined other ranks: functions that run at exit may wait for those ranks.
    """
    torch = sys.modules.get("torch")
    if at_once or (torch and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        os._exit(code)
    return code
