"""Decide when a run saves a checkpoint, and what the checkpoint says of the run."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dde_ds.config import RunConfig
from dde_ds.data.mixture import MixedShards
from dde_ds.data.shards import ShardSet
from dde_ds.engine import checkpoint
from dde_ds.objective.objective import Objective
from dde_ds.training.guards import Guards
from dde_ds.training.resume import state_at


class Checkpoints:
    """Save a checkpoint when one is due.

    Args:
        base: the base's identity, as in :func:`dde_ds.training.check.base_identity`.
        damaged: checkpoints that were proved damaged on resume, and may be replaced.
    """

    def __init__(self, run: RunConfig, shards: ShardSet | MixedShards, base: dict[str, str], damaged: Collection[Path]):
        self._run, self._shards, self._base, self._damaged = run, shards, base, damaged

    def due(self, step: int, guards: Guards) -> bool:
        """Return whether to save after ``step``.

        The last step is always saved. Another step is not saved if it was skipped, since the older checkpoints may be the last
        good ones.
        """
        return step == self._run.steps or (step % self._run.checkpoint.every == 0 and not guards.in_a_row)

    def save(self, step: int, policy: Any, objective: Objective, beside: dict) -> str:
        """Write the checkpoint of ``step`` and return a line about it. Collective.

        Args:
            beside: more state to restore on resume, as JSON data.
        """
        started, options = time.perf_counter(), self._run.checkpoint
        state = state_at(self._run, self._shards, self._base, step) | beside
        folder = Path(self._run.output) / "checkpoints"
        path, size = checkpoint.save(folder, policy, objective, state, options.keep, options.keep_every, self._damaged)
        return f"checkpoint {path.name}: {size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s"
