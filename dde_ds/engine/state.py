"""A policy's training state, parameter by parameter, whatever ZeRO stage and number of ranks hold it.

DeepSpeed keeps float32 weights and the optimizer's moments in flat partitions whose cut depends on stage, ranks and precision; its
own checkpoints keep that cut. Here each parameter is put together from the partitions and taken apart again, through
DeepSpeed's public tensor access (https://deepspeed.readthedocs.io/en/latest/zero3.html#debugging), so that a state fits any other cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WEIGHT = "weight"
"""Name of the float32 weights among a parameter's tensors; the others are the optimizer's, such as ``exp_avg``."""


def moments(policy: Any) -> list[str]:
    """Names of the optimizer's tensors that have an entry for each weight. Empty before the first step."""
    flat = _masters(policy)[0]
    state = policy.optimizer.optimizer.state.get(flat, {})
    return sorted(key for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape)


def optimizer_steps(policy: Any) -> int:
    """How many updates the optimizer has made, which its bias correction depends on. 0 where all steps were skipped so far."""
    return int(policy.optimizer.optimizer.state.get(_masters(policy)[0], {}).get("step", 0))


def trained(policy: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in policy.module.named_parameters() if parameter.requires_grad]


def gather(policy: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, float32 tensors of its whole shape on the device) of every trained parameter. All ranks iterate together."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    kinds = moments(policy)
    for name, parameter in trained(policy):
        state = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in kinds}
        yield name, {WEIGHT: safe_get_full_fp32_param(parameter), **state}


def begin_restoring(policy: Any, steps: int, kinds: list[str]) -> None:
    """Make the optimizer's state, which it would only make at its first step; ``restore`` then fills it."""
    if not steps:
        return  # without an update there is no state, and a part of one would be taken for whole
    optimizer = policy.optimizer.optimizer
    group = optimizer.param_groups[0]
    for flat in _masters(policy):
        if type(optimizer).__module__.startswith("torch."):
            on_device = group.get("fused") or group.get("capturable")
            count: Any = torch.tensor(float(steps), device=flat.device if on_device else "cpu")
        else:  # DeepSpeed's own optimizers count in plain integers
            count = steps
        optimizer.state[flat] = {"step": count, **{kind: torch.zeros_like(flat) for kind in kinds}}
    # Stages 1 and 2 keep views of each parameter's part, which they make at the first step. No public name leads there.
    link = getattr(policy.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


@torch.no_grad()
def restore(parameter: torch.nn.Parameter, tensors: dict[str, Tensor]) -> None:
    """Set one parameter's float32 weights, its moments, and the weights that the model runs on. All ranks together."""
    import deepspeed
    from deepspeed import utils

    weight = tensors[WEIGHT]
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        utils.safe_set_local_fp32_param(parameter, _own_part(parameter, weight))
        for kind in tensors.keys() - {WEIGHT}:
            utils.safe_set_local_optimizer_state(parameter, _own_part(parameter, tensors[kind]), kind)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.copy_(weight)
        return
    utils.safe_set_full_fp32_param(parameter, weight)
    for kind in tensors.keys() - {WEIGHT}:
        utils.safe_set_full_optimizer_state(parameter, tensors[kind], kind)
    parameter.copy_(weight)


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Under ZeRO-3 a parameter's own shape is that of nothing."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _own_part(parameter: torch.nn.Parameter, value: Tensor) -> Tensor:
    """This rank's partition; the last one is padded, which DeepSpeed's own cut of a whole tensor forgets."""
    size = parameter.ds_tensor.ds_numel
    first = dist.get_rank(group=parameter.ds_process_group) * size
    part = value.flatten()[first : first + size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))


def _masters(policy: Any) -> list[Tensor]:
    """The flat float32 partitions that the inner optimizer updates: ZeRO-3, stages 1 and 2, and bfloat16 at stage 1."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(policy.optimizer, name):
            return getattr(policy.optimizer, name)
    raise TypeError(f"{type(policy.optimizer).__name__} is none of DeepSpeed's ZeRO optimizers")
