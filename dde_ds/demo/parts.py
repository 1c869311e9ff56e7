"""The steps that the demo and the comparison of objectives share: make the shards, and start real ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from dde_ds.errors import UserError
from dde_ds.shipped import demo_file

BASE, TRAIN = str(demo_file("base")), demo_file("train.yaml")
PAIRS = {name: demo_file(f"pairs/{name}.parquet") for name in ("train", "held_out")}


def shard(parquet: Path, model: str, folder: Path) -> None:
    say(f"shards of {parquet.name}")
    command = [sys.executable, "-m", "dde_ds.cli", "shard", "--alone", "--input", parquet, "--model", model, "--output", folder]
    if subprocess.run([*command, "--pairs-per-shard", "128", "--batch", "32"]).returncode:
        raise UserError(f"dde-ds shard did not make {folder}; its own words are above")


def rank_count() -> int:
    """Return the number of ranks: one for each GPU but at most two, or two that share the CPU's cores."""
    return min(2, torch.cuda.device_count()) or 2


def launch(*command: str | Path) -> int:
    """Run a script and its arguments, or ``--module`` and a module, on :func:`rank_count` ranks.

    The deepspeed launcher starts them. Return its exit code.
    """
    ranks = rank_count()
    environment = dict(os.environ)
    if not torch.cuda.device_count():
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Take the launcher that is installed beside this Python, whatever PATH says.
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", str(ranks), "--master_port", str(port), "--quiet"]
    return subprocess.run([*launcher, *command], env=environment).returncode


_STARTED = time.perf_counter()


def say(what: str) -> None:
    print(f"[{time.perf_counter() - _STARTED:5.0f} s] {what}", flush=True)
