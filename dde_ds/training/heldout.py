"""Evaluation on held-out pairs.

Every evaluation uses the same pairs, timesteps and noise. So its numbers compare over a run, between runs and between objectives.

Each pair is evaluated at one of ten fixed timesteps, in rotation. These are the midpoints of the tenths: 50, 150 … 950 of 1000. Use one
timestep a pair: for the same cost, more pairs tell more than more timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

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
from dde_ds.objective.fused import noise_errors, noise_sums
from dde_ds.objective.objective import Objective
from dde_ds.objective.schedule import NoiseSchedule, NoiseTarget
from dde_ds.training.batches import Batch
from dde_ds.training.reference import frozen_model
from dde_ds.training.step import predictions_of
from dde_ds.training.stop import StopRequest, none_if_stopped

# β of `loss_uniform`, the Diffusion-DPO loss that every run reports, whatever its objective.
COMMON_BETA = 2000.0


TENTHS = 10


class HeldOutErrors(NamedTuple):
    """The errors of a policy and its base on one rank's pairs, (2,n) float64 each, on the CPU: row 0 for winners, row 1 for losers."""

    policy: Tensor
    """d(θ,·)."""
    base: Tensor
    """d(base,·)."""
    moved: Tensor
    """Mean ‖ε_θ - ε_base‖² over a latent's elements."""
    soft_labels: Tensor | None
    """The winners' shares of the votes, (n,) float32. None where the shards do not hold them."""


