"""The table of objectives. To add one, add a row to :data:`OBJECTIVES`, and its line to the README beside this file.

Loss, gradient weight, credit profile, held-out evaluation, command line and comparison tool all read the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dde_ds.objective import losses
from dde_ds.objective.losses import Terms
from dde_ds.objective.schedule import NoiseSchedule

Gain = Callable[[NoiseSchedule, float], Tensor]
"""g_t for every timestep, (T,) float64, from the schedule and the discount γ."""


OwnLoss = Callable[[Terms], tuple[Tensor, Tensor]]
"""Loss of each pair, (B,), and the z that metrics tell of it, (B,), or (0,) where there is none."""


class ObjectiveSpec(NamedTuple):
    """What makes an objective this objective."""

    gain: Gain
    """g_t, what a margin at timestep t is multiplied by."""

    symbol: str
    """g_t as the README's table writes it."""

    source: str
    """Where it comes from, as the README's table says."""

    corrected: bool = False
    """Add the stepwise correction η K_t."""

    discounted: bool = False
    """Let ``discount_mode: sample`` draw t in proportion to g_t instead of multiplying by it."""

    needs_reference: bool = True
    """Compare with a frozen reference. False: the loss is the policy's error on the winner alone."""

    own_loss: OwnLoss | None = None
    """A loss of its own. None: the link of z, which the option ``link`` names."""

    needs_prediction: bool = False
    """Its loss holds ‖ε_θ - ε_ref‖², for which the reference's errors alone are too little."""

    has_reference_point: bool = False
    """Keep the mean lead of all samples, :mod:`.reference_point`."""


def single_shot(schedule: NoiseSchedule, discount: float) -> Tensor:
    """Return w_t = 1/SNR(t), (T,) float64: errors of the noise become errors of the image that one step to x₀ gives (eq. 11)."""
    return schedule.single_shot_weight


def calibrated(schedule: NoiseSchedule, discount: float) -> Tensor:
    """Return 1/ᾱ_t, (T,) float64, in the place of w_t. With η = 2 it is DDE's estimate for the single-shot variance σ² = 1-ᾱ_t, which is that of
    x₀ given x_t for Gaussian data of unit variance; w_t with η = 1 is that for σ² = ½."""
    return 1 / schedule.alphas_cumprod


def flat(schedule: NoiseSchedule, discount: float) -> Tensor:
    """Return 1 for every timestep, (T,) float64."""
    return torch.ones(schedule.num_train_timesteps, dtype=torch.float64)


def discounted(schedule: NoiseSchedule, discount: float) -> Tensor:
    """Return γ^(T-1-t), (T,) float64, counted from the noisy start."""
    return torch.tensor(discount, dtype=torch.float64) ** torch.arange(
        schedule.num_train_timesteps - 1, -1, -1, dtype=torch.float64
    )


OBJECTIVES: dict[str, ObjectiveSpec] = {
    "dde": ObjectiveSpec(single_shot, "w_t", "eq. 11", corrected=True),
    "dde_single": ObjectiveSpec(single_shot, "w_t", "ablation, sec. 4.5"),
    "dde_step": ObjectiveSpec(flat, "1", "ablation, sec. 4.5", corrected=True),
    "uniform": ObjectiveSpec(flat, "1", "eq. 12: Diffusion-DPO, D3PO"),
    "discounted": ObjectiveSpec(discounted, "γ^(T-1-t)", "dense-reward view", discounted=True),
    "sft": ObjectiveSpec(flat, "", "error on winners alone; no reference", needs_reference=False, own_loss=losses.sft),
    "dspo": ObjectiveSpec(flat, "1", "DSPO, form of SD1.5; loss of its own", own_loss=losses.dspo, needs_prediction=True),
    "kto": ObjectiveSpec(
        flat, "1", "Diffusion-KTO, arXiv 2404.04465; loss of its own", own_loss=losses.kto, has_reference_point=True
    ),
    "mapo": ObjectiveSpec(flat, "", "MaPO, arXiv 2406.06424; no reference", needs_reference=False, own_loss=losses.mapo),
}

COMPARING = tuple(name for name, spec in OBJECTIVES.items() if spec.needs_reference)
"""Names of the objectives that compare pairs with a reference."""

LINKED = tuple(name for name, spec in OBJECTIVES.items() if not spec.own_loss)
"""Names of the objectives whose loss is a link of z, and whose gain and correction share out the credit."""
