"""Choose the part of a UNet that is trained: ``model.trainable``. All other parameters keep their values and get no gradients."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from dde_ds.errors import UserError


def trained_names(unet: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the parameters that match one of ``patterns``, in the UNet's order.

    A UNet without weights will do.

    Args:
        patterns: of whole names, where ``*`` is any text: :attr:`dde_ds.config.ModelConfig.trained_patterns`.

    Raises:
        UserError: a pattern matches no parameter.
    """
    names = [name for name, _ in unet.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"model.trainable names {pattern!r}: no parameter of the UNet has such a name; {_near(unet, pattern)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def train_part(unet: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters that match none of ``patterns``, in place.

    Raises:
        UserError: as :func:`trained_names`.
    """
    selected = set(trained_names(unet, patterns))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in selected)


def _near(unet: nn.Module, pattern: str) -> str:
    """Return words about patterns that do match and are close to ``pattern``."""
    modules = [name for name, module in unet.named_modules() if name and any(True for _ in module.parameters())]
    known = [f"{name}.*" for name in modules] + [f"*.{end}.*" for end in dict.fromkeys(name.split(".")[-1] for name in modules)]
    known += [name for name, _ in unet.named_parameters()]
    close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    return "near it: " + ", ".join(close or [f"{name}.*" for name, _ in unet.named_children()])
