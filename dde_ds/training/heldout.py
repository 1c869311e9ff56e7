"""Evaluation on held-out pairs: the same pairs, timesteps and noise each time, so that numbers compare over a run, between runs and
between objectives.

Each pair is seen at one of nine fixed timesteps, t = T/10 … 9T/10, in rotation: for a given number of forward passes more
pairs say more than more timesteps of the same pair.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dde_ds.config import RunConfig
from dde_ds.data.mixture import MixedShards
from dde_ds.data.order import Order
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset
from dde_ds.data.shards import ShardSet
from dde_ds.distributed.collectives import sum_over_ranks
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.objective import losses
from dde_ds.objective.objective import Objective
from dde_ds.objective.schedule import NoiseSchedule
from dde_ds.training.batches import Batch
from dde_ds.training.reference import frozen_model
from dde_ds.training.step import errors_of
from dde_ds.training.stop import StopRequest, none_if_stopped

# β of `loss_uniform`, the Diffusion-DPO loss that all runs share whatever they train on.
COMMON_BETA = 2000.0


class HeldOut:
    """One rank's part of the first ``pairs`` held-out pairs (None: all), in an order that no run's seed changes.

    All ranks hold the same number of pairs, since under ZeRO-3 a forward pass is a collective: where the pairs do not divide,
    some are evaluated twice, with weight 0.
    """

    def __init__(
        self,
        shards: ShardSet | MixedShards,
        schedule: NoiseSchedule,
        pairs: int | None = None,
        micro: int = 32,
        rank: int = 0,
        world: int = 1,
    ):
        self.schedule, self.micro = schedule, micro
        order = Order(shards.counts, 0, block=1)
        self.pairs = min(pairs or order.samples, order.samples)
        self._dataset = PairDataset(shards, order, PairRng(0, torch.ones(schedule.num_train_timesteps)))
        own = range(rank, rank + world * -(-self.pairs // world), world)
        self._positions = [position % self.pairs for position in own]
        self.weight = torch.tensor([float(position < self.pairs) for position in own], dtype=torch.float64)
        """(n,): 1, or 0 for a pair that another rank evaluates."""
        quantiles = torch.arange(1, 10) * schedule.num_train_timesteps // 10
        self.timesteps = quantiles[torch.tensor(self._positions) % 9]
        """(n,) int64."""

    def errors(self, unet: torch.nn.Module, poll: Callable[[], None] | None = None) -> Tensor:
        """Return the UNet's errors on winners and on losers, (2,n) float64 on the CPU. Under ZeRO-3 all ranks call this together.

        ``poll`` is called before each batch, as often on every rank; what it raises ends the evaluation.
        """
        parameter = next(unet.parameters())
        found = []
        for low in range(0, len(self._positions), self.micro):
            if poll:
                poll()
            chosen = slice(low, low + self.micro)
            pairs = self._dataset.collate([self._dataset.pair(position) for position in self._positions[chosen]])
            batch = Batch(**{**pairs, "timesteps": self.timesteps[chosen]})
            errors = errors_of(frozen_model(unet), self.schedule, batch, parameter.device, parameter.dtype)
            found.append(errors.view(2, -1).double().cpu())
        return torch.cat(found, 1)

    def summary(self, objective: Objective, policy: Tensor, base: Tensor) -> dict[str, Tensor]:
        """Return this rank's share of each number, from (2,n) errors: the sum over ranks is the number. 0-d float64 tensors.

        ``loss`` is the objective's own, comparable between runs of one objective; ``loss_uniform`` is the Diffusion-DPO loss at
        β = 2000, and ``accuracies`` the share of pairs with m < 0, those with m = 0 as one half, comparable between all; the drifts are d(θ) - d(base).
        """
        chosen, rejected = policy - base
        m = chosen - rejected
        own = policy[0]
        if objective.needs_reference:
            device = objective.table.correction.device
            own = objective.link.loss(objective.logits(m.to(device), self.timesteps.to(device))).cpu()
        numbers = {
            "loss": own,
            "loss_uniform": losses.logistic_loss(losses.logits(m, torch.ones(()), torch.zeros(()), COMMON_BETA, 0.0)),
            "accuracies": losses.share_ahead(-m),
            "drift_chosen": chosen,
            "drift_rejected": rejected,
        }
        return {name: (self.weight * value).sum() / self.pairs for name, value in numbers.items()}


class HeldOutEvaluator:
    """Evaluates the policy on held-out pairs when that is due. Never due where a run has none.

    Make it before a checkpoint is loaded, while the policy still has its base's weights: their errors are measured once, here.
    Collective, as is :meth:`evaluate`; a request to stop ends both early.
    """

    def __init__(
        self,
        run: RunConfig,
        shards: ShardSet | MixedShards | None,
        objective: Objective,
        policy: torch.nn.Module,
        ranks: DistributedEnv,
        stop: StopRequest,
    ):
        self._every, self._last = run.evaluation.every, run.steps
        self._objective, self._policy, self._stop = objective, policy, stop
        self._held_out = None
        if shards:
            held_out = HeldOut(
                shards, objective.schedule, run.evaluation.pairs, run.batch.micro_batch_size, ranks.rank, ranks.world_size
            )
            self._held_out = held_out
            self._base = none_if_stopped(lambda: held_out.errors(policy, stop.poll))

    def due(self, step: int) -> bool:
        return self._held_out is not None and (step % self._every == 0 or step == self._last)

    def evaluate(self) -> dict[str, float]:
        """Return ``eval/…`` numbers for a row of ``metrics.jsonl``; empty where a request to stop came between."""
        held_out = self._held_out
        assert held_out is not None  # otherwise never due
        errors = none_if_stopped(lambda: held_out.errors(self._policy, self._stop.poll))
        if errors is None:
            return {}
        shares = held_out.summary(self._objective, errors, self._base)
        device = self._objective.table.correction.device
        values = sum_over_ranks(torch.stack(list(shares.values())).to(device)).tolist()
        return {f"eval/{name}": value for name, value in zip(shares, values, strict=True)}


def error_drift(
    policy: torch.nn.Module, base: torch.nn.Module, schedule: NoiseSchedule, shards: ShardSet | MixedShards
) -> dict[str, float]:
    """Return mean errors over every pair of ``shards``: how far a policy has moved from its base.

    The known failure of this family of objectives: accuracy rises while *both* errors grow, the loser's faster. A model that
    improves keeps its winners' error where it was.

    Gives ``policy_chosen``, ``policy_rejected``, ``reference_chosen`` and ``reference_rejected``.
    """
    held_out = HeldOut(shards, schedule)
    means = torch.cat([held_out.errors(policy), held_out.errors(base)]).mean(1)
    return dict(zip(("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"), means.tolist(), strict=True))
