"""Rows of metrics for a tracker as well: TensorBoard files in the run folder, Weights & Biases if the user names a project.

Nothing leaves the machine unless ``log.wandb_project`` is set. ``metrics.jsonl`` is written whatever else is.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

from dde_ds.config import RunConfig
from dde_ds.errors import UserError

Write = Callable[[int, dict[str, float]], None]


def open_trackers(run: RunConfig, resume_step: int) -> list[Write]:
    """Functions that take a step and its row. Steps after ``resume_step`` of an earlier try are replaced where the tracker can.

    Raises:
        UserError: a tracker that is asked for is not installed, or refuses.
    """
    trackers = []
    if run.log.tensorboard:
        trackers.append(_tensorboard(Path(run.output), resume_step))
    if run.log.wandb_project:
        trackers.append(_wandb(run))
    return trackers


def _tensorboard(folder: Path, resume_step: int) -> Write:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("log.tensorboard is true, but tensorboard is not installed: pip install -e '.[track]'") from None
    writer = SummaryWriter(folder / "tensorboard", purge_step=resume_step + 1)

    def write(step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _wandb(run: RunConfig) -> Write:
    try:
        import wandb
    except ImportError:
        raise UserError("log.wandb_project is set, but wandb is not installed: pip install -e '.[track]'") from None
    # One run of the tracker for one run folder, however often it is resumed.
    name = hashlib.sha256(str(Path(run.output).resolve()).encode()).hexdigest()[:16]
    try:
        session = wandb.init(
            project=run.log.wandb_project,
            id=name,
            name=Path(run.output).name,
            resume="allow",
            dir=run.output,
            config=dataclasses.asdict(run),
        )
    except (wandb.errors.Error, OSError) as error:
        raise UserError(
            f"log.wandb_project {run.log.wandb_project}: {' '.join(str(error).split())}; WANDB_MODE=offline keeps it here"
        ) from None

    def write(step: int, row: dict[str, float]) -> None:
        session.log(row, step=step)

    return write
