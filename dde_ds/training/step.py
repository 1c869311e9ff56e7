"""One micro-batch: latents → noise → two predictions → objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dde_ds.models.unet import predict
from dde_ds.objective.objective import Objective, ObjectiveOutput
from dde_ds.training.reference import Reference


def micro_step(
    policy: Any, reference: Reference | None, objective: Objective, batch: dict[str, Tensor], device: torch.device
) -> ObjectiveOutput:
    """Loss of one micro-batch of B pairs, as :mod:`dde_ds.data.reader` gives it.

    ``policy`` is a DeepSpeed engine or a plain UNet. Winners and losers go through each model in one call: two would double the
    launches, and under ZeRO-3 the gathering of every parameter.
    """
    dtype = next(policy.parameters()).dtype
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    latents, noise = batch["latents"].float(), batch["noise"]
    timesteps = batch["timesteps"]
    both = timesteps.repeat(2)
    shared = noise if len(noise) == len(latents) else noise.repeat(2, 1, 1, 1)
    noisy = objective.schedule.add_noise(latents, shared, both)
    # The models see x_t in their own type; the objective takes the exact one: where a v model's implied noise is nearly x_t itself,
    # at the noisy end, the rounding of x_t to bfloat16 would be all that is left of the difference.
    seen = noisy.to(dtype)

    reference_pred = None
    if objective.needs_reference:
        with torch.no_grad():
            reference_pred = reference(seen, both, batch)
    policy_pred = predict(policy, seen, both, batch)
    return objective(policy_pred, reference_pred, noise, timesteps, noisy)
