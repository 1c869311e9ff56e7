"""A disk that fills up, turns read-only, and gives back other bits than were written: real launches on a small disk of their own."""

from __future__ import annotations

import subprocess

import pytest
from diffusers import UNet2DConditionModel

from dde_ds import load_config
from dde_ds.engine import checkpoint
from tests.faults.test_bad_input import error_lines
from tests.support.launching import alone, launch, rows, write_config
from tests.support.reference_loop import plain_losses

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path, sd_model):
    """Room for two checkpoints and a half."""
    parameters = sum(p.numel() for p in UNet2DConditionModel.from_pretrained(sd_model, subfolder="unet").parameters())
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={30 * parameters}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs privileges")
    yield folder
    subprocess.run(["umount", folder], check=True)


def remount(disk, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def flip_a_bit(folder) -> None:
    path = min(folder.glob("state-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_full_then_read_only_then_damaged(tmp_path, disk, sd_model, sd_shards):
    run = disk / "run"
    settings = {"output": str(run), "steps": 5, "checkpoint": {"every": 1, "keep": 2}}
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards, **settings)
    (line,) = error_lines(launch(config))
    assert f"checkpoints in {run}/checkpoints: 0.0 GB free, one takes 0.0 GB: make room, then go on with --resume" in line
    found = checkpoint.list_checkpoints(run / "checkpoints")
    assert [path.name for path in found] == ["step-00000001", "step-00000002"]

    remount(disk, "ro")
    (line,) = error_lines(alone(config, "--resume"))
    assert line == f"error: output {run}: not writable: read-only file system"

    remount(disk, "rw,size=100%")
    for path in found:
        flip_a_bit(path)
    (line,) = error_lines(alone(config, "--resume", "auto"))
    assert line == (
        f"error: output {run}: all 2 checkpoints are damaged; restore one from a copy, or delete the folder to start anew"
    )
    flip_a_bit(found[0])  # back
    process = alone(config, "--resume", "auto")
    assert process.returncode == 0, process.stderr[-3000:]
    assert f"warning: checkpoint {found[1]}: damaged: state-00000-000.safetensors is not what was written" in process.stdout
    assert "resumed after step 1" in process.stdout
    assert (run / "DONE").exists()
    assert [row["loss"] for row in rows(run)] == pytest.approx(plain_losses(load_config(config)), abs=1e-5)
