"""One run at a time in a folder: who holds a lock, who may take it over, and that of many who try one gets it."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dde_ds.errors import RankError, UserError
from dde_ds.training import lock as lock_py
from dde_ds.training.lock import lock


def silent(line: str) -> None:
    pass


def left_behind(path: Path, age: float = 0.0, **changes) -> bytes:
    """A lock as another process would have left it, ``age`` seconds ago."""
    content = json.dumps(lock_py._myself() | changes).encode()
    path.write_bytes(content)
    os.utime(path, (time.time() - age, time.time() - age))
    return content


def test_held_and_released(tmp_path):
    path = tmp_path / "run.lock"
    with lock(path, "output runs/first", silent):
        with pytest.raises(UserError) as caught, lock(path, "output runs/first", silent):
            pass
        expected = (
            f"by process {os.getpid()} on {socket.gethostname()}; stop it by a file named STOP there, or choose another folder"
        )
        assert str(caught.value).startswith("output runs/first: a run is going on there, started ")
        assert str(caught.value).endswith(expected)
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), lock(path, "output", silent):
        raise KeyError
    assert not list(tmp_path.iterdir())


HOLDS = """
import sys, time
from pathlib import Path
from dde_ds.training.lock import lock
with lock(Path(sys.argv[1]), "output", print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_holder_keeps_nobody_out(tmp_path):
    """On its own machine it is known to be dead at once, even while it waits to be buried."""
    path = tmp_path / "run.lock"
    process = subprocess.Popen([sys.executable, "-c", HOLDS, path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"by process {process.pid} on"), lock(path, "output", silent):
            pass
    finally:
        process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    said = []
    with lock(path, "output", said.append):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()
    process.communicate()
    assert not said
    assert not list(tmp_path.iterdir())


def test_a_process_id_that_came_again_is_another_process(tmp_path):
    left_behind(tmp_path / "run.lock", ticks="1")
    with lock(tmp_path / "run.lock", "output", silent):
        pass


@pytest.mark.parametrize("elsewhere", [{"machine": "another"}, {"processes": "pid:[1]"}], ids=["host", "container"])
def test_elsewhere_the_age_tells(tmp_path, monkeypatch, elsewhere):
    """Also where the other container has this one's host name and process id."""
    path = tmp_path / "run.lock"
    left_behind(path, lock_py.STALE_AFTER + 5, **elsewhere)
    with lock(path, "output", silent):
        pass
    monkeypatch.setattr(lock_py, "STALE_AFTER", 3.0)
    left_behind(path, 0, host="node7", **elsewhere)
    said, began = [], time.monotonic()
    with lock(path, "output", said.append):
        assert 2.5 < time.monotonic() - began < 30
    assert len(said) == 1
    assert f"locked by process {os.getpid()} on node7; looking for up to 3 s" in said[0]


def test_a_holder_elsewhere_that_renews_its_lock_lives(tmp_path, monkeypatch):
    path = tmp_path / "run.lock"
    monkeypatch.setattr(lock_py, "RENEWED_EVERY", 0.2)
    with lock(path, "output", silent) as held:
        monkeypatch.setattr(lock_py, "_here", lambda: ("another", ""))
        began = time.monotonic()
        with pytest.raises(UserError, match="a run is going on there"), lock(path, "output", silent):
            pass
        assert time.monotonic() - began < lock_py.STALE_AFTER / 2
        held.check()


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"pid": "x", "host": 3}', b"\xff", b"[" * 100_000])
def test_a_lock_that_says_nothing_is_judged_by_its_age(tmp_path, monkeypatch, content):
    path = tmp_path / "run.lock"
    path.write_bytes(content)
    os.utime(path, (0, 0))
    with lock(path, "output", silent):
        pass
    assert not list(tmp_path.iterdir())


def test_who_lost_the_lock_ends_and_leaves_the_other_one(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_py, "RENEWED_EVERY", 0.05)
    path = tmp_path / "run.lock"
    with lock(path, "output", silent) as held:
        path.unlink()  # by hand: it is made again
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        held.check()
        other = left_behind(path, host="node7")
        while not held._taken and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(RankError, match="another run has taken this folder over"):
            held.check()
    assert path.read_bytes() == other


def contend(path: Path, start, end, wins) -> None:
    start.wait(60)
    try:
        with lock(path, "output", silent):
            wins.append(os.getpid())
            end.wait(60)  # held until all have tried
    except UserError:
        end.wait(60)


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_wins(tmp_path, stale):
    processes = multiprocessing.get_context("fork")
    with processes.Manager() as manager:
        for turn in range(5):
            path = tmp_path / f"{turn}.lock"
            if stale:
                left_behind(path, ticks="1")
            start, end, wins = manager.Barrier(8), manager.Barrier(8), manager.list()
            contenders = [processes.Process(target=contend, args=(path, start, end, wins)) for _ in range(8)]
            for process in contenders:
                process.start()
            for process in contenders:
                process.join(60)
            assert [process.exitcode for process in contenders] == [0] * 8
            assert len(wins) == 1
            assert not list(tmp_path.iterdir())
