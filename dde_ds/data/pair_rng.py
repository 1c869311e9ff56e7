"""The random draws of a pair, each a pure function of (seed, position).

Timesteps are stratified. A stratum is T consecutive positions, where T is the number of timesteps. Each stratum has its own random
permutation of 0…T-1. With it,

    u = (permutation[position mod T] + U(0,1)) / T        t = the inverse of the cumulative p(t) at u

Each single draw equals t with probability p(t). For every k, the number of draws below k in a stratum is T · P(t < k), rounded down or up.
Under a uniform p, a stratum draws each timestep exactly once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# The random streams of one position. The draws of a stream do not depend on how many numbers another stream took.
TRAINING, FLIP, POSTERIOR, STRATUM = 0, 1, 2, 3


class PairRng:
    """The timestep, noise, caption dropout, flip and posterior noise of the pair at a position.

    The generator is counter-based, with the seed as its key and the position in its counter. It keeps no state. So no draw depends on
    ranks, workers, micro-batches or earlier draws.
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
        # Divide by the largest weight. Sums of equal probabilities are then exact, and no draw on a cell's edge falls into the cell before.
        weights = timestep_probabilities.double().numpy()
        self.cumulative = (weights / weights.max()).cumsum()
        self._last = int(np.searchsorted(self.cumulative, self.cumulative[-1]))  # The last timestep with a probability above 0.
        self._stratum = (-1, np.empty(0, dtype=np.int64))  # The number and the permutation of the last stratum.

    def __call__(self, position: int, shape: tuple[int, ...]) -> tuple[int, Tensor, bool]:
        """Draw the timestep, the noise, and whether to drop the caption, for the pair at ``position``.

        ``shape`` is the pair's, (2,C,H,W). The noise is float32, (1,C,H,W) where winner and loser share it, otherwise (2,C,H,W).
        """
        random = self._random(position, TRAINING)
        uniform = random.random(2)
        timestep = self._timestep(position, uniform[0])
        noise = random.standard_normal((1 if self.shared_noise else 2, *shape[1:]), dtype=np.float32)
        return timestep, torch.from_numpy(noise), bool(uniform[1] < self.caption_dropout)

    def timestep(self, position: int) -> int:
        """Return the timestep alone, the same as a call returns."""
        return self._timestep(position, self._random(position, TRAINING).random())

    def _timestep(self, position: int, uniform: float) -> int:
        steps = len(self.cumulative)
        number, place = divmod(position, steps)
        known, permutation = self._stratum
        if known != number:  # A worker reads positions in order, so remembering one permutation suffices.
            permutation = self._random(number, STRATUM).permutation(steps)
            self._stratum = (number, permutation)
        cell = (permutation[place] + uniform) * (self.cumulative[-1] / steps)
        return min(int(np.searchsorted(self.cumulative, cell, side="right")), self._last)

    def flipped(self, position: int) -> bool:
        """Return whether to train on the mirrored pair. With ``flip`` this is true for half of the positions, otherwise for none."""
        return self.flip and bool(self._random(position, FLIP).random() < 0.5)

    def posterior_noise(self, position: int, shape: tuple[int, ...]) -> Tensor:
        """Return standard normal noise of ``shape``, float32, for a draw from the VAE's posterior. The two images' noises are independent."""
        return torch.from_numpy(self._random(position, POSTERIOR).standard_normal(shape, dtype=np.float32))

    def _random(self, position: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, stream, position, 0]))
