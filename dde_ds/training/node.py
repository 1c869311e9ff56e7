"""The ranks of one node, as processes that live and end together.

TERM, INT and USR1 reach all ranks as a request to stop. A rank that crashes ends the others too, and no rank outlives this
process. Exit code 75, stopped and resumable, is passed on. torchrun turns 75 into 1, and the deepspeed launcher loses it if
the launcher itself gets TERM.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dde_ds.training.signals import SIGNALS, listening

STOPPED = 75
# Seconds for the other ranks to end by themselves after the first has ended, and then seconds to end after TERM.
TOGETHER, DYING = 60.0, 10.0
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Node:
    """Describe node ``number`` of ``nodes``, with its number of ranks. The ranks of all nodes meet at ``address``:``port``."""

    nodes: int
    number: int
    ranks: int
    address: str
    port: int


def run_node(node: Node, command: Sequence[str]) -> int:
    """Start ``command`` once for each rank. Return the worst of the exit codes: an error, 75, or 0."""
    with listening() as asked:
        return watch([start_rank(node, local, command) for local in range(node.ranks)], asked)


def visible_gpus() -> int:
    """Return the number of GPUs that PyTorch would use. A subprocess counts them, so that this process does not wake them."""
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def start_rank(node: Node, local: int, command: Sequence[str]) -> subprocess.Popen:
    """Start one rank, number ``local`` of this node, with the environment variables that tell it its place."""
    environment = os.environ | {
        "RANK": str(node.number * node.ranks + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(node.nodes * node.ranks),
        "LOCAL_WORLD_SIZE": str(node.ranks),
        "MASTER_ADDR": node.address,
        "MASTER_PORT": str(node.port),
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    libc, parent = ctypes.CDLL(None), os.getpid()
    # The rank has a session of its own. So Ctrl-C in a terminal reaches it once, through this process.
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=lambda: die_with(parent, libc))


def die_with(parent: int, libc: ctypes.CDLL) -> None:
    """Have the system kill this process when its parent ends, for whatever reason. Block signals that this process cannot take
    yet."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until this process listens, signals wait
    if os.getppid() != parent:  # the parent ended before the first line here
        os._exit(1)


def watch(ranks: list[subprocess.Popen], asked: list[int]) -> int:
    """Pass on requests to stop, wait for all ranks, and return the worst of their exit codes: an error, 75, or 0."""
    first_end, termed = None, False
    while None in [rank.poll() for rank in ranks]:  # poll all ranks: one may have ended behind one that hangs
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
        return next((code for code in errors if code > 0), 128 - errors[0])  # killed by signal n: 128 + n, as in shells
    return STOPPED if STOPPED in codes else 0


def send(ranks: list[subprocess.Popen], number: int) -> None:
    """Send a signal to every rank that has not ended."""
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)
