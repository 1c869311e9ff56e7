"""The pairwise preference losses as pure functions of per-sample errors (arXiv 2411.14871, eq. 5, 11, 12).

B pairs; d(θ,w) … d(ref,l) are (B,) mean squared noise-prediction errors of policy and reference on winner and loser.

    m = [d(θ,w) - d(ref,w)] - [d(θ,l) - d(ref,l)]        negative where the policy already prefers the winner
    z = -(β/2) · (g_t · m + η · K_t)                      loss = -log σ(z)

The objectives differ in the gain g_t and in whether the stepwise correction K_t is there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dde_ds.objective.schedule import NoiseSchedule

OBJECTIVES = ("dde", "dde_single", "dde_step", "uniform", "discounted", "sft")
CORRECTED = ("dde", "dde_step")


def margin(policy_error: Tensor, reference_error: Tensor) -> Tensor:
    """m, (B,), from errors of shape (2B,): B winners, then B losers."""
    winner, loser = (policy_error - reference_error).chunk(2)
    return winner - loser


def logits(margin: Tensor, gain: Tensor, correction: Tensor, beta: float, correction_weight: float) -> Tensor:
    """z, (B,), from (B,) margins, gains g_t and corrections K_t."""
    return -(beta / 2) * (gain * margin + correction_weight * correction)


def preference_loss(logits: Tensor) -> Tensor:
    """-log σ(z), mean over pairs; exactly log 2 where policy and reference agree."""
    return F.softplus(-logits).mean()


def gain_table(name: str, schedule: NoiseSchedule, discount: float, discount_mode: str) -> Tensor:
    """g_t for every timestep, (T,) float64.

    ``dde``, ``dde_single``: w_t (eq. 11). ``dde_step``, ``uniform``: 1 (sec. 4.5; eq. 12, Diffusion-DPO and D3PO).
    ``discounted``: γ^(T-1-t), counted from the noisy start, or 1 where the discount is in the sampling of t instead.
    """
    if name in ("dde", "dde_single"):
        return schedule.single_shot_weight
    if name == "discounted" and discount_mode == "weight":
        return discount_profile(schedule.timesteps, discount)
    return torch.ones(schedule.timesteps, dtype=torch.float64)


def discount_profile(timesteps: int, discount: float) -> Tensor:
    """γ^(T-1-t), (T,) float64."""
    return torch.tensor(discount, dtype=torch.float64) ** torch.arange(timesteps - 1, -1, -1, dtype=torch.float64)
