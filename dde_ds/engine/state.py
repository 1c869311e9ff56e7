"""A policy's training state, parameter by parameter, whatever ZeRO stage and number of ranks hold it.

DeepSpeed keeps float32 weights and the optimizer's moments in flat partitions. Their cut depends on stage, ranks and
precision, and DeepSpeed's own checkpoints keep that cut. This module puts each parameter together from the partitions, and
takes it apart again. A state then fits any other cut. The access is DeepSpeed's public one
(https://deepspeed.readthedocs.io/en/latest/zero3.html#debugging).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dde_ds.engine import adamw8bit

WEIGHT = "weight"
"""Name of the float32 weights among a parameter's tensors. The other tensors are the optimizer's, such as ``exp_avg``."""
EMA = "ema"
"""Name of the weights' moving average, which :mod:`dde_ds.engine.ema` keeps among the optimizer's tensors."""


def moments(policy: Any) -> list[str]:
    """Return the names of the optimizer's tensors that have an entry for each weight, sorted. Empty before the first step."""
    flat = _masters(policy)[0]
    state = _optimizer(policy).state.get(flat, {})
    if adamw8bit.is_quantized(state):
        return sorted({*adamw8bit.MOMENTS, *({EMA} & state.keys())})
    return sorted(key for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape)


def optimizer_steps(policy: Any) -> int:
    """Return the number of updates that the optimizer has made; its bias correction depends on it. 0 if all steps so far were
    skipped."""
    return int(_optimizer(policy).state.get(_masters(policy)[0], {}).get("step", 0))


