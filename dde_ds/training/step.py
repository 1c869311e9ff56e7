"""One micro-batch: latents → noise → two predictions → objective; or the reference's alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dde_ds.models.unet import predict
from dde_ds.objective.fused import noise_errors
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
    batch, noisy, both = _noised(objective, batch, device)
    # The models see x_t in their own type; the objective takes the exact one: where a v model's implied noise is nearly x_t itself,
    # at the noisy end, the rounding of x_t to bfloat16 would be all that is left of the difference.
    seen = noisy.to(dtype)

    reference_pred = None
    reference_errors = batch.get("reference_errors")  # of a ledger, which the reference filled in an earlier run
    if objective.needs_reference and reference_errors is None:
        with torch.no_grad():
            reference_pred = reference(seen, both, batch)
    policy_pred = predict(policy, seen, both, batch)
    return objective(policy_pred, reference_pred, batch["noise"], batch["timesteps"], noisy, reference_errors=reference_errors)


@torch.no_grad()
def reference_step(
    reference: Reference, objective: Objective, batch: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The reference's errors of one micro-batch, (2B,) float32, as :func:`micro_step` finds them with a policy beside it.

    ``dtype`` is the policy's, which x_t is rounded to for both.
    """
    batch, noisy, both = _noised(objective, batch, device)
    target = objective.schedule.target(batch["noise"], both, noisy)
    return noise_errors(reference(noisy.to(dtype), both, batch), None, target)[0]


def _noised(objective: Objective, batch: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The batch on the device, x_t (2B,C,H,W) float32, and the timestep of each, (2B,)."""
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    latents, noise, both = batch["latents"].float(), batch["noise"], batch["timesteps"].repeat(2)
    shared = noise if len(noise) == len(latents) else noise.repeat(2, 1, 1, 1)
    return batch, objective.schedule.add_noise(latents, shared, both), both
