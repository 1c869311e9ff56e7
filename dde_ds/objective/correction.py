"""The stepwise correction: an exponential moving average of the pairs' margins at every timestep (eq. 7, 8).

    K_t = Σ_{j>t} λ_j · M_j        M_j: moving average of m over the samples whose timestep was j

K_t stands for the part of log p_θ(x₀)/p_ref(x₀) between x_t and the noisy end that one model pass does not see. It carries no gradient and
is *delayed*: a step uses the table as the previous optimizer step left it, so that all micro-batches of a step see one K.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dde_ds.errors import UserError

ERROR_NAMES = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


class CorrectionTable:
    """The table M and its sums of the running step. T timesteps; everything float64.

    Sums, not means, travel between ranks, and once a step: the table is the same on all ranks and for any split of the
    same global batch into ranks and micro-batches.
    """

    def __init__(self, stepwise_weight: Tensor, ema: float):
        steps = len(stepwise_weight)
        self.ema = ema
        self.weight = stepwise_weight.double()
        # Row 0: M. Rows 1-4: moving averages of the four errors, for diagnosis only.
        self.average = torch.zeros(5, steps, dtype=torch.float64)
        self.count = torch.zeros(steps, dtype=torch.float64)
        """Samples seen so far at each timestep; 0 means never, and M is 0 there."""
        self.correction = torch.zeros(steps, dtype=torch.float64)
        """K_t, (T,)."""
        # Rows 0-4: sums of what `average` averages; row 5: how many samples.
        self._pending = torch.zeros(6, steps, dtype=torch.float64)

    def to(self, device: torch.device | str) -> CorrectionTable:
        for name in ("weight", "average", "count", "correction", "_pending"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    @torch.no_grad()
    def add(self, timesteps: Tensor, margin: Tensor, errors: Tensor) -> None:
        """Take in one micro-batch: ``timesteps`` and ``margin`` (B,), ``errors`` (4,B) in the order of ``ERROR_NAMES``."""
        rows = torch.cat([margin[None], errors, torch.ones_like(margin)[None]]).double()
        self._pending.index_add_(1, timesteps, rows)

    @torch.no_grad()
    def commit(self) -> None:
        """End an optimizer step: sum over ranks, fold the step's means into the table, and renew K. Collective."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._pending)
        sums, seen = self._pending[:5], self._pending[5]
        mean = sums / seen.clamp_min(1)
        moved = torch.where(self.count > 0, self.ema * self.average + (1 - self.ema) * mean, mean)
        self.average = torch.where(seen > 0, moved, self.average)
        self.count += seen
        self._pending.zero_()
        self._renew()

    def _renew(self) -> None:
        contribution = self.weight * self.average[0]
        # Sum over j > t: a cumulative sum from the noisy end, shifted by one.
        self.correction = torch.cat([contribution[1:].flip(0).cumsum(0).flip(0), contribution.new_zeros(1)])

    def discard(self) -> None:
        """Forget the sums of the running step: its update was not made."""
        self._pending.zero_()

    def fill(self, margin: float) -> None:
        """Set M to one value at every timestep, as if that had been seen everywhere."""
        self.average[0] = margin
        self.count.fill_(1)
        self._renew()

    def state_dict(self) -> dict[str, Tensor]:
        return {"average": self.average.cpu().clone(), "count": self.count.cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["average"].shape != self.average.shape:
            raise UserError(
                f"correction table has {state['average'].shape[1]} timesteps, this model's scheduler has {self.average.shape[1]}: "
                "resume with the model that the checkpoint was trained from"
            )
        self.average.copy_(state["average"])
        self.count.copy_(state["count"])
        self._pending.zero_()
        self._renew()
