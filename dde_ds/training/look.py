"""A look at the held-out pairs during a run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dde_ds.distributed import sum_over_ranks
from dde_ds.evaluation.heldout import HeldOut
from dde_ds.objective.objective import Objective


class Look:
    """Call it after a step, on all ranks. ``policy`` must still have its base's weights when this is made: the base's errors are
    measured once, then the pairs, timesteps and noise never change. ``poll`` is called between batches, and may end a look by raising."""

    def __init__(self, held_out: HeldOut, policy: torch.nn.Module, poll: Callable[[], None]):
        self._held_out, self._policy, self._poll = held_out, policy, poll
        self._base = held_out.errors(policy, poll)

    def __call__(self, objective: Objective) -> dict[str, float]:
        """``eval/…`` numbers for a row of ``metrics.jsonl``."""
        shares = self._held_out.summary(objective, self._held_out.errors(self._policy, self._poll), self._base)
        device = objective.table.correction.device
        values = sum_over_ranks(torch.stack(list(shares.values())).to(device)).tolist()
        return {f"eval/{name}": value for name, value in zip(shares, values, strict=True)}
