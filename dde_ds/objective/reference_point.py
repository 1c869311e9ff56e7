"""Diffusion-KTO's reference point: the mean lead of all samples, both winners and losers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class ReferencePoint:
    """κ = max(0, mean δ), float64, without a gradient, where δ = -(d(θ) - d(ref)) is a sample's lead.

    The mean runs over the samples of all ranks in one optimizer step. κ is *delayed*, like the correction table: a step uses the κ of the
    previous step, and the first step uses 0. So all micro-batches and ranks of a step use the same κ, and κ is the same for any split of
    the same global batch.
    """

    def __init__(self):
        self.value = torch.zeros((), dtype=torch.float64)
        self._pending = torch.zeros(2, dtype=torch.float64)  # The sum of δ and the number of samples.

    def to(self, device: torch.device | str) -> None:
        self.value, self._pending = self.value.to(device), self._pending.to(device)

    @torch.no_grad()
    def add(self, lead: Tensor) -> None:
        """Add the δ of one micro-batch, (2B,)."""
        lead = lead.double()
        self._pending += torch.stack([lead.sum(), torch.ones_like(lead).sum()])

    @torch.no_grad()
    def commit(self) -> None:
        """End an optimizer step: sum over ranks and update κ. Collective. A step without samples keeps κ."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._pending)
        total, count = self._pending
        self.value = torch.where(count > 0, (total / count.clamp_min(1)).clamp_min(0), self.value)
        self._pending.zero_()

    def discard(self) -> None:
        """Forget the sums of the current step, whose update was skipped."""
        self._pending.zero_()
