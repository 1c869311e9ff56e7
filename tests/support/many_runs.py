"""Do several runs, one after another, in the same ranks.

This saves time: importing, and joining the process group, cost more than four steps of a tiny model.

    deepspeed tests/support/many_runs.py --runs runs.json --outcomes outcomes.json

:func:`tests.support.launching.launch_many` starts this script. Each run is what ``launchers/train.py`` does, from its configuration
to its exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dde_ds.config import load_config
from dde_ds.distributed.environment import read_environment
from dde_ds.distributed.process import end_process
from dde_ds.errors import UserError
from dde_ds.training.loop import train


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--outcomes", type=Path, required=True)
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()
    outcomes = [one(run) for run in json.loads(args.runs.read_text())]
    if read_environment().is_main:
        args.outcomes.write_text(json.dumps(outcomes))
    return 0


def one(run: dict) -> dict:
    """Do one run on this rank. Return its exit code, its printed lines, and the errors of all ranks.

    An exception that is no :class:`UserError` ends the process. All ranks must meet an error together, as they do when they agree
    on it. Otherwise a rank would go on to the next run while the other ranks wait in this one.
    """
    printed, code, error = io.StringIO(), 1, None
    try:
        with contextlib.redirect_stdout(printed):
            code = train(load_config(run["config"], run["overrides"]), run["resume"])
    except UserError as caught:
        error = str(caught)
    except BaseException:
        print(f"in {run}\n{printed.getvalue()}", file=sys.stderr)
        traceback.print_exc()
        raise
    gc.collect()  # engines and the hooks on their modules refer to each other
    errors = [error]
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors *= dist.get_world_size()
        dist.all_gather_object(errors, error)
    return {"code": code, "errors": errors, "stdout": printed.getvalue()}


if __name__ == "__main__":
    end_process(main())
