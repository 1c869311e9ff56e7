"""How strongly an objective corrects each timestep, read from its own gradient: the paper's credit assignment (sec. 4.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dde_ds.objective.objective import Objective


@dataclass(frozen=True)
class Profile:
    """One value a timestep, (T,) float64 each."""

    credit: Tensor
    """|∂loss/∂d|, d the policy's error on the winner (or the loser) of one pair: (β/2) g_t σ(-z_t) for the logistic link."""

    push: Tensor
    """-∂loss/∂z_t, what the link leaves of the gradient. Of the logistic σ(-z_t): near 0 a pair is learnt, near 1 it is far on the wrong side.
    NaN where there is none."""

    @property
    def peak(self) -> int:
        return int(self.credit.argmax())

    def middle_half(self) -> tuple[int, int]:
        """The timesteps between which the middle half of all credit lies."""
        share = self.credit.cumsum(0) / self.credit.sum()
        low, high = (int(torch.searchsorted(share, value)) for value in (0.25, 0.75))
        return low, high


def assume_margin(objective: Objective, value: float) -> None:
    """Fill the correction table as if every pair at every timestep had the margin ``value``."""
    objective.table.fill(value)


def credit_profile(objective: Objective, margins: Tensor) -> Profile:
    """Profile of pairs with margins (T,), one at every timestep, by the correction table as it stands.

    Through autograd, so that what is shown is what a training step does.
    """
    every = torch.arange(objective.schedule.num_train_timesteps)
    if not objective.needs_reference:  # the error itself is the loss
        return Profile(torch.ones(len(every), dtype=torch.float64), torch.full((len(every),), torch.nan, dtype=torch.float64))
    winner = margins.double().clone().requires_grad_()
    others = torch.zeros_like(margins, dtype=torch.float64)
    none = torch.cat([others, others])
    of_each, z = objective.pair_losses(every, torch.cat([winner, others]), none, none)
    (credit,) = torch.autograd.grad(of_each.sum(), winner)
    push = torch.full_like(credit, torch.nan) if objective.spec.own_loss else objective.link.weight(z.detach())
    return Profile(credit.abs(), push)
