"""The pairwise preference losses as pure functions of per-sample errors (arXiv 2411.14871, eq. 5, 11, 12).

B pairs; d(θ,w) … d(ref,l) are (B,) mean squared noise-prediction errors of policy and reference on winner and loser.

    m = [d(θ,w) - d(ref,w)] - [d(θ,l) - d(ref,l)]        negative where the policy already prefers the winner
    z = -(β/2) · (g_t · m + η · K_t)                      loss = -log σ(z)

The objectives differ in the gain g_t and in whether the stepwise correction K_t is there: the table in :mod:`.specs` lists them. Some
have a loss of their own in the place of -log σ(z), and :mod:`.links` has others for all of the rest.
"""

from __future__ import annotations

from typing import NamedTuple

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


class Terms(NamedTuple):
    """What a loss of its own is made of. Errors are (2B,): B winners, then their B losers."""

    policy: Tensor
    """d(θ,·)."""
    reference: Tensor | None
    """d(ref,·); None without a reference."""
    moved: Tensor | None
    """q = mean ‖ε_θ - ε_ref‖²; None where the loss does not ask for it."""
    logits: Tensor | None
    """z, (B,), with gain 1; None without a reference."""
    beta: float
    steps: int
    """T."""
    reference_point: Tensor | None
    """κ, 0-d; None where the loss has none."""


def sft(terms: Terms) -> tuple[Tensor, Tensor]:
    """Return the error on winners alone, (B,); there is no z."""
    winner, _ = terms.policy.chunk(2)
    return winner, winner.new_empty(0)


def dspo(terms: Terms) -> tuple[Tensor, Tensor]:
    """DSPO's loss in the form of SD1.5 (Zhu et al., ICLR 2025): ‖e_w - βs(ε_θ-ε_ref)‖² of the winner, s = 1-σ(z), (B,), and z.

    It is written by sums, from ⟨e_w, ε_θ-ε_ref⟩ = (d(θ,w) + q_w - d(ref,w))/2. z carries its gradient.
    Its code trains SD1.5 at β = 0.001. Where βs is above 1 the gradient moves the policy away from the winner's noise; at first s is one half.
    """
    assert terms.reference is not None and terms.moved is not None and terms.logits is not None
    (winner, _), (reference, _), (moved, _) = (each.chunk(2) for each in (terms.policy, terms.reference, terms.moved))
    strength = terms.beta * torch.sigmoid(-terms.logits)
    return winner - strength * (winner + moved - reference) + strength.square() * moved, terms.logits


def kto(terms: Terms) -> tuple[Tensor, Tensor]:
    """Diffusion-KTO's loss (Li et al. 2024, arXiv 2404.04465): 1 - σ(±β(δ-κ)), + for winners, mean of a pair's two, (B,), and z.

    δ = -(d(θ) - d(ref)) is a sample's lead. κ is the mean lead of all samples, as :class:`.reference_point.ReferencePoint` has it.
    """
    assert terms.reference is not None and terms.logits is not None and terms.reference_point is not None
    winner, loser = (terms.beta * (terms.reference - terms.policy - terms.reference_point)).chunk(2)
    return (torch.sigmoid(-winner) + torch.sigmoid(loser)) / 2, terms.logits


# MaPO's code: the weight of the preference, and what errors are scaled by.
MAPO_WEIGHT, MAPO_SCALE = 0.1, 0.5


def mapo(terms: Terms) -> tuple[Tensor, Tensor]:
    """MaPO's loss (Hong et al. 2024, arXiv 2406.06424): d_w - 0.1 log σ(z), z = T[f(d_w) - f(d_l)], f(d) = 0.5d/(e^{0.5d}-1), (B,), and z."""
    scaled = MAPO_SCALE * terms.policy
    # As x e^{-x}/(1-e^{-x}), which overflows for no x.
    winner, loser = (scaled * torch.exp(-scaled) / -torch.expm1(-scaled)).chunk(2)
    z = terms.steps * (winner - loser)
    return terms.policy.chunk(2)[0] + MAPO_WEIGHT * F.softplus(-z), z


def preserve_winner(policy: Tensor, inner: Tensor, elements: int, share: float) -> Tensor:
    """Return the errors, (2B,), unchanged in value, with the loser's gradient scaled down where it would raise the winner's error.

    To first order a step changes the winner's error by ‖e_w‖² from its own part and by ⟨e_w,e_l⟩ from the loser's. The loser's part
    is scaled by clip((1-μ) Σ‖e_w‖² / (Σ⟨e_w,e_l⟩ + 1e-9), 0, 1) where Σ⟨e_w,e_l⟩ > 0, and kept elsewhere. SDPO's code takes the sums over
    a local batch, so that its result depends on the micro-batch; here they are over one pair's elements.

    Args:
        inner: mean of e_w·e_l, (B,).
        elements: C·H·W of a latent.
        share: μ. SDPO's runs: 0.9 for SD1.5, 0.6 for SDXL.
    """
    winner, loser = policy.chunk(2)
    scale = (1 - share) * winner.detach() * elements / (inner * elements + 1e-9)
    scale = torch.where(inner > 0, scale.clamp(0, 1), 1)
    fixed = loser.detach()
    return torch.cat([winner, fixed + scale * (loser - fixed)])
