"""The deepspeed launcher, which takes signals for itself: its ranks find out."""

from __future__ import annotations

import signal
import subprocess
import time

import psutil
import pytest

from dde_ds.engine import checkpoint
from tests.conftest import ROOT
from tests.support.launching import PATIENCE, command, environment, rows, wait_for_rows, write_config

pytestmark = pytest.mark.launch


@pytest.mark.parametrize(("outer", "number"), [(True, signal.SIGTERM), (False, signal.SIGKILL)])
def test_ranks_whose_launcher_is_gone_save_and_end(tmp_path, sd_model, sd_shards, outer, number):
    """TERM to the process that a user started, or KILL to the one below it, which is the ranks' parent."""
    run = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    arguments = ("steps=5000", "optimizer.learning_rate=1e-5", "data.workers=1")
    process = subprocess.Popen(
        command(config, *arguments), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_rows(run, 1, process)
    inner, *below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 4  # two ranks and their loaders
    (process if outer else inner).send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)  # until all that inherited its end of the pipe are gone
    deadline = time.monotonic() + 60
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in (inner, *below)):
        assert time.monotonic() < deadline, output
        time.sleep(0.1)
    assert f"stopped after step {len(rows(run))} as asked" in output
    (newest,) = checkpoint.list_checkpoints(run / "checkpoints")
    assert checkpoint.step_of(newest) == len(rows(run))
    assert checkpoint.damage(newest) is None
