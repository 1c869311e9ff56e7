"""The ranks of one node, as processes that live and end together.

TERM, INT and USR1 reach all of them as a request to stop, one that crashes takes the others along, and none outlives this process.
Exit code 75, stopped and resumable, comes through, which torchrun turns into 1 and the deepspeed launcher loses when it is sent TERM
itself.
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
# Seconds that the other ranks get to end by themselves after the first one did, and then to die of TERM.
TOGETHER, DYING = 60.0, 10.0
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Node:
    """Number ``number`` of ``nodes``, with ``ranks`` ranks of its own. All meet at ``address``:``port``."""

    nodes: int
    number: int
    ranks: int
    address: str
    port: int


def run_node(node: Node, command: Sequence[str]) -> int:
    """Start ``command`` once a rank, and return the worst of the exit codes: an error, 75, or 0."""
    with listening() as asked:
        return watch([start_rank(node, local, command) for local in range(node.ranks)], asked)


def visible_gpus() -> int:
    """GPUs that PyTorch would use, without waking them in this process."""
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def start_rank(node: Node, local: int, command: Sequence[str]) -> subprocess.Popen:
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
