"""Steps whose loss or gradient is not a finite number: they train nothing, are written down, and too many in a row end the run."""

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
    """Looks at the loss of every micro-batch, on the device; what it saw is read only after a step that was skipped.

    A loss that is not finite is made to give gradients that are not either. So the reduction of the gradients, which a step needs
    anyway, carries the flag to all ranks, and one look before the weights, :func:`dde_ds.engine.update.update`'s, is enough.
    """

    def __init__(self, max_in_a_row: int, steps: int = 0, in_a_row: int = 0, log: RowFile | None = None):
        """Begin with :meth:`counts` of the checkpoint that the run goes on from.

        Args:
            log: ``skipped.jsonl``, on one rank.
        """
        self._max_in_a_row, self._log = max_in_a_row, log
        self.steps, self.in_a_row = steps, in_a_row
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def counts(self) -> dict[str, int]:
        """Skipped steps since the run began, and those at its end."""
        return {"steps": self.steps, "in_a_row": self.in_a_row}

    def watch(self, loss: Tensor, batch: Batch) -> Tensor:
        """A micro-batch's loss as it goes into the backward pass."""
        finite = loss.detach().isfinite()
        self._seen.append((finite, batch.positions, batch.timesteps))
        return loss * torch.where(finite, 1.0, torch.nan)

    def passed(self) -> None:
        """The step was made."""
        self._seen.clear()
        self.in_a_row = 0

    def skipped(self, step: int) -> str:
        """The step was left out. One line about it. Collective.

        Raises:
            UserError: it was one too many in a row.
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
        """What was not finite, on which ranks, and the pairs concerned: those of the micro-batches whose loss was not. Where all losses
        were, it was the backward pass that overflowed, and any rank's: the gradients had been reduced, so all pairs are named."""
        own = [(bool(finite), positions.tolist(), timesteps.tolist()) for finite, positions, timesteps in self._seen]
        self._seen.clear()
        everyone: list[list] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, own)
        ranks = [rank for rank, seen in enumerate(everyone) if not all(finite for finite, *_ in seen)]
        concerned = [batch for seen in everyone for batch in seen if not (ranks and batch[0])]
        return {
            "what": "loss" if ranks else "gradient",
            "ranks": ranks,
            "positions": [position for _, positions, _ in concerned for position in positions],
            "timesteps": [timestep for *_, timesteps in concerned for timestep in timesteps],
        }
