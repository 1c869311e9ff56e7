"""How strongly an objective corrects each timestep, read from its own gradient: the paper's credit assignment (sec. 4.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dde_ds.objective.losses import margin
from dde_ds.objective.objective import Objective


@dataclass(frozen=True)
class Profile:
    """One value a timestep, (T,) float64 each."""

    credit: Tensor
    """|∂loss/∂d| = (β/2) g_t σ(-z_t), d the policy's error on the winner (or the loser) of one pair."""

    push: Tensor
    """σ(-z_t), what the logistic leaves of the gradient: near 0 a pair is learnt, near 1 it is far on the wrong side. NaN where there is none."""

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
    z = objective.logits(margin(torch.cat([winner, others]), torch.cat([others, others])), every)
    (credit,) = torch.autograd.grad(objective.link.loss(z).sum(), winner)
    return Profile(credit, objective.link.weight(z.detach()))
