"""The stepwise correction: a recent average of the pairs' margins in every range of timesteps (eq. 7, 8).

    N_b ← ρ N_b + Σ m_i        C_b ← ρ C_b + #i        over the pairs i of an optimizer step whose timestep lies in bucket b
    M_j = N_b / C_b            for every timestep j in bucket b; 0 where no pair was seen
    K_t = Σ_{j>t} λ_j · M_j

K_t stands for the part of log p_θ(x₀)/p_ref(x₀) between x_t and the noisy end. One model pass does not see this part. K_t carries no
gradient. It is also *delayed*: a step uses the table of the previous optimizer step, so that all micro-batches of a step use the same K.

Both sums decay once an optimizer step, in every bucket, with or without pairs there. So old behaviour of the policy fades at the same
pace at every batch size. The ratio N_b/C_b also corrects its own bias at the start.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dde_ds.errors import UserError

ERROR_NAMES = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


class CorrectionTable:
    """The decayed sums N and C, and the sums of the current step, in float64. Buckets are n equal ranges of the T timesteps.

    Ranks exchange sums, once a step. So the table is the same on all ranks, and for any split of the same global batch into ranks and
    micro-batches.
    """

    def __init__(self, stepwise_weight: Tensor, ema: float, buckets: int):
        steps = len(stepwise_weight)
        self.ema = ema
        self.weight = stepwise_weight.double()
        self.bucket = torch.arange(steps) * buckets // steps
        """Bucket of each timestep, (T,) int64."""
        self.sums = torch.zeros(6, buckets, dtype=torch.float64)
        """(6,n). Row 0: N. Rows 1 to 4: decayed sums of the four errors, for diagnosis only. Row 5: C."""
        self.correction = torch.zeros(steps, dtype=torch.float64)
        """K_t, (T,)."""
        self._pending = torch.zeros(6, buckets, dtype=torch.float64)

    @property
    def average(self) -> Tensor:
        """Return the means of the margin and of the four errors in each bucket, (5,n). A bucket without pairs gives 0."""
        return self.sums[:5] / torch.where(self.count > 0, self.count, 1)

    @property
    def count(self) -> Tensor:
        """Return C, (n,): the number of pairs in each bucket, where older pairs weigh less."""
        return self.sums[5]

    def to(self, device: torch.device | str) -> CorrectionTable:
        for name in ("weight", "bucket", "sums", "correction", "_pending"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    @torch.no_grad()
    def add(self, timesteps: Tensor, margin: Tensor, errors: Tensor) -> None:
        """Add one micro-batch: ``timesteps`` and ``margin``, (B,) each, and ``errors``, (4,B), in the order of ``ERROR_NAMES``."""
        rows = torch.cat([margin[None], errors, torch.ones_like(margin)[None]]).double()
        self._pending.index_add_(1, self.bucket[timesteps], rows)

    @torch.no_grad()
    def commit(self) -> None:
        """End an optimizer step: sum over ranks, let the table decay, add the step's sums, and recompute K. Collective."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._pending)
        self.sums = self.ema * self.sums + self._pending
        self._pending.zero_()
        self._renew()

    def _renew(self) -> None:
        contribution = self.weight * self.average[0][self.bucket]
        # The sum over j > t is a cumulative sum from the noisy end, shifted by one.
        self.correction = torch.cat([contribution[1:].flip(0).cumsum(0).flip(0), contribution.new_zeros(1)])

    def discard(self) -> None:
        """Forget the sums of the current step, whose update was skipped. The table does not decay."""
        self._pending.zero_()

    def fill(self, margin: float) -> None:
        """Set M to ``margin`` at every timestep, as if pairs everywhere had this margin."""
        self.sums.zero_()
        self.sums[0] = margin
        self.sums[5] = 1
        self._renew()

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self.sums.cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        sums = state["sums"]
        if sums.shape != self.sums.shape:
            raise UserError(
                f"correction table has shape {tuple(sums.shape)}, this objective's {tuple(self.sums.shape)}: "
                f"objective.correction_buckets is {self.sums.shape[1]}; set it as in the run that saved the table"
            )
        self.sums.copy_(sums)
        self._pending.zero_()
        self._renew()
