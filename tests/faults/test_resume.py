"""Resume in bad run folders: with an unreadable checkpoint, damaged rows, or files that cannot be written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dde_ds.engine import checkpoint
from dde_ds.rows import read_rows
from tests.support.fault_injection import Leg, run_legs
from tests.support.launching import rows, write_config

pytestmark = pytest.mark.slow


def harm(run: Path) -> list[str]:
    """After each leg: what the next one is to meet. Returns the names in checkpoints/ as the leg left them."""
    found = sorted(path.name for path in (run / "checkpoints").iterdir())
    table = run / "checkpoints" / "step-00000003" / checkpoint.TABLE
    kept = run / "kept"
    if run.name == "stopped" and not kept.exists():
        table.rename(kept)
        table.mkdir()
    elif table.is_dir():
        table.rmdir()
        shutil.copy(kept, table)
        for name in ("metrics.jsonl", "correction.jsonl", "skipped.jsonl"):
            with (run / name).open("ab") as file:
                file.write(b'\n\0\0\0\n{"step": 2, "lo{"step"\n')
        (run / "heartbeat").unlink()
        (run / "heartbeat").mkdir()
        shutil.rmtree(run / "samples")
        (run / "samples").write_text("in the way")
    return found


def test_an_error_of_reading_ends_a_resume_and_the_rest_does_not(tmp_path, sd_model, sd_shards, capfd):
    """Two ranks, stopped in the middle of a row: it averages over the steps before the resume too, as in the run that was not stopped."""
    samples = {"prompts": ["dagger"], "inference_steps": 1, "every": 3}
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards, steps=6, log={"every": 4}, samples=samples)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    legs = [
        Leg([f"output={whole}"]),
        Leg([f"output={stopped}"], signal_in=("draw", 2)),
        Leg([f"output={stopped}"], "required"),
        Leg([f"output={stopped}"], "auto"),
    ]
    (_, first, second, third) = run_legs(config, legs, look_at=harm)
    assert first == (75, ["step-00000003"])
    assert "step-00000003: objective.safetensors could not be read: not a regular file; nothing was deleted: mend it" in second[0]
    assert second[1] == ["step-00000003"]
    assert third[0] == 0
    assert (stopped / "DONE").exists()

    pairs = list(zip(rows(whole), rows(stopped), strict=True))
    assert [row["step"] for row, _ in pairs] == [4, 6]
    for expected, found in pairs:
        trained = {key: value for key, value in expected.items() if not key.startswith(("perf/", "data/"))}
        assert {key: found[key] for key in trained} == pytest.approx(trained, rel=1e-5, abs=1e-7)
    assert [row["step"] for row in read_rows(stopped / "correction.jsonl")] == [4, 6]

    said = [
        line.removeprefix(f"warning: {stopped}/") for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")
    ]
    lost = [f"{name}.jsonl: 3 damaged lines are left out" for name in ("correction", "metrics", "skipped")]
    heartbeat, pictures = sorted(set(said) - set(lost))
    assert len(said) == 5
    assert heartbeat.startswith("heartbeat could not be written: Is a directory; ")
    assert pictures.startswith(f"warning: pictures in {stopped}/samples could not be saved: ")
