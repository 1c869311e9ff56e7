"""KILL in the middle of a save: to a rank, to the other one, to the process that started them, to all three at once, at every file that
the save touches.

A launch of the product takes ten seconds and a save has dozens of such points. So the ranks here are forked from one process that has
loaded everything, and save the state of a small module under ZeRO-2 by the product's own code.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from dde_ds import NoiseSchedule, build_objective
from dde_ds.engine import checkpoint
from dde_ds.training.node import die_with
from tests.engine.test_checkpoint import engine, train
from tests.support.launching import RANK_VARIABLES, free_port

pytestmark = pytest.mark.slow
EVENTS = ("os.mkdir", "open", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree")
VICTIMS = ("rank 0", "rank 1", "launcher", "everything")
PR_SET_CHILD_SUBREAPER = 36
LOST_PEER = 7


def rank_process(rank: int, port: int, folder: Path, kill_at: int, victims: list[int]) -> None:
    """Resume what is there, train a step, and save, keeping one checkpoint. When the first rank touches a checkpoint file for the
    ``kill_at``-th time in the save, it kills the processes ``victims``, the last of which may be itself. Leaves 0 after a whole save."""
    signal.alarm(60)  # a hang is a failure, not a wait
    for name, value in zip(RANK_VARIABLES, (rank, 2, rank, "127.0.0.1", port), strict=True):
        os.environ[name] = str(value)
    from dde_ds.distributed.group import is_lost_peer, start

    try:
        start()
        schedule = NoiseSchedule.from_scheduler({"beta_schedule": "squaredcos_cap_v2"})
        policy, objective, first = engine(2, 2), build_objective("dde", schedule), 0
        if found := checkpoint.list_checkpoints(folder):
            checkpoint.load(found[-1], policy, objective)
            first = checkpoint.step_of(found[-1])
        ((loss,), _) = train(policy, objective, range(first, first + 1), rank, 2)
        (folder.parent / f"loss-{first}-{rank}").write_text(repr(loss))
        touched = 0

        def count(name, arguments):
            nonlocal touched
            if rank == 0 and name in EVENTS and "checkpoints" in str(arguments[0]):
                touched += 1
                if touched == kill_at:
                    for victim in victims:
                        os.kill(victim, signal.SIGKILL)

        sys.addaudithook(count)
        checkpoint.save(folder, policy, objective, {"step": first + 1}, keep=1)
        (folder.parent / "modules").write_text("\n".join(sys.modules))
    except Exception as error:
        if is_lost_peer(error):
            os._exit(LOST_PEER)
        traceback.print_exc()
        os._exit(1)
    os._exit(0 if kill_at == 0 or touched < kill_at else LOST_PEER)


def save_in_two_ranks(folder: Path, kill_at: int = 0, victim: str = "") -> bool:
    """A launcher with two ranks, all forked. True if something was killed. None of the three outlives this call."""
    port = free_port()
    launcher = os.fork()
    if launcher == 0:
        libc, parent, ranks = ctypes.CDLL(None), os.getpid(), {}
        for rank in (1, 0):
            pid = os.fork()
            if pid == 0:
                die_with(parent, libc)
                three = {"launcher": parent, "rank 1": ranks.get(1), "rank 0": os.getpid()}
                rank_process(rank, port, folder, kill_at, [three[victim]] if victim in three else list(three.values()))
            ranks[rank] = pid
        ends = [os.waitpid(pid, 0)[1] for pid in ranks.values()]
        os._exit(max(os.waitstatus_to_exitcode(end) % 256 for end in ends))
    ends = {}
    try:
        while True:  # all of them: this process takes over what a killed launcher leaves
            pid, status = os.wait()
            ends[pid] = os.waitstatus_to_exitcode(status)
    except ChildProcessError:
        pass
    assert set(ends.values()) <= {0, LOST_PEER, -signal.SIGKILL, 256 - signal.SIGKILL}, ends
    return ends[launcher] != 0


def kill_everywhere(_, folder: Path, outcomes) -> None:
    """Run in a process without a process group, because a fork from under gloo's threads could not continue."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)

    for _ in range(3):
        assert not save_in_two_ranks(folder)
        # What the ranks loaded is loaded here, once for all that come: three seconds each.
        for name in (folder.parent / "modules").read_text().splitlines():
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    unbroken = losses(folder)
    shutil.rmtree(folder)
    assert not save_in_two_ranks(folder)
    kept = shutil.copytree(folder, folder.parent / "kept")
    for victim, first in zip(VICTIMS, (1, 2, 1, 2), strict=True):
        for event in range(first, 1000, 2):
            shutil.rmtree(folder)
            shutil.copytree(kept, folder)
            if not save_in_two_ranks(folder, event, victim):
                break
            found = checkpoint.list_checkpoints(folder)
            assert found, f"{victim} killed at {event}: no checkpoint is left"
            assert all(checkpoint.damage(path) is None for path in found), f"{victim} killed at {event}"
            outcomes.append((victim, found[-1].name))
            if event % 4 == first:  # the next save clears what this one left, and goes on to the same losses
                for file in folder.parent.glob("loss-*"):
                    file.unlink()
                assert not save_in_two_ranks(folder)
                assert len(list(folder.iterdir())) == 1
                after = losses(folder)
                assert after == pytest.approx({name: unbroken[name] for name in after}, abs=1e-6), f"{victim} killed at {event}"


def losses(folder: Path) -> dict[str, float]:
    """Return the losses by the names of their files, which hold step and rank."""
    return {file.name: float(file.read_text()) for file in folder.parent.glob("loss-*")}


def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """The newest one is whole, the old or the new; the others end too; and what goes on from it has the unbroken run's losses."""
    with mp.Manager() as manager:
        outcomes = manager.list()
        mp.spawn(kill_everywhere, (tmp_path / "checkpoints", outcomes))
        outcomes = list(outcomes)
    points = Counter(victim for victim, _ in outcomes)
    assert all(points[victim] >= 10 for victim in VICTIMS), points
    assert {name for _, name in outcomes} == {"step-00000001", "step-00000002"}
