from __future__ import annotations

import sys

import pytest
import torch

from dde_ds import UserError, load_config
from dde_ds.training.track import finish, open_trackers, send_images, send_row
from tests.support.launching import write_config


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

    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8)
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        trackers = open_trackers(settings("log.trackers=[tensorboard]"), resume_step)
        for step in steps:
            send_row(trackers, step, {"loss": step + resume_step / 10, "rewards/accuracies": 0.5})
        send_images(trackers, steps[-1], images)
        finish(trackers)
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert sorted(found.Tags()["scalars"]) == ["loss", "rewards/accuracies"]
    rows = {event.step: event.value for event in found.Scalars("loss")}
    assert rows == pytest.approx({1: 1.0, 2: 2.0, 3: 3.2, 4: 4.2}), "step 3 is that of the resumed run"
    shown = found.Images("samples")
    assert [(event.step, event.width, event.height) for event in shown] == [(4, 16, 8)], "two images side by side"


def test_wandb_offline(settings, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trackers = open_trackers(settings("log.trackers=[wandb]", "log.project=alignment"), 0)
    send_row(trackers, 1, {"loss": 0.5})
    send_images(trackers, 1, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    finish(trackers)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_tracker_that_cannot_be_had(settings, monkeypatch):
    with pytest.raises(UserError, match=r"log.trackers names 'tensorbord'; did you mean 'tensorboard'"):
        open_trackers(settings("log.trackers=[tensorbord]"), 0)
    with pytest.raises(UserError, match=r"log.trackers names 'dvclive', which is not installed: pip install dvclive"):
        open_trackers(settings("log.trackers=[dvclive]"), 0)


def test_a_tracker_that_does_not_start_is_one_line(settings, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (tmp_path / "run" / "tensorboard").write_text("a file where its folder would be")
    with pytest.raises(UserError, match=r"log.trackers: tensorboard does not start: "):
        open_trackers(settings("log.trackers=[tensorboard]"), 0)


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("log.tensorboard=true", "unknown key log.tensorboard; it is now log.trackers: [tensorboard]"),
        (
            "log.wandb_project=alignment",
            "unknown key log.wandb_project; it is now log.trackers: [wandb], and log.project for its name",
        ),
    ],
)
def test_the_old_keys_say_what_they_are_called_now(settings, old, now):
    with pytest.raises(UserError) as told:
        settings(old)
    assert str(told.value) == now


def test_accelerate_not_installed(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UserError, match=r"log.trackers is set, but accelerate is not installed: pip install -e '.\[track\]'"):
        open_trackers(settings("log.trackers=[tensorboard]"), 0)
