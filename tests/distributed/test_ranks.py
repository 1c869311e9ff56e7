"""Ranks that no launcher of DeepSpeed's started: two real processes, a lost one, and a run out of time."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from dde_ds import load_config
from tests.conftest import ROOT
from tests.support.launching import PATIENCE, alone, environment, free_port, rows, wait_for_rows, write_config
from tests.support.reference_loop import plain_losses

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path, sd_model, sd_shards):
    return write_config(tmp_path / "run.yaml", sd_model, sd_shards)


def slurm_task(rank: int, config, *arguments, world: int = 2, port: int) -> subprocess.Popen:
    """One process with what srun would tell it."""
    variables = {
        **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(world), "SLURM_NTASKS": str(world)},
        **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)},
    }
    command = [sys.executable, ROOT / "launchers" / "train.py", "--config", config, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_slurm_tasks(config, tmp_path):
    port = free_port()
    tasks = [slurm_task(rank, config, port=port) for rank in range(2)]
    outputs = [task.communicate(timeout=PATIENCE) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert (tmp_path / "run" / "DONE").exists()
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx(plain_losses(load_config(config)), abs=1e-5)
    beat = json.loads((tmp_path / "run" / "heartbeat").read_text())
    assert 0 <= beat["step"] <= 4
    assert abs(beat["time"] - time.time()) < 300


def test_a_silent_rank_ends_the_others(config, tmp_path):
    """Stopped, not killed: its connections stay open, as those of a node that lost its power. Only the timeout can tell."""
    port = free_port()
    arguments = ("steps=100000", "optimizer.learning_rate=1e-6", "timeout_minutes=0.25")
    tasks = [slurm_task(rank, config, *arguments, port=port) for rank in range(2)]
    try:
        wait_for_rows(tmp_path / "run", 2, *tasks)
        tasks[1].send_signal(signal.SIGSTOP)
        _, stderr = tasks[0].communicate(timeout=PATIENCE)  # gloo's own default is half an hour
    finally:
        tasks[1].kill()
        tasks[1].communicate()
    assert tasks[0].returncode == 1
    (line,) = [line for line in stderr.splitlines() if line.startswith("error")]
    assert "connection to another rank was lost" in line
    assert "Traceback" not in stderr
    assert not (tmp_path / "run" / "DONE").exists()


def test_ranks_that_never_come(config, tmp_path):
    task = slurm_task(0, config, "timeout_minutes=0.05", port=free_port())
    _, stderr = task.communicate(timeout=PATIENCE)
    assert task.returncode == 1
    (line,) = [line for line in stderr.splitlines() if line.startswith("error")]
    assert "rank 0 of 2 did not meet the others at localhost:" in line
    assert "Traceback" not in stderr
    assert not (tmp_path / "run").exists()


def test_a_partial_environment_is_one_line(config, tmp_path):
    command = [sys.executable, ROOT / "launchers" / "train.py", "--config", config]
    process = subprocess.run(
        command, cwd=ROOT, env=environment() | {"WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert process.returncode == 1
    assert process.stderr.strip() == (
        "error: environment: RANK, LOCAL_RANK not set beside WORLD_SIZE=2; start with deepspeed, torchrun or srun"
    )


def test_out_of_time_and_resumed(config, tmp_path):
    run = tmp_path / "run"
    stopped = alone(config, "max_hours=1e-9")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    assert "stopped as asked before a step was made" in stopped.stdout
    assert not (run / "DONE").exists()
    assert alone(config, "--resume", "auto").returncode == 0
    assert [row["loss"] for row in rows(run)] == pytest.approx(plain_losses(load_config(config)), abs=1e-5)


def test_a_port_that_is_taken_is_named_at_once(config, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        task = slurm_task(0, config, port=port)
        _, stderr = task.communicate(timeout=PATIENCE)
    assert task.returncode == 1
    (line,) = [line for line in stderr.splitlines() if line.startswith("error")]
    assert line.startswith(
        f"error: TCP port {port} on localhost is taken, by another run maybe: choose a free one, with --master_port"
    )
    assert not (tmp_path / "run").exists()