class HeldOut:
    """One rank's part of the first ``pairs`` held-out pairs (None: all), in an order that does not depend on a run's seed.

    All ranks hold the same number of pairs, because under ZeRO-3 a forward pass is a collective. Where the pairs do not divide evenly,
    some pairs are evaluated a second time, with weight 0.
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
        assigned = range(rank, rank + world * -(-self.pairs // world), world)
        self._positions = [position % self.pairs for position in assigned]
        self.weight = torch.tensor([float(position < self.pairs) for position in assigned], dtype=torch.float64)
        """(n,): 1, or 0 for a pair that another rank evaluates."""
        self.elements = math.prod(shards.latent_shape)
        """Number of elements of a latent."""
        steps = schedule.num_train_timesteps
        midpoints = (2 * torch.arange(TENTHS) + 1) * steps // (2 * TENTHS)
        tenths = torch.tensor(self._positions) % TENTHS
        self.timesteps = midpoints[tenths]
        """(n,) int64."""
        # A midpoint stands for its whole tenth. So its pairs share the tenth's Σλ.
        weight = torch.zeros(TENTHS, dtype=torch.float64)
        weight.index_add_(0, torch.arange(steps) * TENTHS // steps, schedule.stepwise_weight.cpu())
        seen = torch.bincount(torch.arange(self.pairs) % TENTHS, minlength=TENTHS)
        self._path_weight = (self.elements * self.pairs * weight / seen.clamp_min(1))[tenths]

    def errors(self, unet: torch.nn.Module, poll: Callable[[], None] | None = None) -> Tensor:
        """Return the UNet's errors on winners and on losers, (2,n) float64 on the CPU. Collective under ZeRO-3.

        ``poll`` is called before each batch, equally often on every rank. An exception from ``poll`` ends the evaluation.
        """
        batches = [noise_errors(prediction, None, target)[0] for prediction, target, _ in self._predicted(unet, poll)]
        return torch.cat([_two_rows(errors) for errors in batches], 1)

    def predictions(self, unet: torch.nn.Module, poll: Callable[[], None] | None = None) -> list[Tensor]:
        """Return the UNet's predictions for :meth:`measure`: one tensor a batch, on the CPU, in the UNet's dtype.

        ``poll`` and collectives work as in :meth:`errors`.
        """
        return [prediction.cpu() for prediction, *_ in self._predicted(unet, poll)]

    def measure(self, unet: torch.nn.Module, base: list[Tensor], poll: Callable[[], None] | None = None) -> HeldOutErrors:
        """Compare the UNet with its base. ``base`` is the result of :meth:`predictions` for the base.

        ``poll`` and collectives work as in :meth:`errors`.
        """
        batches: list[list[Tensor]] = []
        labels = []
        for (prediction, target, batch), other in zip(self._predicted(unet, poll), base, strict=True):
            sums = noise_sums(prediction, other.to(prediction.device), target, moved=True)
            batches.append([_two_rows(each) for each in (sums.policy, sums.reference, sums.moved) if each is not None])
            labels += [] if batch.soft_label is None else [batch.soft_label]
        policy, other, moved = (torch.cat(parts, 1) for parts in zip(*batches, strict=True))
        return HeldOutErrors(policy, other, moved, torch.cat(labels) if labels else None)

    def _predicted(self, unet: torch.nn.Module, poll: Callable[[], None] | None) -> Iterator[tuple[Tensor, NoiseTarget, Batch]]:
        parameter = next(unet.parameters())
        for low in range(0, len(self._positions), self.micro):
            if poll:
                poll()
            chosen = slice(low, low + self.micro)
            pairs = self._dataset.collate([self._dataset.pair(position) for position in self._positions[chosen]])
            batch = Batch(**{**pairs, "timesteps": self.timesteps[chosen]})
            yield *predictions_of(frozen_model(unet), self.schedule, batch, parameter.device, parameter.dtype), batch

    def path_kl(self, errors: HeldOutErrors) -> Tensor:
        """Return this rank's share of the path KL between policy and base in nats, a 0-d float64 tensor. The sum over ranks is the path KL.

        The path KL is D Σ_t λ_t E‖ε_θ - ε_base‖² over winners and losers, where each tenth's midpoint stands for the whole tenth. With
        fewer than ten pairs, some tenths are missing from the sum.
        """
        return (self.weight * self._path_weight * errors.moved.mean(0)).sum() / self.pairs

    def summary(self, objective: Objective, errors: HeldOutErrors) -> dict[str, Tensor]:
        """Return this rank's share of each number, as 0-d float64 tensors. The sum over ranks is the number.

        ``loss`` is the objective's own loss, which compares between runs of one objective. ``loss_uniform`` is the Diffusion-DPO loss at
        β = 2000. ``accuracies`` is the share of pairs with m < 0, where a pair with m = 0 counts one half. These two compare between all
        runs. ``drift_chosen`` and ``drift_rejected`` are d(θ) - d(base) of winners and losers. ``path_kl`` comes from :meth:`path_kl`.
        """
        chosen, rejected = errors.policy - errors.base
        m = chosen - rejected
        device = objective.table.correction.device
        policy, base, moved = (rows.flatten().to(device) for rows in (errors.policy, errors.base, errors.moved))
        labels = errors.soft_labels.to(device) if objective.options.soft_labels and errors.soft_labels is not None else None
        reference = base if objective.needs_reference else None
        own_losses, _ = objective.pair_losses(self.timesteps.to(device), policy, reference, moved, labels)
        numbers = {
            "loss": own_losses.cpu(),
            "loss_uniform": losses.logistic_loss(losses.logits(m, torch.ones(()), torch.zeros(()), COMMON_BETA, 0.0)),
            "accuracies": losses.share_ahead(-m),
            "drift_chosen": chosen,
            "drift_rejected": rejected,
        }
        shares = {name: (self.weight * value).sum() / self.pairs for name, value in numbers.items()}
        return shares | {"path_kl": self.path_kl(errors)}


def _two_rows(errors: Tensor) -> Tensor:
    """Return errors, (2B,), as (2,B) float64 on the CPU."""
    return errors.view(2, -1).double().cpu()


class HeldOutEvaluator:
    """The evaluations of the policy on held-out pairs. None is ever due in a run without held-out pairs.

    Create the evaluator before a checkpoint is loaded, while the policy still has its base's weights. The evaluator keeps the base's
    predictions in host memory. Creating it and :meth:`evaluate` are collective. A request to stop ends both early.
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
            self._base = none_if_stopped(lambda: held_out.predictions(policy, stop.poll))

    def due(self, step: int) -> bool:
        return self._held_out is not None and (step % self._every == 0 or step == self._last)

    def evaluate(self) -> dict[str, float]:
        """Return ``eval/…`` numbers for a row of ``metrics.jsonl``. Return nothing where a request to stop ended the evaluation. Collective."""
        held_out, base = self._held_out, self._base
        assert held_out is not None and base is not None  # Otherwise no evaluation is due, or the run was stopped before it began.
        errors = none_if_stopped(lambda: held_out.measure(self._policy, base, self._stop.poll))
        if errors is None:
            return {}
        shares = held_out.summary(self._objective, errors)
        device = self._objective.table.correction.device
        values = sum_over_ranks(torch.stack(list(shares.values())).to(device)).tolist()
        return {f"eval/{name}": value for name, value in zip(shares, values, strict=True)}


def error_drift(
    policy: torch.nn.Module, base: torch.nn.Module, schedule: NoiseSchedule, shards: ShardSet | MixedShards
) -> dict[str, float]:
    """Return mean errors over every pair of ``shards``, which show how far a policy has moved from its base.

    This family of objectives has a known failure: accuracy rises while *both* errors grow, the loser's faster. A model that improves
    keeps its error on winners.

    Returns:
        The mean errors ``policy_chosen``, ``policy_rejected``, ``reference_chosen`` and ``reference_rejected``, and ``path_kl``, the path
        KL between the two models in nats.
    """
    held_out = HeldOut(shards, schedule)
    errors = held_out.measure(policy, held_out.predictions(base))
    means = torch.cat([errors.policy, errors.base]).mean(1).tolist()
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    return dict(zip(names, means, strict=True)) | {"path_kl": held_out.path_kl(errors).item()}
