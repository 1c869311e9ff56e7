"""The random draws of a pair, each a pure function of (seed, position).

Timesteps are stratified. Positions fall into strata of T, the number of timesteps; with a random permutation of 0…T-1 for each stratum,

    u = (permutation[position mod T] + U(0,1)) / T        t = the inverse of the cumulative p(t) at u

Each t alone has the probability p(t). For every k, the number of draws below k in a stratum is T · P(t < k), rounded down or up: under
uniform p each timestep comes exactly once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Streams of one position: what one of them draws never depends on how much another took.
TRAINING, FLIP, POSTERIOR, STRATUM = 0, 1, 2, 3


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
        # In parts of the largest: sums of equal probabilities are then exact, and no draw on the edge of a cell falls into the one before.
        weights = timestep_probabilities.double().numpy()
        self.cumulative = (weights / weights.max()).cumsum()
        self._last = int(np.searchsorted(self.cumulative, self.cumulative[-1]))  # the last timestep that has a probability
        self._stratum = (-1, np.empty(0, dtype=np.int64))  # the last one's number and permutation

    def __call__(self, position: int, shape: tuple[int, ...]) -> tuple[int, Tensor, bool]:
        """``shape`` is the pair's, (2,C,H,W). Gives back t, noise float32 (1,C,H,W) or (2,C,H,W), and whether to drop the caption."""
        random = self._random(position, TRAINING)
        uniform = random.random(2)
        timestep = self._timestep(position, uniform[0])
        noise = random.standard_normal((1 if self.shared_noise else 2, *shape[1:]), dtype=np.float32)
        return timestep, torch.from_numpy(noise), bool(uniform[1] < self.caption_dropout)

    def timestep(self, position: int) -> int:
        """The timestep alone, as a call gives it."""
        return self._timestep(position, self._random(position, TRAINING).random())

    def _timestep(self, position: int, uniform: float) -> int:
        steps = len(self.cumulative)
        number, place = divmod(position, steps)
        known, permutation = self._stratum
        if known != number:  # a worker goes through positions in order, so that one is remembered
            permutation = self._random(number, STRATUM).permutation(steps)
            self._stratum = (number, permutation)
        cell = (permutation[place] + uniform) * (self.cumulative[-1] / steps)
        return min(int(np.searchsorted(self.cumulative, cell, side="right")), self._last)

    def flipped(self, position: int) -> bool:
        """Whether the pair is trained on mirrored: half of the positions where ``flip`` was asked for."""
        return self.flip and bool(self._random(position, FLIP).random() < 0.5)

    def posterior_noise(self, position: int, shape: tuple[int, ...]) -> Tensor:
        """What draws latents from the VAE's posterior: float32 of ``shape``, the two images' independent."""
        return torch.from_numpy(self._random(position, POSTERIOR).standard_normal(shape, dtype=np.float32))

    def _random(self, position: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, stream, position, 0]))
