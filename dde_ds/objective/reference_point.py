"""Diffusion-KTO's reference point: how far ahead the samples are on average, winners and losers alike."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class ReferencePoint:
    """κ = max(0, mean δ) over the samples of all ranks of one optimizer step, δ = -(d(θ) - d(ref)), without a gradient; float64.

    It is *delayed*, as the correction's table is: a step uses κ as the step before left it, and 0 at first. So all micro-batches and
    ranks of a step see one κ, and it is the same for any split of the same global batch.
    """

    def __init__(self):
        self.value = torch.zeros((), dtype=torch.float64)
        self._pending = torch.zeros(2, dtype=torch.float64)  # the sum of δ, and how many

    def to(self, device: torch.device | str) -> None:
        self.value, self._pending = self.value.to(device), self._pending.to(device)

    @torch.no_grad()
    def add(self, lead: Tensor) -> None:
        """Take in one micro-batch's δ, (2B,)."""
        lead = lead.double()
        self._pending += torch.stack([lead.sum(), torch.ones_like(lead).sum()])

    @torch.no_grad()
    def commit(self) -> None:
        """End an optimizer step: sum over ranks and renew κ. Collective. A step without samples leaves it."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._pending)
        total, count = self._pending
        self.value = torch.where(count > 0, (total / count.clamp_min(1)).clamp_min(0), self.value)
        self._pending.zero_()

    def discard(self) -> None:
        """Forget the sums of the running step: its update was not made."""
        self._pending.zero_()
