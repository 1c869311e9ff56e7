"""The two ends of an optimizer's step: gradients summed up over its micro-batches, and an update that only finite ones get through."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def gradient_accumulation(policy: Any) -> AbstractContextManager:
    """Around the backward passes of one step, at whose end comes :func:`apply_if_finite`.

    At stage 2 DeepSpeed takes each micro-batch's gradients through its reduction, to keep of the sums what is the rank's own. One rank keeps
    all, and in float32 they can add up where they are: there they go through it once a step, to the same numbers, and no sums lie beside
    them in a backward pass. In bfloat16 the sums are float32, and adding to them is a part of the reduction.
    """
    in_place = policy.zero_optimization_stage() == 2 and policy.dp_world_size == 1 and not policy.bfloat16_enabled()
    if not in_place or policy.zero_cpu_offload():
        return nullcontext()
    policy.set_gradient_accumulation_boundary(True)  # `step` is called once, and ends each accumulation
    return policy.coalesce_grad_reduction()


def apply_if_finite(policy: Any) -> float:
    """``policy.step()`` at the end of an accumulation, left out on all ranks where a gradient is not finite. Collective.

    DeepSpeed's ZeRO and bfloat16 optimizers do so themselves, silently, by the norm, which is all ranks' gradients' together; the one
    place where that is optional is switched on in :func:`dde_ds.engine.zero.complete_config`. A plain optimizer, stage 0 in
    float32, does not: its gradients, reduced by then and so equal on all ranks, are looked at here.

    Returns:
        The gradient's norm before clipping. Not finite: the step was left out, and weights, moments and the optimizer's count of
        steps are as they were.
    """
    if hasattr(policy.optimizer, "overflow"):
        policy.step()
        return float(policy.get_global_grad_norm()) if policy.was_step_applied() else math.inf
    gradients = [parameter.grad for parameter in policy.module.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        policy.step()
    else:
        # Cleared after DeepSpeed's clipping, which must find some: the optimizer then has nothing to do.
        hook = policy.optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad())
        policy.step()
        hook.remove()
    return norm