def trained(policy: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Return (name, parameter) of every trained parameter, in the model's order."""
    return [(name, parameter) for name, parameter in policy.module.named_parameters() if parameter.requires_grad]


def gather(policy: Any, kinds: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (name, tensors) of every trained parameter. Collective: all ranks iterate together.

    ``tensors`` holds one float32 tensor for each kind, of the parameter's whole shape, on the device.

    Args:
        kinds: names of the tensors; by default the weights and every moment.
    """
    kinds = kinds or [WEIGHT, *moments(policy)]
    for name, parameter in trained(policy):
        yield name, {kind: _full(policy, parameter, kind) for kind in kinds}


def _full(policy: Any, parameter: torch.nn.Parameter, kind: str) -> Tensor:
    """Return one tensor of a trained parameter, float32, of its whole shape. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = _optimizer(policy).state
    if _is_plain(policy):
        return parameter.detach() if kind == WEIGHT else states[parameter][kind]
    if kind != WEIGHT and kind in adamw8bit.MOMENTS and adamw8bit.is_quantized(states[_masters(policy)[0]]):
        return adamw8bit.full_moment(parameter, states.get(_master_of(policy, parameter), {}), kind)
    whole = safe_get_full_fp32_param(parameter) if kind == WEIGHT else safe_get_full_optimizer_state(parameter, kind)
    assert whole is not None, f"DeepSpeed holds no {kind} of a parameter that it trains"
    return whole


def begin_restoring(policy: Any, steps: int, kinds: list[str]) -> None:
    """Make the optimizer's state, which it would otherwise make at its first step. :func:`restore` then fills it.

    Args:
        steps: number of updates that the optimizer had made. With 0 there is no state to make.
        kinds: names of the optimizer's tensors.
    """
    if not steps:
        return  # before its first update an optimizer has no state, and part of one would count as whole
    optimizer = _optimizer(policy)
    group = optimizer.param_groups[0]
    for flat in _masters(policy):
        if adamw8bit.is_ours(optimizer):
            whole = {kind: torch.zeros_like(flat) for kind in kinds if kind not in adamw8bit.MOMENTS}
            optimizer.state[flat] = {"restoring": adamw8bit.Restoring(flat, steps), **whole}
            continue
        if type(optimizer).__module__.startswith("torch."):
            on_device = group.get("fused") or group.get("capturable")
            count: Any = torch.tensor(float(steps), device=flat.device if on_device else "cpu")
        else:  # DeepSpeed's own optimizers count in plain integers
            count = steps
        optimizer.state[flat] = {"step": count, **{kind: torch.zeros_like(flat) for kind in kinds}}
    link_views(policy)


def link_views(policy: Any, again: bool = False) -> None:
    """Link each parameter to its part of the optimizer's tensors, at stages 1 and 2.

    DeepSpeed does this itself at the first step. No public name leads to its function.

    Args:
        again: link anew, for a tensor that was added later.
    """
    link = getattr(policy.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        if again:
            policy.optimizer._hp_optimizer_states_linked = False
        link()


def partitions(policy: Any) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield (flat float32 weights, their optimizer state) of each of this rank's partitions."""
    for flat in _masters(policy):
        yield flat.detach(), _optimizer(policy).state[flat]


@torch.no_grad()
def restore(policy: Any, parameter: torch.nn.Parameter, tensors: dict[str, Tensor]) -> None:
    """Set one parameter's float32 weights, its moments, and the weights that the model computes with. Collective.

    Args:
        tensors: the weights and the optimizer's tensors by name, float32, of the parameter's whole shape.
    """
    import deepspeed
    from deepspeed import utils

    weight = tensors[WEIGHT]
    kinds = tensors.keys() - {WEIGHT}
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        utils.safe_set_local_fp32_param(parameter, _own_part(parameter, weight))
        for kind in kinds:
            utils.safe_set_local_optimizer_state(parameter, _own_part(parameter, tensors[kind]), kind)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.copy_(weight)
        return
    parameter.copy_(weight)
    states = _optimizer(policy).state
    if _is_plain(policy):
        for kind in kinds:
            states[parameter][kind].copy_(tensors[kind])
        return
    utils.safe_set_full_fp32_param(parameter, weight)
    for kind in kinds:
        flat = _master_of(policy, parameter)
        if kind in adamw8bit.MOMENTS and flat is not None and "restoring" in states[flat]:
            states[flat]["restoring"].take(parameter, kind, tensors[kind])
        else:
            utils.safe_set_full_optimizer_state(parameter, tensors[kind], kind)


def end_restoring(policy: Any) -> None:
    """Finish a restoring after the last parameter: quantise moments of 8 bits, whose blocks may span parameters."""
    optimizer = _optimizer(policy)
    for flat in _masters(policy):
        if "restoring" in optimizer.state[flat]:
            whole = optimizer.state.pop(flat)
            whole.pop("restoring").finish(optimizer, flat)
            optimizer.state[flat].update(whole)


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Return a parameter's whole shape. Under ZeRO-3 its own ``shape`` is that of an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's partition of ``value``. The last partition is padded, which DeepSpeed's own cut of a whole tensor
    forgets."""
    size = parameter.ds_tensor.ds_numel
    first = dist.get_rank(group=parameter.ds_process_group) * size
    part = value.flatten()[first : first + size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))


def _optimizer(policy: Any) -> Any:
    """Return the inner optimizer. ZeRO wraps an optimizer; stage 0 in float32 does not."""
    return policy.optimizer if _is_plain(policy) else policy.optimizer.optimizer


def _is_plain(policy: Any) -> bool:
    """Return whether the optimizer is not wrapped, at stage 0 in float32."""
    return not hasattr(policy.optimizer, "optimizer")


def _masters(policy: Any) -> list[Tensor]:
    """Return the float32 tensors that the inner optimizer updates.

    Without sharding these are the parameters themselves, otherwise flat partitions. The names below belong to ZeRO-3, to
    stages 1 and 2, and to bfloat16 at stage 1.
    """
    if _is_plain(policy):
        return [parameter for _, parameter in trained(policy)]
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(policy.optimizer, name):
            return getattr(policy.optimizer, name)
    raise TypeError(f"{type(policy.optimizer).__name__} is none of DeepSpeed's ZeRO optimizers")


def _master_of(policy: Any, parameter: torch.nn.Parameter) -> Tensor | None:
    """Return the flat partition that holds this rank's part of a parameter, at stages 1 and 2. None if this rank has no part."""
    place = adamw8bit.hp_mapping(parameter)
    if place is None:
        return None
    storage = place.hp_fragment.untyped_storage().data_ptr()
    return next(flat for flat in _masters(policy) if flat.untyped_storage().data_ptr() == storage)
