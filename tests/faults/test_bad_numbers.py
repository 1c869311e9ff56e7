"""A loss or gradient that is not finite, on one rank, at one step: all ranks leave the step out together, and the run goes on. Numbers that
are finite and show a model that is being broken: the run says so."""

from __future__ import annotations

import json
import re

import pytest

from dde_ds import load_config
from dde_ds.data.pair_rng import PairRng
from dde_ds.engine import checkpoint
from dde_ds.training.prepare import build_run_objective
from tests.support.fault_injection import Leg, run_legs
from tests.support.launching import rows, shipped, write_config
from tests.support.reference_loop import plain_losses

pytestmark = pytest.mark.slow


def test_skipped_then_too_many_in_a_row_then_resumed(tmp_path, sd_model, sd_shards, capfd):
    """Step 2 is left out for a loss of rank 1, step 4 for a gradient of rank 0; step 5 as well is one too many. The run goes on from
    step 3, at another stage and without the fault, as one that never had steps 4 and 5 but had 2. Three runs more share the launch."""
    config, run = write_config(tmp_path / "run.yaml", sd_model, sd_shards, checkpoint={"every": 1, "keep": 9}), tmp_path / "run"
    broken = Leg(
        ("steps=6", "guards.max_skipped_in_a_row=2", shipped(tmp_path, "zero3")), bad_loss=((1, 2),), bad_gradient=((0, 4), (0, 5))
    )
    nothing = Leg(("steps=1", "ema.decay=0.5", f"output={tmp_path / 'nothing'}"), bad_gradient=((0, 1),))
    breaking = Leg(("optimizer.learning_rate=0.3", "objective.beta=1", "checkpoint.every=4", f"output={tmp_path / 'breaking'}"))
    again = Leg(("steps=6", "guards.max_skipped_in_a_row=2"), "required")
    overflowing = Leg(("steps=1", f"output={tmp_path / 'overflowing'}"), bad_weights=1)
    error, code, unmoved, wrecked, overflowed = run_legs(config, [broken, again, nothing, breaking, overflowing])

    assert error.startswith("step 5: the gradient is not a finite number, timesteps ")
    assert (
        "nothing was trained since step 3, which is guards.max_skipped_in_a_row = 2 steps ago: lower optimizer.learning_rate"
        in error
    )
    assert code == 0
    assert (run / "DONE").exists()
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["guard/skipped_steps"] for row in found] == [0, 1, 1, 1, 1, 1]
    assert ["loss" in row and "grad_norm" in row for row in found] == [True, False, True, True, True, True]
    made = [row["loss"] for row in found if "loss" in row]
    assert made == pytest.approx(plain_losses(load_config(config, ["steps=6"]), skipped={2}), abs=1e-5)
    unbroken = plain_losses(load_config(config, ["steps=6"]))
    assert made != pytest.approx(unbroken[:1] + unbroken[2:], abs=1e-4), "a run that made the step would agree as well"
    # Steps 4 and 5 were run again, so their lines are gone.
    (line,) = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert (line["step"], line["what"], line["ranks"], line["positions"]) == (2, "loss", [1], [14, 15])
    draws = PairRng(0, build_run_objective(load_config(config)).timestep_probabilities)
    assert line["timesteps"] == [draws(position, (2, 4, 8, 8))[0] for position in (14, 15)]
    # A run that made no step has no moving average yet: its export is the base.
    assert unmoved == 0
    assert "moving average" not in (tmp_path / "nothing" / "export" / "README.md").read_text()
    # None was written among skipped steps: it would have pushed the last good ones out.
    assert [path.name for path in checkpoint.list_checkpoints(run / "checkpoints")] == [f"step-0000000{n}" for n in (1, 3, 4, 5, 6)]
    # The last run breaks the model, and says so once, on one rank, when the winners' error has risen by more than a tenth.
    assert wrecked == 0
    drifts = [row["drift/chosen"] / row["error/reference_chosen"] for row in rows(tmp_path / "breaking")]
    assert drifts[0] == 0 and drifts[1:] == sorted(drifts[1:]) and drifts[-1] > 1
    warnings = re.findall(r"warning: step (\d+): winners' error is \d+% above the reference's \(losers'", capfd.readouterr().out)
    assert warnings == ["3"]
    # The gradient of the only step was finite, the weights after it are not: such a model is not given away.
    assert re.match(
        r"export: \d+ of \d+ tensors hold NaN or infinity \(unet\.\S+, unet\.\S+, unet\.\S+, …\); nothing was exported", overflowed
    )
    left = {path.name for path in (tmp_path / "overflowing").iterdir()}
    assert "checkpoints" in left and not left & {"DONE", "export", ".export.staging"}
