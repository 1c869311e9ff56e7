"""Real launches with a ledger in the place of the reference: the same losses to the last bit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import safetensors.torch

from tests.conftest import ROOT
from tests.launching import LAUNCHER, alone, environment, free_port, launch, rows, write_config

pytestmark = pytest.mark.slow

# launchers/train.py, telling of every UNet that is loaded.
COUNTING = """
import runpy, sys
from dde_ds.models import unet
real = unet.load_unet
unet.load_unet = lambda *given: (print("loads a UNet", flush=True), real(*given))[1]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def losses(process: subprocess.CompletedProcess, run) -> list[float]:
    assert process.returncode == 0, process.stderr[-3000:]
    found = [row["loss"] for row in rows(run)]
    assert len(set(found)) == 4, "a run that learns nothing would agree as well"
    return found


def test_the_same_losses_without_a_reference(tmp_path, sd_model, sd_shards):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)

    def arguments(name: str, ledger: str) -> tuple[str, str]:
        return f"output={tmp_path / name}", f"reference.ledger={tmp_path / ledger}"

    expected = losses(launch(config, *arguments("writes", "trained")), tmp_path / "writes")
    module = ("--num_gpus", "2", "--master_port", str(free_port()), "--module", "dde_ds.cli", "ledger", config)
    forward = subprocess.run(
        [LAUNCHER, *module, *arguments("unused", "forward")],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "32 of 32 pairs were missing" in forward.stdout, forward.stderr[-3000:]
    trained, forward = (safetensors.torch.load_file(tmp_path / name)["errors"] for name in ("trained", "forward"))
    assert trained.shape == (32, 2) and trained.equal(forward)

    read = launch(config, *arguments("reads", "forward"))
    assert losses(read, tmp_path / "reads") == expected
    assert "no reference" in read.stdout

    expected = losses(alone(config, f"output={tmp_path / 'model'}"), tmp_path / "model")
    counted = [sys.executable, "-c", COUNTING, ROOT / "launchers" / "train.py", "--config", config]
    read = subprocess.run(
        [*counted, *arguments("alone", "forward")], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert losses(read, tmp_path / "alone") == expected
    assert read.stdout.count("loads a UNet") == 1, "the policy alone"

    # What only weighs the errors may differ. Further steps load the reference again, take what is known, and add the rest.
    other = ("objective.beta=100", "objective.name=uniform", "batch.micro=4", "steps=5")
    process = alone(config, *arguments("other", "forward"), *other)
    assert process.returncode == 0, process.stderr[-3000:]
    grown = safetensors.torch.load_file(tmp_path / "forward")["errors"]
    assert grown.shape == (40, 2) and grown.isfinite().all() and grown[:32].equal(trained)
