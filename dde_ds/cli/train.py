"""``dde-ds train`` aligns a model; ``dde-ds precompute-reference`` computes the reference's errors for it ahead of time.

``launchers/train.py`` calls ``dde-ds train``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from typing import Any

from dde_ds.cli.node import OPTIONS, add_node_options, flag, node_of
from dde_ds.config import load_config
from dde_ds.distributed.environment import launched
from dde_ds.errors import UserError
from dde_ds.training.node import run_node
from dde_ds.training.signals import asked

STOPPED, JOINING = 75, 30.0
DESCRIPTION = """Align a diffusion model with preference pairs.

    dde-ds train run.yaml output=runs/first --resume auto
    deepspeed --module dde_ds.cli train run.yaml output=runs/first

Without a launcher it starts one rank for each GPU of this machine; under deepspeed, torchrun, srun or mpirun it is one rank.
Exit code 0: done. 75: stopped as asked and resumable. 1: an error, in one line.
"""


def add_commands(commands: Any) -> None:
    train = commands.add_parser("train", help="align a model, on all GPUs of this machine or as one rank", description=DESCRIPTION)
    train.set_defaults(act=run_training, parser=train, report={"over_ranks": True, "of_a_run": True})
    train.add_argument("--config", metavar="CONFIG", dest="config", help="the same as CONFIG, under its other name")
    train.add_argument(
        "overrides", nargs="*", metavar="CONFIG key.sub=value", help="YAML of a run, and values that replace its own"
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const="required",
        metavar="auto",
        help="go on from the newest checkpoint of the output folder; with 'auto', start anew where there is none",
    )
    train.add_argument("--one-rank", action="store_true", help="start no ranks: this process is one, whatever GPUs there are")
    add_node_options(train.add_argument_group("where no launcher started it"))

    precomputed = commands.add_parser(
        "precompute-reference", help="write the reference's errors for a run, and runs like it, without training"
    )
    precomputed.set_defaults(act=precompute_reference, report={"over_ranks": True})
    precomputed.add_argument("config", help="YAML of a run with reference.precomputed")
    precomputed.add_argument("overrides", nargs="*", metavar="key.sub=value")


def run_training(args: argparse.Namespace) -> int:
    """Train as one rank, or start the ranks of this machine and wait for them. Return the exit code: 0, 75 or 1."""
    words, resume = args.overrides, args.resume
    if resume not in (None, "required", "auto"):  # argparse took the word behind --resume for its value
        words, resume = ([*words, resume] if args.config or words else [resume]), "required"
    config, overrides = (args.config, words) if args.config else (words[0] if words else None, words[1:])
    if config is None:
        return args.parser.error("the following arguments are required: CONFIG")
    run = load_config(config, overrides)
    if launched():
        if given := [flag(name) for name in OPTIONS if getattr(args, name) is not None]:
            raise UserError(f"{given[0]}: a launcher has started this rank, and says how many there are; leave it out")
    elif not args.one_rank:
        node = node_of(args)
        if node.nodes * node.ranks > 1:
            start = [sys.executable, "-m", "dde_ds.cli", "train", "--config", config, *overrides]
            return run_node(node, [*start, *(["--resume", resume] if resume == "auto" else ["--resume"] if resume else [])])
    leave_if_asked_before_joining()
    from dde_ds.training.loop import train

    return train(run, resume)


def leave_if_asked_before_joining() -> None:
    """End this process with 75 half a minute after a request to stop, unless it has met the other ranks by then.

    Ranks that have met stop together. But the other ranks may never come, and the call that waits for them does not notice signals.
    So a thread waits for the signal: Python writes a byte into a pipe when one arrives, and the thread reads it. Both ends of the
    pipe stay open as long as the process lives.
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


def precompute_reference(args: argparse.Namespace) -> None:
    from dde_ds.training import precompute_reference

    precompute_reference.precompute_reference(load_config(args.config, args.overrides))
