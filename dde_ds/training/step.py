"""Process one micro-batch: latents → noise → two predictions → objective. Or compute the errors of one model alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dde_ds.models.unet import predict
from dde_ds.objective.fused import noise_errors
from dde_ds.objective.objective import Objective, ObjectiveOutput
from dde_ds.objective.schedule import NoiseSchedule, NoiseTarget
from dde_ds.training.batches import Batch
from dde_ds.training.reference import Reference


def micro_step(
    policy: Any, reference: Reference | None, objective: Objective, batch: Batch, device: torch.device
) -> ObjectiveOutput:
    """Return the loss and the metrics of one micro-batch of B pairs.

    Winners and losers go through each model in one call. Two calls would double the kernel launches. Under ZeRO-3 they would
    also double the gathering of every parameter.

    Args:
        policy: a DeepSpeed engine or a plain UNet.
        reference: the source of the reference's predictions. It is not called if ``batch`` has the reference's errors, and may
            be None then or for an objective without a reference.
    """
    dtype = next(policy.parameters()).dtype
    batch, noisy, both = _noised(objective.schedule, batch, device)
    # The models see x_t rounded to their own type; the objective takes the exact x_t. At the noisy end, a v model's implied noise
    # is nearly x_t itself. If the objective took x_t in bfloat16, its rounding would be all that is left of the difference.
    seen = noisy.to(dtype)

    reference_pred = None
    if objective.needs_reference and batch.reference_errors is None:
        assert reference is not None  # without a reference, the objective needs none or all errors are precomputed
        with torch.no_grad():
            reference_pred = reference(seen, both, batch.conditioning)
    policy_pred = predict(policy, seen, both, batch.conditioning)
    labels = batch.soft_label if objective.options.soft_labels else None
    return objective(
        policy_pred,
        reference_pred,
        batch.noise,
        batch.timesteps,
        noisy,
        reference_errors=batch.reference_errors,
        soft_labels=labels,
    )


@torch.no_grad()
def predictions_of(
    model: Reference, schedule: NoiseSchedule, batch: Batch, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, NoiseTarget]:
    """Return one model's predictions on a micro-batch, (2B,C,H,W), computed as in :func:`micro_step`, and what they are compared with.

    Args:
        model: the model as a function that predicts, such as the result of :func:`dde_ds.training.reference.frozen_model`.
        dtype: the policy's type. x_t is rounded to this type for every model.
    """
    batch, noisy, both = _noised(schedule, batch, device)
    return model(noisy.to(dtype), both, batch.conditioning), schedule.target(batch.noise, both, noisy)


def errors_of(model: Reference, schedule: NoiseSchedule, batch: Batch, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return one model's errors on a micro-batch, (2B,) float32. The arguments are those of :func:`predictions_of`."""
    prediction, target = predictions_of(model, schedule, batch, device, dtype)
    return noise_errors(prediction, None, target)[0]


def _noised(schedule: NoiseSchedule, batch: Batch, device: torch.device) -> tuple[Batch, Tensor, Tensor]:
    """Return the batch on ``device``, x_t (2B,C,H,W) float32, and the timestep of each row of x_t, (2B,)."""
    batch = batch.to(device)
    latents, both = batch.latents.float(), batch.timesteps.repeat(2)
    shared = batch.noise if len(batch.noise) == len(latents) else batch.noise.repeat(2, 1, 1, 1)
    return batch, schedule.add_noise(latents, shared, both), both
