"""Real launches with a precomputed reference instead of the reference give the same losses to the last bit."""

from __future__ import annotations

import subprocess

import pytest
import safetensors.torch

from tests.conftest import ROOT
from tests.support.launching import PATIENCE, Outcome, Run, environment, launch_many, launcher, rows, write_config

pytestmark = pytest.mark.slow


def losses(outcome: Outcome, run) -> list[float]:
    assert outcome.code == 0, outcome.errors
    found = [row["loss"] for row in rows(run)]
    assert len(set(found)) == 4, "a run that learns nothing would agree as well"
    return found


def test_the_same_losses_without_a_reference(tmp_path, sd_model, sd_shards):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)

    def run(name: str, precomputed: str | None, *more: str) -> Run:
        return Run(
            config,
            [f"output={tmp_path / name}", f"reference.precomputed={tmp_path / precomputed if precomputed else 'null'}", *more],
        )

    writes, reads = launch_many([run("writes", "trained"), run("reads", "trained")])
    assert losses(reads, tmp_path / "reads") == losses(writes, tmp_path / "writes")
    assert "reference errors into" in writes.stdout
    assert "no reference" in reads.stdout

    # The forward-only pass finds the same bits.
    command = [
        *launcher(2),
        "--module",
        "dde_ds.cli",
        "precompute-reference",
        str(config),
        f"reference.precomputed={tmp_path / 'forward'}",
    ]
    forward = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert "32 of 32 pairs were missing" in forward.stdout, forward.stderr[-3000:]
    trained, forward = (safetensors.torch.load_file(tmp_path / name)["errors"] for name in ("trained", "forward"))
    assert trained.shape == (32, 2) and trained.equal(forward)

    # One rank reads what two wrote. What only weighs the errors may differ; further steps load the reference, and take what is known.
    other = run("other", "forward", "objective.beta=100", "objective.name=uniform", "batch.micro_batch_size=4", "steps=5")
    model, alone, other = launch_many([run("model", None), run("alone", "forward"), other], ranks=1)
    assert losses(alone, tmp_path / "alone") == losses(model, tmp_path / "model")
    assert "no reference" in alone.stdout
    assert other.code == 0, other.errors
    grown = safetensors.torch.load_file(tmp_path / "forward")["errors"]
    assert grown.shape == (40, 2) and grown.isfinite().all() and grown[:32].equal(trained)
