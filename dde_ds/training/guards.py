"""Guard a run against losses and gradients that are not finite.

Steps with such numbers train nothing and are written down. Too many of them in a row end the run.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dde_ds.errors import UserError
from dde_ds.rows import RowFile
from dde_ds.training.batches import Batch

MEND = (
    "lower optimizer.learning_rate and go on with --resume from the last checkpoint; or, in a new output folder, try precision=fp32 or "
    "leave these timesteps out by objective.timestep_range. skipped.jsonl has every pair"
)


class Guards:
    """Check the loss of every micro-batch, on the device. The results are read only after a skipped step.

    A loss that is not finite makes the gradients NaN. The reduction of the gradients, which a step needs anyway, carries NaN
    to all ranks. So one check before the weights change is enough, in :func:`dde_ds.engine.update.apply_if_finite`.
    """

    def __init__(self, max_in_a_row: int, steps: int = 0, in_a_row: int = 0, log: RowFile | None = None):
        """Begin with the :meth:`counts` of the checkpoint that the run continues from.

        Args:
            max_in_a_row: the number of skipped steps in a row that ends the run.
            log: ``skipped.jsonl``, on one rank.
        """
        self._max_in_a_row, self._log = max_in_a_row, log
        self.steps, self.in_a_row = steps, in_a_row
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def counts(self) -> dict[str, int]:
        """Return the number of skipped steps since the run began, and the number of those in a row up to now."""
        return {"steps": self.steps, "in_a_row": self.in_a_row}

    def watch(self, loss: Tensor, batch: Batch) -> Tensor:
        """Record whether a micro-batch's loss is finite. Return the loss for the backward pass, NaN if it is not finite."""
        finite = loss.detach().isfinite()
        self._seen.append((finite, batch.positions, batch.timesteps))
        return loss * torch.where(finite, 1.0, torch.nan)

    def passed(self) -> None:
        """Record that the step was applied."""
        self._seen.clear()
        self.in_a_row = 0

    def skipped(self, step: int) -> str:
        """Record that the step was skipped, and return one line about it. Collective.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        row = {"step": step, **self._find()}
        self.steps += 1
        self.in_a_row += 1
        if self._log:
            self._log.write(row)
        where = f" on rank {', '.join(map(str, row['ranks']))}" if row["ranks"] else ""
        low, high = min(row["timesteps"]), max(row["timesteps"])
        what = f"the {row['what']}{where} is not a finite number, timesteps {low} to {high}"
        if self.in_a_row >= self._max_in_a_row:
            raise UserError(
                f"step {step}: {what}; nothing was trained since step {step - self.in_a_row}, which is "
                f"guards.max_skipped_in_a_row = {self._max_in_a_row} steps ago: {MEND}"
            )
        return f"step {step}: {what}: skipped on all ranks"

    def _find(self) -> dict:
        """Return what was not finite, on which ranks, and the pairs concerned. Collective.

        If losses were not finite, the pairs are those of their micro-batches. If all losses were finite, the backward pass
        overflowed. The gradients were reduced by then, so any rank may be the cause, and all pairs are named.
        """
        local = [(bool(finite), positions.tolist(), timesteps.tolist()) for finite, positions, timesteps in self._seen]
        self._seen.clear()
        by_rank: list[list] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(by_rank, local)
        ranks = [rank for rank, seen in enumerate(by_rank) if not all(finite for finite, *_ in seen)]
        concerned = [batch for seen in by_rank for batch in seen if not (ranks and batch[0])]
        return {
            "what": "loss" if ranks else "gradient",
            "ranks": ranks,
            "positions": [position for _, positions, _ in concerned for position in positions],
            "timesteps": [timestep for *_, timesteps in concerned for timestep in timesteps],
        }
