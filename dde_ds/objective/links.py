"""The table of links. A link is a function from a pair's z to its loss.

To add a link, add a row to :data:`LINKS` and its line to the README beside this file.

    p    the certainty that the winner is the better image: 1, or 1-ε with label smoothing, or the pair's own share of votes
    β    the objective's β

``logistic`` pushes a pair that is far on the wrong side with full weight for ever. ``sigmoid`` stops pushing such a pair.
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
"""p: one number, or one for each pair, (B,)."""

SUREST = 1 - 1e-6
"""The largest p of ``dmpo``. At p = 1 its loss would be infinite."""


class Link(NamedTuple):
    """A link's loss, (B,), and its gradient weight -∂loss/∂z, (B,), as functions of z, (B,), p and β."""

    loss: Callable[[Tensor, Label, float], Tensor]
    weight: Callable[[Tensor, Label, float], Tensor]

    formula: str
    """The loss in the README's notation."""

    source: str
    """The link's source, as in the README's table."""

    smoothing: bool = False
    """The link accepts ``label_smoothing``."""

    soft_labels: bool = False
    """The link accepts each pair's own label."""

    one_sided: bool = False
    """The link saturates on one side: a pair far ahead teaches nothing more, and a pair far behind keeps its full weight."""


class BoundLink(NamedTuple):
    """A link with β and label smoothing set. Its functions take z, (B,), and optionally each pair's own p, (B,)."""

    loss: Callable[..., Tensor]
    weight: Callable[..., Tensor]


def bind(link: Link, beta: float, label_smoothing: float) -> BoundLink:
    """Return ``link`` with β set. A call without labels uses p = 1 - ``label_smoothing``."""

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
    """Return log p and log(1-p), with p clamped to 1e-6 … 1-1e-6.

    The computation runs in float64, because float32 keeps hardly a digit of 1e-6 in 1-1e-6.
    """
    if isinstance(p, Tensor):
        clamped = p.double().clamp(1 - SUREST, SUREST)
        return clamped.log().to(z.dtype), (1 - clamped).log().to(z.dtype)
    clamped = min(max(p, 1 - SUREST), SUREST)
    return math.log(clamped), math.log(1 - clamped)


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
    # The loss divides by 2p-1, which is 0 for a pair with equal votes. So this link takes one rate of wrong labels, but no label of
    # each pair.
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
