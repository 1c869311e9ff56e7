"""Align a diffusion model with preference pairs.

    deepspeed launchers/train.py --config launchers/recipes/sdxl_dde.yaml optimizer.learning_rate=1e-8 output=runs/first

Exit code 0: done. 75: stopped as asked and resumable. 1: an error, in one line.
"""

from __future__ import annotations

from dde_ds.training.signals import SIGNALS, asked, listen

if __name__ == "__main__":
    listen()  # before anything is imported that takes its time: a request to stop that comes meanwhile counts

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from typing import NoReturn

from dde_ds import __version__
from dde_ds.config import load_config
from dde_ds.errors import OtherRankError, RankError, UserError
from dde_ds.ranks import end_process, read_environment
from dde_ds.text import without_passwords

STOPPED, JOINING = 75, 30.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dde_ds {__version__}")
    parser.add_argument("--config", required=True, help="YAML of a run; launchers/recipes holds commented ones")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replace single values of the configuration")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="required",
        metavar="auto",
        help="go on from the newest checkpoint of the output folder; with 'auto', start anew where there is none",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    args = parser.parse_intermixed_args()
    if args.resume not in (None, "required", "auto"):  # an override that stood right behind --resume
        args.overrides.append(args.resume)
        args.resume = "required"
    rank = 0
    try:
        rank = read_environment().rank
        run = load_config(args.config, args.overrides)
        leave_if_asked_before_joining()
        from dde_ds.training.loop import train

        return train(run, args.resume)
    except UserError as error:
        leave(error, rank)
    except Exception as error:
        from dde_ds.distributed import is_lost_peer

        if is_lost_peer(error):
            leave(RankError(f"the connection to another rank was lost: {without_passwords(str(error))[-160:]}"), rank)
        traceback.print_exc()
        leave(RankError(f"{type(error).__name__}: this is a bug; please report it with the lines above"), rank)


def leave_if_asked_before_joining() -> None:
    """Have this process leave with 75, half a minute after it was asked to stop, if it has not met the other ranks by then.

    Ranks that have met stop together. But the others may never come, and the call that waits for them hears of no signal: a thread
    does, to which the system writes through a pipe. Both ends stay open as long as the process.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def wait() -> None:
        if not asked():
            os.read(heard, 1)
        time.sleep(JOINING)
        torch = sys.modules.get("torch")
        if not (torch and torch.distributed.is_initialized()):
            print("stopped as asked before the ranks had met; go on with --resume auto", flush=True)
            os._exit(STOPPED)

    threading.Thread(target=wait, daemon=True).start()


def leave(error: UserError, rank: int) -> NoReturn:
    """Print one line and end this process at once: Python's own exit would wait for loader workers and for collectives."""
    reported = isinstance(error, OtherRankError)
    if rank != 0 and not isinstance(error, RankError):
        # Most likely all ranks met it and the first one reports it: the launcher then ends this one while it sleeps, or did before.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        reported = reported or asked()
        if not reported:
            time.sleep(10)
    if reported:
        os._exit(1)
    where = "" if rank == 0 else f" (rank {rank})"
    print(f"error{where}: {error}", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    end_process(main())
