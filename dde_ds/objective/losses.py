"""The pairwise preference losses as pure functions of per-sample errors (arXiv 2411.14871, eq. 5, 11, 12).

There are B pairs. d(θ,w), d(θ,l), d(ref,w) and d(ref,l), (B,) each, are mean squared noise-prediction errors. θ is the policy, ref the
reference, w the winner and l the loser.

    m = [d(θ,w) - d(ref,w)] - [d(θ,l) - d(ref,l)]        negative where the policy already prefers the winner
    z = -(β/2) · (g_t · m + η · K_t)                      loss = -log σ(z)

Objectives differ in the gain g_t and in whether they add the stepwise correction K_t. :mod:`.specs` lists them. Some objectives use
their own loss instead of -log σ(z). For the others, :mod:`.links` lists alternatives to -log σ(z).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def margin(policy_error: Tensor, reference_error: Tensor) -> Tensor:
    """Return the margins m, (B,), from errors of shape (2B,): B winners, then B losers."""
    winner, loser = (policy_error - reference_error).chunk(2)
    return winner - loser


def logits(margin: Tensor, gain: Tensor, correction: Tensor, beta: float, correction_weight: float) -> Tensor:
    """Return the logits z, (B,), from margins m, gains g_t and corrections K_t, (B,) each."""
    return -(beta / 2) * (gain * margin + correction_weight * correction)


def logistic_loss(logits: Tensor) -> Tensor:
    """Return -log σ(z) of each pair, (B,). It is exactly log 2 where policy and reference agree."""
    return F.softplus(-logits)


def logistic_weight(logits: Tensor) -> Tensor:
    """Return -∂loss/∂z = σ(-z) of each pair, (B,). Near 0 the pair is learnt; near 1 it is far on the wrong side."""
    return torch.sigmoid(-logits)


def share_ahead(lead: Tensor) -> Tensor:
    """Return 1 where ``lead`` is positive, 0 where it is negative, and ½ where it is 0, in the shape and dtype of ``lead``.

    ``lead`` is, for example, z or -m. It is 0 where policy and reference agree, as before the first step. Such a pair counts one half,
    since the comparison is then no better than a coin toss.
    """
    return (1 + lead.sign()) / 2


class Terms(NamedTuple):
    """The inputs of an objective's own loss. Errors are (2B,): B winners, then their B losers."""

    policy: Tensor
    """d(θ,·)."""
    reference: Tensor | None
    """d(ref,·); None without a reference."""
    moved: Tensor | None
    """q = mean ‖ε_θ - ε_ref‖²; None where the loss does not need it."""
    logits: Tensor | None
    """z, (B,), with gain 1; None without a reference."""
    beta: float
    steps: int
    """T."""
    reference_point: Tensor | None
    """κ, 0-d; None where the loss has none."""


def sft(terms: Terms) -> tuple[Tensor, Tensor]:
    """Return the error on the winners alone, (B,), and an empty z, (0,)."""
    winner, _ = terms.policy.chunk(2)
    return winner, winner.new_empty(0)


def dspo(terms: Terms) -> tuple[Tensor, Tensor]:
    """Return DSPO's loss in its SD1.5 form (Zhu et al., ICLR 2025), (B,), and z, (B,).

    The loss is ‖e_w - βs(ε_θ-ε_ref)‖² of the winner, with s = 1-σ(z). z carries its gradient. The code computes the loss from mean
    squares, with ⟨e_w, ε_θ-ε_ref⟩ = (d(θ,w) + q_w - d(ref,w))/2.

    DSPO's own code trains SD1.5 at β = 0.001. At the start s is one half. Where βs is above 1, the gradient moves the policy away from
    the winner's noise.
    """
    assert terms.reference is not None and terms.moved is not None and terms.logits is not None
    (winner, _), (reference, _), (moved, _) = (each.chunk(2) for each in (terms.policy, terms.reference, terms.moved))
    strength = terms.beta * torch.sigmoid(-terms.logits)
    return winner - strength * (winner + moved - reference) + strength.square() * moved, terms.logits


def kto(terms: Terms) -> tuple[Tensor, Tensor]:
    """Return Diffusion-KTO's loss (Li et al. 2024, arXiv 2404.04465), (B,), and z, (B,).

    A sample's loss is 1 - σ(±β(δ-κ)), with + for winners and - for losers. A pair's loss is the mean over its two samples.
    δ = -(d(θ) - d(ref)) is a sample's lead. κ is the mean lead of all samples, from :class:`.reference_point.ReferencePoint`.
    """
    assert terms.reference is not None and terms.logits is not None and terms.reference_point is not None
    winner, loser = (terms.beta * (terms.reference - terms.policy - terms.reference_point)).chunk(2)
    return (torch.sigmoid(-winner) + torch.sigmoid(loser)) / 2, terms.logits


# From MaPO's code: the weight of the preference term, and the factor on the errors.
MAPO_WEIGHT, MAPO_SCALE = 0.1, 0.5


def mapo(terms: Terms) -> tuple[Tensor, Tensor]:
    """Return MaPO's loss (Hong et al. 2024, arXiv 2406.06424), (B,), and z, (B,).

    The loss is d_w - 0.1 log σ(z), with z = T[f(d_w) - f(d_l)] and f(d) = 0.5d/(e^{0.5d}-1).
    """
    scaled = MAPO_SCALE * terms.policy
    # f is written as x e^{-x}/(1-e^{-x}), because this form overflows for no x.
    winner, loser = (scaled * torch.exp(-scaled) / -torch.expm1(-scaled)).chunk(2)
    z = terms.steps * (winner - loser)
    return terms.policy.chunk(2)[0] + MAPO_WEIGHT * F.softplus(-z), z


def preserve_winner(policy: Tensor, inner: Tensor, elements: int, share: float) -> Tensor:
    """Return the errors, (2B,), with the same values, but scale down the loser's gradient where it would raise the winner's error.

    To first order, a step changes the winner's error by ‖e_w‖² through the winner's term and by ⟨e_w,e_l⟩ through the loser's term.
    Where Σ⟨e_w,e_l⟩ > 0, the loser's gradient is multiplied by clip((1-μ) Σ‖e_w‖² / (Σ⟨e_w,e_l⟩ + 1e-9), 0, 1). Elsewhere it stays
    whole. SDPO's code sums over a local batch, so its result depends on the micro-batch size. This function sums over the elements of
    one pair instead.

    Args:
        policy: d(θ,·), (2B,): B winners, then their B losers.
        inner: mean of e_w·e_l, (B,).
        elements: number of elements of a latent, C·H·W.
        share: μ. SDPO's runs use 0.9 for SD1.5 and 0.6 for SDXL.
    """
    winner, loser = policy.chunk(2)
    scale = (1 - share) * winner.detach() * elements / (inner * elements + 1e-9)
    scale = torch.where(inner > 0, scale.clamp(0, 1), 1)
    fixed = loser.detach()
    return torch.cat([winner, fixed + scale * (loser - fixed)])
