"""Start one node's ranks of a run, in a container say, and end with their exit code.

    python launchers/node.py --config launchers/recipes/sdxl_dde.yaml --resume auto output=runs/first
    python launchers/node.py --nodes 2 --node-rank 1 --address node0 --config …

What is not known here goes to launchers/train.py. The ranks of a node live and end together: TERM, INT and USR1 reach all of them as
a request to stop, one that crashes takes the others along, and none outlives this process. Exit code 75, stopped and resumable,
comes through, which torchrun turns into 1 and the deepspeed launcher loses when it is sent TERM itself.

Defaults come from PET_NNODES, PET_NODE_RANK, PET_NPROC_PER_NODE, PET_MASTER_ADDR and PET_MASTER_PORT, as Kubeflow Trainer sets them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dde_ds.errors import UserError
from dde_ds.ranks import DEFAULT_PORT, free_port, valid_host
from dde_ds.training.signals import SIGNALS, listening

STOPPED = 75
# Seconds that the other ranks get to end by themselves after the first one did, and then to die of TERM.
TOGETHER, DYING = 60.0, 10.0
PR_SET_PDEATHSIG = 1


def main(arguments: list[str] | None = None) -> int:
    with listening() as asked:
        try:
            args, train = read_arguments(sys.argv[1:] if arguments is None else arguments)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        ranks = [start_rank(args, local, train) for local in range(args.ranks)]
        return watch(ranks, asked)


def read_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and what is meant for train.py.

    Raises:
        UserError: a number out of its range, a malformed host, or an address missing on several nodes.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for option, variable, default, help_text in (
        ("--nodes", "PET_NNODES", "1", "number of nodes"),
        ("--node-rank", "PET_NODE_RANK", "0", "which of them this is"),
        ("--ranks", "PET_NPROC_PER_NODE", "auto", "ranks of this node; auto: one a GPU, or one"),
        ("--address", "PET_MASTER_ADDR", "127.0.0.1", "host of node 0"),
        ("--port", "PET_MASTER_PORT", "auto", f"free port there; auto: {DEFAULT_PORT}, or on one node any that is free"),
    ):
        parser.add_argument(option, default=os.environ.get(variable, default), help=help_text)
    args, train = parser.parse_known_args(arguments)
    args.ranks = str(visible_gpus() or 1) if args.ranks in ("auto", "gpu") else args.ranks
    if args.port == "auto":
        args.port = str(free_port() if args.nodes == "1" else DEFAULT_PORT)
    for name, low, high in (("nodes", 1, 10**6), ("node_rank", 0, 10**6), ("ranks", 1, 1024), ("port", 1, 65535)):
        text = getattr(args, name)
        if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
            raise UserError(f"--{name.replace('_', '-')} {text!r}: expected a whole number, {low} to {high}")
        setattr(args, name, int(text))
    if args.node_rank >= args.nodes:
        raise UserError(f"--node-rank {args.node_rank}: nodes are numbered from 0 to {int(args.nodes) - 1}")
    if not valid_host(args.address):
        raise UserError(f"--address {args.address!r}: expected a host name or an IP address")
    return args, train


def visible_gpus() -> int:
    """GPUs that PyTorch would use, without waking them in this process."""
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def start_rank(args: argparse.Namespace, local: int, train: list[str]) -> subprocess.Popen:
    environment = os.environ | {
        "RANK": str(args.node_rank * args.ranks + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(args.nodes * args.ranks),
        "LOCAL_WORLD_SIZE": str(args.ranks),
        "MASTER_ADDR": args.address,
        "MASTER_PORT": str(args.port),
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    libc, parent = ctypes.CDLL(None), os.getpid()
    command = [sys.executable, str(Path(__file__).with_name("train.py")), *train]
    # A session of its own: Ctrl-C in a terminal reaches it once, through this process.
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=lambda: die_with(parent, libc))


def die_with(parent: int, libc: ctypes.CDLL) -> None:
    """Have the system kill this process when its parent ends, however that comes about, and keep signals back that it cannot take yet."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it listens: what is passed on before waits there
    if os.getppid() != parent:  # it went before the line above
        os._exit(1)


def watch(ranks: list[subprocess.Popen], asked: list[int]) -> int:
    """Pass requests to stop on, wait for all ranks, and return the worst of their exit codes: an error, 75, or 0."""
    first_end, termed = None, False
    while None in [rank.poll() for rank in ranks]:  # all are asked: one that ended must not hide behind one that hangs
        while asked:
            asked.pop()
            send(ranks, signal.SIGUSR1)
        if first_end is None and any(rank.returncode is not None for rank in ranks):
            first_end = time.monotonic()
        waited = 0.0 if first_end is None else time.monotonic() - first_end
        if waited > TOGETHER + DYING:
            send(ranks, signal.SIGKILL)
        elif waited > TOGETHER and not termed:
            print("error: one rank ended and others did not: ending them", file=sys.stderr, flush=True)
            send(ranks, signal.SIGTERM)
            termed = True
        time.sleep(0.1)
    codes = [rank.returncode for rank in ranks]
    errors = [code for code in codes if code not in (0, STOPPED)]
    if errors:
        return next((code for code in errors if code > 0), 128 - errors[0])  # killed by signal n: 128 + n, as shells have it
    return STOPPED if STOPPED in codes else 0


def send(ranks: list[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
