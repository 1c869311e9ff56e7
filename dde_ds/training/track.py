"""Send rows of metrics and sample images to experiment trackers, through accelerate's adapters for them.

Nothing leaves the machine unless ``log.trackers`` names a tracker that sends. ``metrics.jsonl`` is written in any case.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dde_ds.config import RunConfig
from dde_ds.errors import UserError, nearest
from dde_ds.text import without_passwords


def open_trackers(run: RunConfig, resume_step: int) -> list[Any]:
    """Start the trackers of ``log.trackers``, and return them as ``accelerate.tracking.GeneralTracker``. Call this on one rank.

    A resumed run continues the same run of TensorBoard, W&B and Trackio. In TensorBoard, steps after ``resume_step`` are
    replaced.

    Raises:
        UserError: a tracker that is unknown, is not installed, or refuses to start.
    """
    require_trackers(run)
    if not run.log.trackers:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    sys.argv = [without_passwords(argument) for argument in sys.argv]  # some trackers send these arguments along
    PartialState()  # accelerate's own log lines need this; it takes the existing process group
    trackers = []
    for name in run.log.trackers:
        kind = LOGGER_TYPE_TO_CLASS[name]
        try:
            tracker = _new(kind, name, run, resume_step)
            tracker.main_process_only = False  # only this rank has the tracker
            tracker.start()
            # TensorBoard would add a run of its own for the configuration. config.yaml lies beside its files anyway.
            if name != "tensorboard":
                tracker.store_init_configuration(run.as_data())
        except Exception as error:  # each tracker has its own kinds of error: no login, no network, no room
            raise UserError(
                f"log.trackers: {name} does not start: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from None
        trackers.append(tracker)
    return trackers


def require_trackers(run: RunConfig) -> None:
    """Refuse trackers that could not be started.

    Raises:
        UserError: a tracker of ``log.trackers`` is unknown or not installed.
    """
    if not run.log.trackers:
        return
    try:
        from accelerate import tracking
    except ImportError:
        raise UserError("log.trackers is set, but accelerate is not installed: pip install -e '.[track]'") from None
    available = {str(name) for name in tracking.get_available_trackers()}
    for name in run.log.trackers:
        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            raise UserError(f"log.trackers names {name!r}{nearest(name, tracking.LOGGER_TYPE_TO_CLASS)}")
        if name not in available:
            raise UserError(f"log.trackers names {name!r}, which is not installed: pip install {name.replace('_', '-')}")


def send_row(trackers: Sequence[Any], step: int, row: dict[str, float]) -> None:
    """Send a step's row of metrics to the trackers."""
    for tracker in trackers:
        tracker.log(row, step=step)


def send_images(trackers: Sequence[Any], step: int, images: Tensor) -> None:
    """Send samples, (N,3,H,W) uint8, to the trackers that take images."""
    for tracker in trackers:
        if hasattr(tracker, "log_images"):
            whole = images.permute(0, 2, 3, 1).numpy()
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": whole}, step=step, **options)


def finish(trackers: Sequence[Any]) -> None:
    """Send what the trackers still hold back, and close them."""
    for tracker in trackers:
        tracker.finish()


def _new(kind: Any, name: str, run: RunConfig, resume_step: int) -> Any:
    folder = Path(run.output)
    # A run folder has one run of the tracker, however often it is resumed.
    identifier = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    if name == "tensorboard":
        return kind("tensorboard", folder, purge_step=resume_step + 1)
    options: dict[str, Any] = {
        "wandb": {"id": identifier, "name": folder.name, "resume": "allow", "dir": run.output},
        "trackio": {"name": f"{folder.name}-{identifier[:6]}", "resume": "allow"},
        "mlflow": {"run_name": folder.name},
    }.get(name, {})
    if kind.requires_logging_directory:
        options["logging_dir"] = folder
    return kind(run.log.project, **options)
