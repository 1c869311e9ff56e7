"""The same held-out pairs, timesteps and noise at every look, so that a number can be compared over a run, between runs and
between objectives.

Each pair is looked at at one of nine fixed timesteps, t = T/10 … 9T/10, in rotation: for a given number of forward passes more
pairs say more than more timesteps of the same pair.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dde_ds.data.draws import Draws
from dde_ds.data.order import Order
from dde_ds.data.reader import PairDataset
from dde_ds.data.shards import ShardSet
from dde_ds.models.unet import predict
from dde_ds.objective import losses
from dde_ds.objective.fused import noise_errors
from dde_ds.objective.objective import Objective
from dde_ds.objective.schedule import NoiseSchedule

# β of `loss_uniform`, the Diffusion-DPO loss that all runs share whatever they train on.
COMMON_BETA = 2000.0


class HeldOut:
    """One rank's part of the first ``pairs`` held-out pairs (None: all), in an order that no run's seed changes.

    All ranks hold the same number of pairs, since under ZeRO-3 a forward pass is a collective: where the pairs do not divide,
    some are looked at twice, with weight 0.
    """

    def __init__(
        self, shards: ShardSet, schedule: NoiseSchedule, pairs: int | None = None, micro: int = 32, rank: int = 0, world: int = 1
    ):
        self.schedule, self.micro = schedule, micro
        order = Order(shards.counts, 0, block=1)
        self.pairs = min(pairs or order.samples, order.samples)
        self._dataset = PairDataset(shards, order, Draws(0, torch.ones(schedule.timesteps)))
        own = range(rank, rank + world * -(-self.pairs // world), world)
        self._positions = [position % self.pairs for position in own]
        self.weight = torch.tensor([float(position < self.pairs) for position in own], dtype=torch.float64)
        """(n,): 1, or 0 for a pair that another rank looks at."""
        quantiles = torch.arange(1, 10) * schedule.timesteps // 10
        self.timesteps = quantiles[torch.tensor(self._positions) % 9]
        """(n,) int64."""

    @torch.no_grad()
    def errors(self, unet: torch.nn.Module, poll: Callable[[], None] | None = None) -> Tensor:
        """(2,n) float64 on the CPU: the UNet's errors on winners and on losers. Under ZeRO-3 all ranks call this together.

        ``poll`` is called before each batch, as often on every rank; what it raises ends the look.
        """
        parameter = next(unet.parameters())
        device, dtype = parameter.device, parameter.dtype
        found = []
        for low in range(0, len(self._positions), self.micro):
            if poll:
                poll()
            chosen = slice(low, low + self.micro)
            batch = self._dataset.collate([self._dataset.pair(position) for position in self._positions[chosen]])
            batch = {key: value.to(device) for key, value in batch.items()}
            both = self.timesteps[chosen].repeat(2).to(device)
            noisy = self.schedule.add_noise(batch["latents"].float(), batch["noise"].repeat(2, 1, 1, 1), both)
            target = self.schedule.target(batch["noise"], both, noisy)
            found.append(noise_errors(predict(unet, noisy.to(dtype), both, batch), None, target)[0].view(2, -1).double().cpu())
        return torch.cat(found, 1)

    def summary(self, objective: Objective, policy: Tensor, base: Tensor) -> dict[str, Tensor]:
        """This rank's share of each number, from (2,n) errors: the sum over ranks is the number. 0-d float64 tensors.

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


def error_drift(policy: torch.nn.Module, base: torch.nn.Module, schedule: NoiseSchedule, shards: ShardSet) -> dict[str, float]:
    """Mean errors over every pair of ``shards``: how far a policy has moved from its base.

    The known failure of this family of objectives: accuracy rises while *both* errors grow, the loser's faster. A model that
    improves keeps its winners' error where it was.

    Gives ``policy_chosen``, ``policy_rejected``, ``reference_chosen`` and ``reference_rejected``.
    """
    held_out = HeldOut(shards, schedule)
    means = torch.cat([held_out.errors(policy), held_out.errors(base)]).mean(1)
    return dict(zip(("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"), means.tolist(), strict=True))


def latent_spread(latents: Tensor) -> float:
    """Mean over samples of a latent's own standard deviation, (N,C,H,W): grows when a model overshoots its pictures."""
    return float(latents.flatten(1).std(1).mean())
