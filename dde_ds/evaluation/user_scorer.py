"""A scorer from a user's own file: ``my_scorers.py:Sharpness``. The README beside this file has a complete example."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dde_ds.errors import RankError, UserError
from dde_ds.evaluation.clip_loading import scorer_digest
from dde_ds.user_file import load_name, words


class UserScorer:
    """Check what a user's scorer gives, and follow the protocol :class:`dde_ds.evaluation.scorers.Scorer`.

    The file's class is called as ``NAME(device)``. It needs a method ``score(images, prompts)``. It may have a text ``digest`` of
    what else its scores depend on, such as weights.
    """

    def __init__(self, path: Path, name: str, device: torch.device):
        self.name, self._path, self._key = name, path, f"scorers {path}:{name}"
        made, digest = load_name(path, name, "scorers")
        try:
            self._scorer: Any = made(device)
        except Exception as error:  # the user's code may raise anything
            raise UserError(f"{self._key}: could not be made with {name}(device): {words(error, path)}") from error
        if not callable(getattr(self._scorer, "score", None)):
            raise UserError(f"{self._key}: has no method score(images, prompts)")
        own = getattr(self._scorer, "digest", "")
        if not isinstance(own, str):
            raise UserError(f"{self._key}: its digest is {own!r}: must be text")
        self.digest = scorer_digest(name, digest, own)

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Score N images, (N,) float64 on the CPU.

        Raises:
            RankError: the user's code fails, or does not give N numbers.
        """
        try:
            scores = torch.as_tensor(self._scorer.score(images, prompts), dtype=torch.float64).detach().cpu()
        except Exception as error:  # the user's code may raise anything
            raise RankError(f"{self._key}: score(images, prompts) failed: {words(error, self._path)}") from error
        if scores.shape != (len(images),):
            raise RankError(
                f"{self._key}: gave scores of shape {tuple(scores.shape)} for {len(images)} images; must be ({len(images)},)"
            )
        return scores
