"""The table of links: from a pair's z to its loss. To add one, add a row to :data:`LINKS`, and its line to the README beside this file.

    p    how sure the label is that the winner is the better one: 1, or 1-ε with label smoothing, or the pair's own share of votes
    β    the objective's

The logistic alone pushes a pair that is far on the wrong side with full weight for ever; ``sigmoid`` lets go of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dde_ds.objective.losses import logistic_loss, logistic_weight

Label = Tensor | float
"""p, a number or (B,)."""

SUREST = 1 - 1e-6
"""Largest p of ``dmpo``, whose loss is infinite at 1."""


class Link(NamedTuple):
    """From z, (B,), with p and β, to each pair's loss, and to what it leaves of the gradient, -∂loss/∂z, (B,)."""

    loss: Callable[[Tensor, Label, float], Tensor]
    weight: Callable[[Tensor, Label, float], Tensor]

    formula: str
    """As the README's table writes it."""

    source: str
    """Where it comes from, as the README's table says."""

    smoothing: bool = False
    """It has a meaning with ``label_smoothing``."""

    soft_labels: bool = False
    """It has a meaning with labels of a pair's own."""

    one_sided: bool = False
    """A pair far ahead teaches nothing more, and a pair far behind keeps its full weight."""


class BoundLink(NamedTuple):
    """A link with its β and label smoothing: functions of z, (B,), and optionally of the pairs' own p, (B,)."""

    loss: Callable[..., Tensor]
    weight: Callable[..., Tensor]


def bind(link: Link, beta: float, label_smoothing: float) -> BoundLink:
    """Return ``link`` with β and p = 1 - ``label_smoothing`` set, for pairs without a label of their own."""

    def with_label(function: Callable[[Tensor, Label, float], Tensor]) -> Callable[..., Tensor]:
        return lambda z, label=None: function(z, 1 - label_smoothing if label is None else label, beta)

    return BoundLink(with_label(link.loss), with_label(link.weight))


def _is_sure(label: Label) -> bool:
    return not isinstance(label, Tensor) and label == 1


def _logistic(z: Tensor, p: Label, beta: float) -> Tensor:
    return logistic_loss(z) if _is_sure(p) else p * F.softplus(-z) + (1 - p) * F.softplus(z)


def _logistic_weight(z: Tensor, p: Label, beta: float) -> Tensor:
    return logistic_weight(z) if _is_sure(p) else p * torch.sigmoid(-z) - (1 - p) * torch.sigmoid(z)


def _robust(z: Tensor, p: Label, beta: float) -> Tensor:
    return (p * F.softplus(-z) - (1 - p) * F.softplus(z)) / (2 * p - 1)


def _robust_weight(z: Tensor, p: Label, beta: float) -> Tensor:
    return (p * torch.sigmoid(-z) + (1 - p) * torch.sigmoid(z)) / (2 * p - 1)


def _held(p: Label, z: Tensor) -> tuple[Label, Label]:
    """log p and log (1-p), p held between 1e-6 and 1-1e-6, by float64: float32 has hardly a digit of 1e-6 left beside 1."""
    if isinstance(p, Tensor):
        held = p.double().clamp(1 - SUREST, SUREST)
        return held.log().to(z.dtype), (1 - held).log().to(z.dtype)
    held = min(max(p, 1 - SUREST), SUREST)
    return math.log(held), math.log(1 - held)


def _dmpo(z: Tensor, p: Label, beta: float) -> Tensor:
    right, wrong = _held(p, z)
    return torch.sigmoid(z) * (F.logsigmoid(z) - right) + torch.sigmoid(-z) * (F.logsigmoid(-z) - wrong)


def _dmpo_weight(z: Tensor, p: Label, beta: float) -> Tensor:
    right, wrong = _held(p, z)
    return torch.sigmoid(z) * torch.sigmoid(-z) * (right - wrong - z)


LINKS: dict[str, Link] = {
    "logistic": Link(
        _logistic,
        _logistic_weight,
        "p softplus(-z) + (1-p) softplus(z)",
        "DPO; cDPO where p < 1",
        smoothing=True,
        soft_labels=True,
        one_sided=True,
    ),
    # Divides by 2p-1, which is 0 for a pair whose votes are level: for one rate of wrong labels, not for labels of each pair.
    "robust": Link(
        _robust,
        _robust_weight,
        "[p softplus(-z) - (1-p) softplus(z)] / (2p-1)",
        "robust DPO, arXiv 2403.00409",
        smoothing=True,
        one_sided=True,
    ),
    "ipo": Link(
        lambda z, p, beta: ((z - 0.5) / beta).square(),
        lambda z, p, beta: (1 - 2 * z) / beta**2,
        "(z/β - 1/(2β))²",
        "IPO, arXiv 2310.12036",
    ),
    "hinge": Link(
        lambda z, p, beta: F.relu(1 - z),
        lambda z, p, beta: (z < 1).to(z.dtype),
        "relu(1-z)",
        "SLiC, arXiv 2305.10425",
        one_sided=True,
    ),
    "sigmoid": Link(
        lambda z, p, beta: torch.sigmoid(-z),
        lambda z, p, beta: torch.sigmoid(z) * torch.sigmoid(-z),
        "σ(-z)",
        "saturates on both sides",
    ),
    "dmpo": Link(
        _dmpo,
        _dmpo_weight,
        "σ(z) log(σ(z)/p) + σ(-z) log(σ(-z)/(1-p))",
        "reverse KL of two coins; p at most 1-1e-6",
        smoothing=True,
        soft_labels=True,
    ),
}
