"""The pairwise preference losses as pure functions of per-sample errors (arXiv 2411.14871, eq. 5, 11, 12).

B pairs; d(θ,w) … d(ref,l) are (B,) mean squared noise-prediction errors of policy and reference on winner and loser.

    m = [d(θ,w) - d(ref,w)] - [d(θ,l) - d(ref,l)]        negative where the policy already prefers the winner
    z = -(β/2) · (g_t · m + η · K_t)                      loss = -log σ(z)

The objectives differ in the gain g_t and in whether the stepwise correction K_t is there: the table in :mod:`.specs` lists them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def margin(policy_error: Tensor, reference_error: Tensor) -> Tensor:
    """m, (B,), from errors of shape (2B,): B winners, then B losers."""
    winner, loser = (policy_error - reference_error).chunk(2)
    return winner - loser


def logits(margin: Tensor, gain: Tensor, correction: Tensor, beta: float, correction_weight: float) -> Tensor:
    """z, (B,), from (B,) margins, gains g_t and corrections K_t."""
    return -(beta / 2) * (gain * margin + correction_weight * correction)


def logistic_loss(logits: Tensor) -> Tensor:
    """-log σ(z) of each pair, (B,); exactly log 2 where policy and reference agree."""
    return F.softplus(-logits)


def logistic_weight(logits: Tensor) -> Tensor:
    """-∂loss/∂z = σ(-z) of each pair, (B,): near 0 a pair is learnt, near 1 it is far on the wrong side."""
    return torch.sigmoid(-logits)


def share_ahead(lead: Tensor) -> Tensor:
    """Return 1 where ``lead``, such as z or -m, is above 0, and 0 where it is below. Where it is 0, as before the first step, policy and
    reference tell a pair no better than a coin: one half. Of ``lead``'s shape and type."""
    return (1 + lead.sign()) / 2
