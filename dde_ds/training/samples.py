"""Draw a run's sample images. Prompts and noise are the same each time, so that only the model changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dde_ds.config import RunConfig
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.evaluation.generate import PromptSet, save_row
from dde_ds.training.metrics import RunLog
from dde_ds.training.resume import sample_path
from dde_ds.training.stop import StopRequest, none_if_stopped
from dde_ds.warn import reason, warn_once


class Samples:
    """Draw ``samples.prompts`` when they are due. Without prompts nothing is ever due. Collective, since ZeRO-3's forward passes
    are."""

    def __init__(self, run: RunConfig, policy: Any, ranks: DistributedEnv, device: torch.device, stop: StopRequest, log: RunLog):
        self._run, self._policy, self._ranks, self._stop, self._log = run, policy, ranks, stop, log
        self._prompts = None
        if run.samples.prompts:
            dtype = next(policy.parameters()).dtype
            model = run.model
            self._prompts = PromptSet(model.path, model.revision, run.samples.prompts, device, dtype, model.variant)

    def due(self, step: int) -> bool:
        """Return whether to draw after ``step``."""
        return self._prompts is not None and (step % self._run.samples.every == 0 or step == self._run.steps)

    def draw(self, step: int) -> None:
        """Draw the images, write ``samples/step-….png``, and send the images to the trackers. Collective.

        A request to stop leaves all of this out. A file that cannot be written is a warning.
        """
        options, prompts = self._run.samples, self._prompts
        assert prompts is not None  # without prompts, drawing is never due
        images = none_if_stopped(
            lambda: prompts.draw(
                self._policy.module, options.seed, options.inference_steps, options.guidance_scale, poll=self._stop.poll
            )
        )
        if images is None or not self._ranks.is_main:
            return
        try:
            save_row(images, sample_path(self._run, step))
        except OSError as error:
            warn_once(f"pictures in {Path(self._run.output) / 'samples'} could not be saved: {reason(error)}; the run goes on")
        self._log.show(step, images)
