"""How far a policy's noise-prediction errors have moved from the reference's, on held-out pairs.

The known failure of this family of objectives: accuracy rises while *both* errors grow, the loser's faster. A model that
improves keeps its winners' error where it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dde_ds.data.draws import Draws
from dde_ds.data.order import Order
from dde_ds.data.reader import PairDataset
from dde_ds.data.shards import ShardSet
from dde_ds.models.unet import predict
from dde_ds.objective.fused import squared_error
from dde_ds.objective.schedule import NoiseSchedule, implied_noise


@torch.no_grad()
def error_drift(policy, reference, schedule: NoiseSchedule, shards: ShardSet, seed: int = 0, batch: int = 32) -> dict[str, float]:
    """Mean over every pair of ``shards`` at nine fixed timestep quantiles, each pair at one of them, noise from (seed, position).

    Gives ``policy_chosen``, ``policy_rejected``, ``reference_chosen`` and ``reference_rejected``: mean squared error of ε.
    """
    quantiles = (torch.arange(1, 10) * schedule.timesteps) // 10
    dataset = PairDataset(shards, Order(shards.counts, seed, block=1), Draws(seed, torch.ones(schedule.timesteps)))
    coefficients = schedule.implied_noise_coefficients()
    sums = torch.zeros(4, dtype=torch.float64)
    for low in range(0, dataset.order.samples, batch):
        positions = list(range(low, min(low + batch, dataset.order.samples)))
        data = dataset.collate([dataset.pair(position) for position in positions])
        both = quantiles[torch.tensor(positions) % len(quantiles)].repeat(2)
        noise = data["noise"].repeat(2, 1, 1, 1)
        noisy = schedule.add_noise(data["latents"].float(), noise, both)
        data = {key: value.float() if value.is_floating_point() else value for key, value in data.items()}
        scale, offset = implied_noise(coefficients, both, noisy)
        errors = [squared_error(predict(model, noisy, both, data), noise, scale, offset) for model in (policy, reference)]
        sums += torch.cat(errors).view(4, -1).double().sum(1)
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    return dict(zip(names, (sums / dataset.order.samples).tolist(), strict=True))


def latent_spread(latents: Tensor) -> float:
    """Mean over samples of a latent's own standard deviation, (N,C,H,W): grows when a model overshoots its pictures."""
    return float(latents.flatten(1).std(1).mean())
