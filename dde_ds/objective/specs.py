"""The table of objectives. To add an objective, add a row to :data:`OBJECTIVES` and its line to the README beside this file.

The loss, its gradient weight, the credit profile, the held-out evaluation, the command line and the comparison tool all read this table.
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
"""A function from the schedule and the discount γ to g_t for every timestep, (T,) float64."""


OwnLoss = Callable[[Terms], tuple[Tensor, Tensor]]
"""A function that returns the loss of each pair, (B,), and z for the metrics, (B,), or an empty z, (0,), for a loss without z."""


class ObjectiveSpec(NamedTuple):
    """Describe one objective: its gain, loss and needs."""

    gain: Gain
    """g_t, the factor on a margin at timestep t."""

    symbol: str
    """g_t in the README's notation."""

    source: str
    """The objective's source, as in the README's table."""

    corrected: bool = False
    """Add the stepwise correction η K_t."""

    discounted: bool = False
    """With ``discount_mode: sample``, draw t in proportion to g_t instead of multiplying by g_t."""

    needs_reference: bool = True
    """Compare the policy with a frozen reference. False: the loss uses the policy's errors alone."""

    own_loss: OwnLoss | None = None
    """The objective's own loss. None: the loss is the link of z that the option ``link`` names."""

    needs_prediction: bool = False
    """The loss contains ‖ε_θ - ε_ref‖², so it needs the reference's prediction: the reference's errors do not suffice."""

    has_reference_point: bool = False
    """Keep the mean lead of all samples; see :mod:`.reference_point`."""


def single_shot(schedule: NoiseSchedule, discount: float) -> Tensor:
    """Return w_t = 1/SNR(t), (T,) float64 (eq. 11). w_t turns a noise error into the error of the one-step estimate of x₀."""
    return schedule.single_shot_weight


def calibrated(schedule: NoiseSchedule, discount: float) -> Tensor:
    """Return 1/ᾱ_t, (T,) float64, to be used instead of w_t.

    With η = 2 this gain gives DDE's estimate for the single-shot variance σ² = 1-ᾱ_t. That is the variance of x₀ given x_t for
    Gaussian data of unit variance. w_t with η = 1 corresponds to σ² = ½.
    """
    return 1 / schedule.alphas_cumprod


def flat(schedule: NoiseSchedule, discount: float) -> Tensor:
    """Return 1 for every timestep, (T,) float64."""
    return torch.ones(schedule.num_train_timesteps, dtype=torch.float64)


def discounted(schedule: NoiseSchedule, discount: float) -> Tensor:
    """Return γ^(T-1-t), (T,) float64. The exponent counts steps from the noisy start."""
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
"""Names of the objectives that compare the policy with a reference."""

LINKED = tuple(name for name, spec in OBJECTIVES.items() if not spec.own_loss)
"""Names of the objectives whose loss is a link of z. Their gain and correction distribute the credit over timesteps."""
