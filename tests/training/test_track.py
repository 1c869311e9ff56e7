from __future__ import annotations

import sys

import pytest

from dde_ds import UserError, load_config
from dde_ds.training.track import open_trackers
from tests.launching import write_config


@pytest.fixture
def settings(tmp_path):
    config = write_config(tmp_path / "run.yaml", tmp_path, tmp_path)
    (tmp_path / "run").mkdir()
    return lambda *overrides: load_config(config, [f"output={tmp_path / 'run'}", *overrides])


def test_none_by_default(settings):
    assert open_trackers(settings(), 0) == []


def test_tensorboard(settings, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        (write,) = open_trackers(settings("log.tensorboard=true"), resume_step)
        for step in steps:
            write(step, {"loss": step + resume_step / 10, "rewards/accuracies": 0.5})
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert sorted(found.Tags()["scalars"]) == ["loss", "rewards/accuracies"]
    rows = {event.step: event.value for event in found.Scalars("loss")}
    assert rows == pytest.approx({1: 1.0, 2: 2.0, 3: 3.2, 4: 4.2}), "step 3 is that of the resumed run"


def test_wandb_offline(settings, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (write,) = open_trackers(settings("log.wandb_project=alignment"), 0)
    write(1, {"loss": 0.5})
    import wandb

    wandb.finish()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.parametrize(
    ("module", "override"), [("tensorboard", "log.tensorboard=true"), ("wandb", "log.wandb_project=alignment")]
)
def test_not_installed(settings, monkeypatch, module, override):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=rf"{module} is not installed: pip install -e '.\[track\]'"):
        open_trackers(settings(override), 0)
