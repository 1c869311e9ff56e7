"""The strength with which an objective corrects each timestep, read from its own gradient: the paper's credit assignment (sec. 4.4).

The paper's figure assumes that all pairs have one margin. A training gradient is a mean over pairs instead. The two differ, because log σ
saturates on one side only. A pair on the wrong side keeps its full weight (β/2) w_t, however far ahead the mean is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dde_ds.objective.objective import Objective

NODES = 1201  # 100 nodes to a standard deviation: σ(-z) is nearly a step function where w_t is large.


@dataclass(frozen=True)
class Profile:
    """An objective's credit and push at each timestep, (T,) float64 each."""

    credit: Tensor
    """|∂loss/∂d|, where d is the policy's error on the winner of one pair. For the logistic link this is (β/2) g_t σ(-z_t)."""

    push: Tensor
    """-∂loss/∂z_t, the link's gradient weight. For the logistic link this is σ(-z_t): near 0 a pair is learnt, near 1 it is far on the
    wrong side. NaN for an objective with its own loss."""

    @property
    def peak(self) -> int:
        return int(self.credit.argmax())

    def middle_half(self) -> tuple[int, int]:
        """Return the two timesteps between which the middle half of the credit lies."""
        share = self.credit.cumsum(0) / self.credit.sum()
        low, high = (int(torch.searchsorted(share, value)) for value in (0.25, 0.75))
        return low, high


def assume_margin(objective: Objective, value: float) -> None:
    """Fill the correction table as if every pair at every timestep had the margin ``value``."""
    objective.table.fill(value)


def credit_profile(objective: Objective, margins: Tensor, spread: float = 0.0) -> Profile:
    """Return the profile of pairs with ``margins``, (T,), one pair at every timestep, by the current correction table.

    The credit comes from autograd, so that the profile shows what a training step does.

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
    if not objective.needs_reference:  # The winner's error itself is the loss.
        return Profile(torch.ones(len(every), dtype=torch.float64), torch.full((len(every),), torch.nan, dtype=torch.float64))
    winner = margins.double().clone().requires_grad_()
    others = torch.zeros_like(margins, dtype=torch.float64)
    none = torch.cat([others, others])
    of_each, z = objective.pair_losses(every, torch.cat([winner, others]), none, none)
    (credit,) = torch.autograd.grad(of_each.sum(), winner)
    push = torch.full_like(credit, torch.nan) if objective.spec.own_loss else objective.link.weight(z.detach())
    return Profile(credit.abs(), push)
