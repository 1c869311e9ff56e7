"""Align a diffusion model with preference pairs.

    deepspeed launchers/train.py --config launchers/recipes/sdxl_dde.yaml optimizer.learning_rate=1e-8 output=runs/first

Exit code 0: done. 75: stopped as asked and resumable. 1: an error, in one line.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import NoReturn

from dde_ds.config import load_config
from dde_ds.errors import RankError, UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML of a run; launchers/recipes holds commented ones")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replace single values of the configuration")
    parser.add_argument(
        "--resume",
        choices=("required", "auto"),
        nargs="?",
        const="required",
        help="go on from the newest checkpoint of the output folder; with 'auto', start anew where there is none",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    args = parser.parse_intermixed_args()
    rank = int(os.environ.get("RANK", "0"))
    try:
        run = load_config(args.config, args.overrides)
        from dde_ds.training.loop import train

        return train(run, args.resume)
    except UserError as error:
        return leave(error, rank)
    except RuntimeError as error:
        from dde_ds.distributed import is_lost_peer

        if not is_lost_peer(error):
            raise
        return leave(RankError("the connection to another rank was lost; what ended that rank stands in its own message"), rank)


def leave(error: UserError, rank: int) -> NoReturn:
    """Print one line, once, and end this process at once: Python's own exit would wait for ranks in a collective."""
    if rank == 0 or isinstance(error, RankError):
        where = f" (rank {rank})" if rank else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
    else:
        # All ranks met the same error and the first one reports it. The launcher ends every rank as soon as one is gone.
        time.sleep(10)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
