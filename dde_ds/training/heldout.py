"""Evaluation on held-out pairs: the same pairs, timesteps and noise each time, so that numbers compare over a run, between runs and
between objectives.

Each pair is seen at one of ten fixed timesteps, the midpoints of the tenths (50, 150 … 950 of 1000), in rotation: for a given number of
forward passes more pairs say more than more timesteps of the same pair.
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

# β of `loss_uniform`, the Diffusion-DPO loss that all runs share whatever they train on.
COMMON_BETA = 2000.0


TENTHS = 10


class Look(NamedTuple):
    """What one rank's pairs show of a policy and its base, winners then losers: (2,n) float64 each, on the CPU."""

    policy: Tensor
    """d(θ,·)."""
    base: Tensor
    """d(base,·)."""
    moved: Tensor
    """Mean ‖ε_θ - ε_base‖² over a latent's elements."""
    soft_labels: Tensor | None
    """The winners' shares of the votes, (n,) float32, where the shards hold them."""


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
        self.elements = math.prod(shards.latent_shape)
        """Of a latent."""
        steps = schedule.num_train_timesteps
        midpoints = (2 * torch.arange(TENTHS) + 1) * steps // (2 * TENTHS)
        tenths = torch.tensor(self._positions) % TENTHS
        self.timesteps = midpoints[tenths]
        """(n,) int64."""
        # Σλ of each tenth, for which its midpoint stands, over the pairs there are at it.
        weight = torch.zeros(TENTHS, dtype=torch.float64)
        weight.index_add_(0, torch.arange(steps) * TENTHS // steps, schedule.stepwise_weight.cpu())
        seen = torch.bincount(torch.arange(self.pairs) % TENTHS, minlength=TENTHS)
        self._path_weight = (self.elements * self.pairs * weight / seen.clamp_min(1))[tenths]

    def errors(self, unet: torch.nn.Module, poll: Callable[[], None] | None = None) -> Tensor:
        """Return the UNet's errors on winners and on losers, (2,n) float64 on the CPU. Under ZeRO-3 all ranks call this together.

        ``poll`` is called before each batch, as often on every rank; what it raises ends the evaluation.
        """
        found = [noise_errors(prediction, None, target)[0] for prediction, target, _ in self._predicted(unet, poll)]
        return torch.cat([_two_rows(errors) for errors in found], 1)

    def predictions(self, unet: torch.nn.Module, poll: Callable[[], None] | None = None) -> list[Tensor]:
        """Return the UNet's predictions on the CPU, a batch each, in its own type, for :meth:`look`. Called as :meth:`errors` is."""
        return [prediction.cpu() for prediction, *_ in self._predicted(unet, poll)]

    def look(self, unet: torch.nn.Module, base: list[Tensor], poll: Callable[[], None] | None = None) -> Look:
        """Compare the UNet with its base, whose :meth:`predictions` are given. Called as :meth:`errors` is."""
        found: list[list[Tensor]] = []
        labels = []
        for (prediction, target, batch), other in zip(self._predicted(unet, poll), base, strict=True):
            sums = noise_sums(prediction, other.to(prediction.device), target, moved=True)
            found.append([_two_rows(each) for each in (sums.policy, sums.reference, sums.moved) if each is not None])
            labels += [] if batch.soft_label is None else [batch.soft_label]
        policy, other, moved = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return Look(policy, other, moved, torch.cat(labels) if labels else None)

    def _predicted(self, unet: torch.nn.Module, poll: Callable[[], None] | None) -> Iterator[tuple[Tensor, NoiseTarget, Batch]]:
        parameter = next(unet.parameters())
        for low in range(0, len(self._positions), self.micro):
            if poll:
                poll()
            chosen = slice(low, low + self.micro)
            pairs = self._dataset.collate([self._dataset.pair(position) for position in self._positions[chosen]])
            batch = Batch(**{**pairs, "timesteps": self.timesteps[chosen]})
            yield *predictions_of(frozen_model(unet), self.schedule, batch, parameter.device, parameter.dtype), batch

    def path_kl(self, look: Look) -> Tensor:
        """Return this rank's share of the path KL between policy and base in nats, a 0-d float64 tensor: the sum over ranks is the number.

        That is D Σ_t λ_t E‖ε_θ - ε_base‖², winners and losers alike, where a tenth's midpoint stands for all of the tenth. With fewer than
        ten pairs some tenths are missing in it.
        """
        return (self.weight * self._path_weight * look.moved.mean(0)).sum() / self.pairs

    def summary(self, objective: Objective, look: Look) -> dict[str, Tensor]:
        """Return this rank's share of each number: the sum over ranks is the number. 0-d float64 tensors.

        ``loss`` is the objective's own, comparable between runs of one objective; ``loss_uniform`` is the Diffusion-DPO loss at
        β = 2000, and ``accuracies`` the share of pairs with m < 0, those with m = 0 as one half, comparable between all; the drifts are
        d(θ) - d(base), and ``path_kl`` is that of :meth:`path_kl`.
        """
        chosen, rejected = look.policy - look.base
        m = chosen - rejected
        device = objective.table.correction.device
        policy, base, moved = (rows.flatten().to(device) for rows in (look.policy, look.base, look.moved))
        labels = look.soft_labels.to(device) if objective.options.soft_labels and look.soft_labels is not None else None
        reference = base if objective.needs_reference else None
        own, _ = objective.pair_losses(self.timesteps.to(device), policy, reference, moved, labels)
        numbers = {
            "loss": own.cpu(),
            "loss_uniform": losses.logistic_loss(losses.logits(m, torch.ones(()), torch.zeros(()), COMMON_BETA, 0.0)),
            "accuracies": losses.share_ahead(-m),
            "drift_chosen": chosen,
            "drift_rejected": rejected,
        }
        shares = {name: (self.weight * value).sum() / self.pairs for name, value in numbers.items()}
        return shares | {"path_kl": self.path_kl(look)}


def _two_rows(errors: Tensor) -> Tensor:
    """(2B,) → (2,B) float64 on the CPU."""
    return errors.view(2, -1).double().cpu()


class HeldOutEvaluator:
    """Evaluates the policy on held-out pairs when that is due. Never due where a run has none.

    Make it before a checkpoint is loaded, while the policy still has its base's weights: their predictions are kept, in the host's memory.
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
            self._base = none_if_stopped(lambda: held_out.predictions(policy, stop.poll))

    def due(self, step: int) -> bool:
        return self._held_out is not None and (step % self._every == 0 or step == self._last)

    def evaluate(self) -> dict[str, float]:
        """Return ``eval/…`` numbers for a row of ``metrics.jsonl``; empty where a request to stop came between."""
        held_out, base = self._held_out, self._base
        assert held_out is not None and base is not None  # otherwise never due, or the run was stopped before it began
        look = none_if_stopped(lambda: held_out.look(self._policy, base, self._stop.poll))
        if look is None:
            return {}
        shares = held_out.summary(self._objective, look)
        device = self._objective.table.correction.device
        values = sum_over_ranks(torch.stack(list(shares.values())).to(device)).tolist()
        return {f"eval/{name}": value for name, value in zip(shares, values, strict=True)}


def error_drift(
    policy: torch.nn.Module, base: torch.nn.Module, schedule: NoiseSchedule, shards: ShardSet | MixedShards
) -> dict[str, float]:
    """Return mean errors over every pair of ``shards``: how far a policy has moved from its base.

    The known failure of this family of objectives: accuracy rises while *both* errors grow, the loser's faster. A model that
    improves keeps its winners' error where it was.

    Gives ``policy_chosen``, ``policy_rejected``, ``reference_chosen`` and ``reference_rejected``, and the ``path_kl`` between the two
    models in nats.
    """
    held_out = HeldOut(shards, schedule)
    look = held_out.look(policy, held_out.predictions(base))
    means = torch.cat([look.policy, look.base]).mean(1).tolist()
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    return dict(zip(names, means, strict=True)) | {"path_kl": held_out.path_kl(look).item()}
