"""The random draws of a pair, each a pure function of (seed, position)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Streams of one position: what one of them draws never depends on how much another took.
TRAINING, FLIP, POSTERIOR = 0, 1, 2


class PairRng:
    """Timestep, noise, caption dropout, flip and posterior noise of the pair at a position.

    A counter-based generator keyed by the seed and started at the position: no state, so no draw depends on ranks, workers,
    micro-batches or on what was drawn before.
    """

    def __init__(
        self,
        seed: int,
        timestep_probabilities: Tensor,
        shared_noise: bool = True,
        caption_dropout: float = 0.0,
        flip: bool = False,
    ):
        self.seed, self.shared_noise, self.caption_dropout, self.flip = seed, shared_noise, caption_dropout, flip
        self.cumulative = timestep_probabilities.cumsum(0).double().numpy()
        self.cumulative /= self.cumulative[-1]

    def __call__(self, position: int, shape: tuple[int, ...]) -> tuple[int, Tensor, bool]:
        """``shape`` is the pair's, (2,C,H,W). Gives back t, noise float32 (1,C,H,W) or (2,C,H,W), and whether to drop the caption."""
        random = self._random(position, TRAINING)
        uniform = random.random(2)
        timestep = int(np.searchsorted(self.cumulative, uniform[0], side="right"))
        noise = random.standard_normal((1 if self.shared_noise else 2, *shape[1:]), dtype=np.float32)
        return timestep, torch.from_numpy(noise), bool(uniform[1] < self.caption_dropout)

    def flipped(self, position: int) -> bool:
        """Whether the pair is trained on mirrored: half of the positions where ``flip`` was asked for."""
        return self.flip and bool(self._random(position, FLIP).random() < 0.5)

    def posterior_noise(self, position: int, shape: tuple[int, ...]) -> Tensor:
        """What draws latents from the VAE's posterior: float32 of ``shape``, the two images' independent."""
        return torch.from_numpy(self._random(position, POSTERIOR).standard_normal(shape, dtype=np.float32))

    def _random(self, position: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, stream, position, 0]))
