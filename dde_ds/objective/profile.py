"""How strongly an objective corrects each timestep, read from its own gradient: the paper's credit assignment (sec. 4.4).

The paper's picture is of pairs that all have one margin. A gradient holds the mean over pairs instead. The two differ: log σ saturates on
one side only, so that a pair on the wrong side keeps its full weight (β/2) w_t, however far the mean is ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dde_ds.objective.objective import Objective

NODES = 1201  # 200 to a standard deviation: σ(-z) is nearly a step where w_t is large


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


def credit_profile(objective: Objective, margins: Tensor, spread: float = 0.0) -> Profile:
    """Profile of pairs with margins (T,), one at every timestep, by the correction table as it stands.

    Through autograd, so that what is shown is what a training step does.

    Args:
        spread: standard deviation of the pairs' margins around ``margins`` at every timestep. Above 0 the profile is the mean over a
            normal distribution, by the trapezoid rule.
    """
    if not spread:
        return _profile(objective, margins)
    places = torch.linspace(-6, 6, NODES, dtype=torch.float64)
    weights = (-places.square() / 2).exp()
    weights /= weights.sum()
    credit = push = torch.zeros(len(margins), dtype=torch.float64)
    for place, weight in zip(places.tolist(), weights.tolist(), strict=True):
        one = _profile(objective, margins + spread * place)
        credit, push = credit + weight * one.credit, push + weight * one.push
    return Profile(credit, push)


def _profile(objective: Objective, margins: Tensor) -> Profile:
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
