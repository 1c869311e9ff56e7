"""The two ends of an optimizer step: sum gradients over its micro-batches, and apply only a finite update."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def gradient_accumulation(policy: Any) -> AbstractContextManager:
    """Return a context for the backward passes of one optimizer step. Call :func:`apply_if_finite` after the context.

    At stage 2, DeepSpeed reduces gradients after every micro-batch, so that each rank keeps the sums of its own partition. A
    single rank owns everything. In float32, its gradients can add up in ``.grad``. The context then reduces once a step, with
    the same numbers. A backward pass needs no memory for separate sums.

    In bfloat16 the sums are float32, and adding to them is part of the reduction. There the context changes nothing.
    """
    in_place = policy.zero_optimization_stage() == 2 and policy.dp_world_size == 1 and not policy.bfloat16_enabled()
    if not in_place or policy.zero_cpu_offload():
        return nullcontext()
    policy.set_gradient_accumulation_boundary(True)  # the loop then calls `step` once, at the end of the accumulation
    return policy.coalesce_grad_reduction()


def apply_if_finite(policy: Any) -> float:
    """Call ``policy.step()`` at the end of an accumulation. All ranks skip the update if a gradient is not finite. Collective.

    DeepSpeed's ZeRO and bfloat16 optimizers skip such an update themselves, silently. They test the norm of all ranks'
    gradients together. In one case this test is optional, and :func:`dde_ds.engine.zero.complete_config` switches it on.

    A plain optimizer (stage 0 in float32) does not skip, so this function tests its gradients. They are reduced by then, and
    therefore equal on all ranks.

    Returns:
        The gradient's norm before clipping. If the norm is not finite, the step was skipped: weights, moments and the
            optimizer's step count are unchanged.
    """
    if hasattr(policy.optimizer, "overflow"):
        policy.step()
        return float(policy.get_global_grad_norm()) if policy.was_step_applied() else math.inf
    gradients = [parameter.grad for parameter in policy.module.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        policy.step()
    else:
        # DeepSpeed's clipping needs gradients. The hook clears them after the clipping, so that the optimizer has nothing to do.
        hook = policy.optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad())
        policy.step()
        hook.remove()
    return norm
