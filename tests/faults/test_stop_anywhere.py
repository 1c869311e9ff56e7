"""A request to stop that comes in a drawing or in a look at the held-out pairs: it ends there, nothing trained is lost, and what was cut
off is made up for."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dde_ds import load_config
from dde_ds.engine import checkpoint
from dde_ds.rows import read_rows
from tests.conftest import DEMO, shard
from tests.support.fault_injection import Leg, run_legs
from tests.support.launching import rows, shipped, write_config
from tests.support.reference_loop import plain_losses

pytestmark = pytest.mark.slow


def contents(run: Path) -> tuple:
    """Newest checkpoint, steps with a loss, steps with a look, drawings."""
    found = read_rows(run / "metrics.jsonl")  # none before the first row
    return (
        max((checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run / "checkpoints")), default=0),
        [row["step"] for row in found if "loss" in row],
        [row["step"] for row in found if "eval/loss" in row],
        sorted(int(path.stem.removeprefix("step-")) for path in (run / "samples").glob("*.png")),
    )


def test_in_a_drawing_and_in_a_look(tmp_path, sd_model, sd_shards):
    """Signal rank 1 alone, under ZeRO-3, where a rank that stopped alone would leave the others hanging."""
    pq.write_table(pq.read_table(DEMO / "pairs" / "held_out.parquet").slice(20, 4), tmp_path / "held_out.parquet")
    held_out = shard(tmp_path / "held_out.parquet", sd_model, tmp_path / "held_out")
    config = write_config(
        tmp_path / "run.yaml",
        sd_model,
        sd_shards,
        samples={"prompts": ["dagger"], "inference_steps": 3, "every": 2},
        evaluation={"path": str(held_out), "every": 1},
        deepspeed=shipped(tmp_path, "zero3").removeprefix("deepspeed="),
    )
    legs = {
        Leg(signal_in=("_predicted", 1)): (75, 0, [], [], []),  # at the base, with which each launch begins
        Leg(resume="auto", signal_in=("draw", 2)): (75, 2, [1, 2], [1, 2], [0]),  # after step 2
        Leg(resume="auto", signal_in=("_predicted", 2)): (75, 3, [1, 2, 3], [1, 2], [0, 2]),  # after step 3
        Leg(resume="auto", signal_in=("draw", 1)): (75, 4, [1, 2, 3, 4], [1, 2, 3, 4], [0, 2]),  # after all training
        Leg(resume="auto"): (0, 4, [1, 2, 3, 4], [1, 2, 3, 4], [0, 2, 4]),
    }
    found = [(code, *state) for code, state in run_legs(config, list(legs), look_at=contents)]
    assert found == list(legs.values())
    run = tmp_path / "run"
    assert (run / "DONE").exists()
    losses = [row["loss"] for row in rows(run) if "loss" in row]
    assert losses == pytest.approx(plain_losses(load_config(config)), abs=1e-5)
    assert "| eval/loss |" in (run / "export" / "README.md").read_text()
