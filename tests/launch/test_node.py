"""``launchers/node.py``, what containers run: two nodes of one rank each on this machine, and one node of two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dde_ds import load_config
from dde_ds.cli.node import main
from dde_ds.training import node as node_of_ranks
from tests.conftest import ROOT
from tests.support.launching import PATIENCE, environment, free_port, rows, wait_for_rows, write_config
from tests.support.reference_loop import plain_losses

pytestmark = pytest.mark.launch
NODE = ROOT / "launchers" / "node.py"


@pytest.fixture
def config(tmp_path, sd_model, sd_shards):
    return write_config(tmp_path / "run.yaml", sd_model, sd_shards)


def start(config: Path, *arguments, **variables) -> subprocess.Popen:
    command = [sys.executable, NODE, "--config", config, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def test_two_nodes_stopped_by_term_and_resumed(config, tmp_path):
    """TERM to one node, as when its pod is evicted: both end together with 75, and the same command goes on."""
    run, port = tmp_path / "run", str(free_port())

    def both(*arguments):
        # One by options, one by the variables of Kubeflow Trainer.
        first = start(config, "--nodes", "2", "--node-rank", "0", "--ranks", "1", "--port", port, "--resume", "auto", *arguments)
        kubeflow = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1"}
        second = start(config, "--resume", "auto", *arguments, **kubeflow, PET_MASTER_PORT=port)
        return [first, second]

    nodes = both("steps=5000", "optimizer.learning_rate=1e-5")
    wait_for_rows(run, 2, *nodes)
    nodes[1].send_signal(signal.SIGTERM)
    outputs = [node.communicate(timeout=PATIENCE) for node in nodes]
    assert [node.returncode for node in nodes] == [75, 75], outputs
    assert not (run / "DONE").exists()
    arguments = (f"steps={len(rows(run)) + 1}", "optimizer.learning_rate=1e-5")
    nodes = both(*arguments)
    outputs = [node.communicate(timeout=PATIENCE) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert (run / "DONE").exists()
    assert losses(run) == pytest.approx(plain_losses(load_config(config, arguments)), abs=1e-5)


def test_a_killed_rank_takes_the_others_along(config, tmp_path):
    node = start(config, "--ranks", "2", "--port", str(free_port()), "steps=5000", "optimizer.learning_rate=1e-5")
    wait_for_rows(tmp_path / "run", 1, node)
    ranks = ranks_of(node)
    assert len(ranks) == 2
    ranks[1].kill()
    _, stderr = node.communicate(timeout=PATIENCE)
    assert node.returncode == 1, stderr
    assert "error: the connection to another rank was lost" in stderr
    assert not any(rank.is_running() for rank in ranks)


def test_no_orphans(config, tmp_path):
    """KILL to the node's process, which it cannot see coming: its ranks go with it."""
    node = start(config, "--ranks", "2", "--port", str(free_port()), "steps=5000", "optimizer.learning_rate=1e-5", "data.workers=1")
    wait_for_rows(tmp_path / "run", 1, node)
    ranks = psutil.Process(node.pid).children(recursive=True)
    assert len(ranks) >= 4
    os.kill(node.pid, signal.SIGKILL)
    node.communicate()
    deadline = time.monotonic() + PATIENCE
    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
        assert time.monotonic() < deadline, ranks
        time.sleep(0.1)


def test_a_rank_that_hangs_is_ended(monkeypatch):
    """One leaves with an error, the other one does nothing any more, not even die of TERM."""
    monkeypatch.setattr(node_of_ranks, "TOGETHER", 0.5)
    monkeypatch.setattr(node_of_ranks, "DYING", 0.5)
    ranks = [subprocess.Popen([sys.executable, "-c", code]) for code in ("import time; time.sleep(1000)", "raise SystemExit(1)")]
    ranks[0].send_signal(signal.SIGSTOP)
    assert node_of_ranks.watch(ranks, []) == 1
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL, 1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--nodes", "2", "--node-rank", "2"), "--node-rank 2: nodes are numbered from 0 to 1"),
        (("--ranks", "many"), "--ranks 'many': expected a whole number, 1 to 1024"),
        (("--address", "a;reboot"), "--address 'a;reboot': expected a host name"),
        (("--port", "0"), "--port '0': expected a whole number, 1 to 65535"),
    ],
)
def test_wrong_options(arguments, named, capsys):
    assert main([], ["--ranks", "1", *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"error: {named}")
