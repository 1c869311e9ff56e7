"""The demo's parts, and the whole of it at a fraction of its length."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from tests.conftest import DEMO, ROOT
from tests.support.launching import PATIENCE, environment


def captions(name: str) -> list[str]:
    return pq.read_table(DEMO / "pairs" / f"{name}.parquet", columns=["caption"])["caption"].to_pylist()


def test_held_out_captions_are_held_out():
    train, held_out = captions("train"), captions("held_out")
    assert (len(train), len(held_out)) == (1135, 138)
    assert not set(train) & set(held_out)
    assert all((hashlib.sha256(c.encode()).digest()[0] % 10 == 0) == (c in set(held_out)) for c in train + held_out)


def test_base_model_is_a_complete_small_pipeline():
    assert sum(path.stat().st_size for path in (DEMO / "base").rglob("*")) <= 16 * 2**20
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO / "base")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("penguin", num_inference_steps=4, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["3"])  # "2" is what tests/test_wheel.py runs
def test_whole_demo_in_short(stage, tmp_path):
    output = tmp_path / "demo"
    short = ["--captions", "6", "--images", "1", "--judge-steps", "30", "--zero", stage]
    overrides = ["steps=2", "batch.pairs=4", "batch.micro_batch_size=2", "samples.prompts=[fire]", "samples.inference_steps=2"]
    command = [sys.executable, DEMO / "run.py", "--output", output, *short, "--", *overrides]
    process = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "win rate of the aligned model" in process.stdout
    result = json.loads((output / "result.json").read_text())
    assert result["win_rate"]["prompts"] == 6
    assert result["win_rate"]["low"] <= result["win_rate"]["rate"] <= result["win_rate"]["high"]
    # Two steps move the policy a little, and the reference not at all.
    errors = result["errors"]
    assert 0 < abs(errors["policy_chosen"] - errors["reference_chosen"]) < 0.1
    for name in ("comparison.png", "curves.png"):
        assert min(Image.open(output / name).size) > 100
    StableDiffusionPipeline.from_pretrained(output / "train" / "export")
