"""AdamW with moments of 8 bits (bitsandbytes, arXiv 2110.02861), under ZeRO-1 and 2: 2 bytes a parameter instead of 8.

Each block of 256 moments is stored as codes (uint8) and the block's largest value. A table holds the 256 values that the codes
stand for. A checkpoint holds the moments in float32 under AdamW's own names. So a run can continue with 32 bits, and a run
with 32 bits can continue with 8.

Quantising the values again may round them once more. The codes reach 1 but not -1, so a block whose largest value is negative
gets another scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dde_ds.errors import UserError

TYPE = "AdamW8bit"
"""Value of ``optimizer.type`` in a DeepSpeed configuration that asks for this optimizer. DeepSpeed itself does not know this
type."""
BLOCK = 256
"""Moments in a block."""
MOST = 2**31 - 1
"""Most elements of a rank's partition. On a GPU, bitsandbytes counts elements in 32 bits (``backends/cuda/ops.py``) and wraps
silently."""
# Suffix of bitsandbytes' names for each of AdamW's moments.
MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}


def client_optimizer(config: dict) -> Callable | None:
    """Return a function that makes the optimizer from its parameters, or None if ``config`` asks for another optimizer.

    The section ``optimizer`` is removed from ``config``, since the function replaces it.

    Raises:
        UserError: bitsandbytes is not installed, the ZeRO stage is neither 1 nor 2, or the optimizer is offloaded.
    """
    if config.get("optimizer", {}).get("type") != TYPE:
        return None
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2) or zero.get("offload_optimizer", {}).get("device", "none") != "none":
        raise UserError(
            "optimizer.type is adamw_8bit, which works with zero_optimization.stage 1 or 2 without offload; take ds_configs/zero2.json, or adamw"
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("optimizer.type is adamw_8bit: bitsandbytes is not installed; pip install -e '.[lowbit]'") from None
    options = config.pop("optimizer")["params"]
    config["zero_allow_untested_optimizer"] = True  # DeepSpeed calls all but six optimizers "untested"

    def make(parameters: list[torch.nn.Parameter]) -> AdamW8bit:
        check_partition(sum(parameter.numel() for parameter in parameters), dist.get_world_size())
        return AdamW8bit(parameters, min_8bit_size=1, **options)

    return make


def check_partition(trained: int, ranks: int) -> None:
    """Refuse a partition that bitsandbytes would miscount.

    Args:
        trained: number of trained elements, over all ranks.
        ranks: number of ranks.

    Raises:
        UserError: a rank's part of the elements is too large.
    """
    if trained / ranks > MOST:
        raise UserError(
            f"optimizer.type is adamw_8bit, which takes at most {MOST:,} elements a rank, but {trained:,} are trained on {ranks}: "
            "take more ranks, or adamw"
        )


def is_ours(optimizer: Any) -> bool:
    """Return whether an optimizer comes from bitsandbytes."""
    return type(optimizer).__module__.startswith("bitsandbytes.")


def is_quantized(state: dict) -> bool:
    """Return whether ``state``, an optimizer's state of a flat partition, holds moments of 8 bits."""
    return "qmap1" in state


def hp_mapping(parameter: torch.nn.Parameter) -> Any:
    """Return DeepSpeed's record of where this rank's part of a parameter lies in its flat partition. None if this rank has no
    part."""
    return parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]  # DeepSpeed puts it there


@torch.no_grad()
def full_moment(parameter: torch.nn.Parameter, state: dict, kind: str) -> Tensor:
    """Return one of AdamW's moments of a whole parameter, float32, from all ranks' partitions. Collective.

    Args:
        state: the optimizer's state of the flat partition that holds this rank's part.
        kind: ``exp_avg`` or ``exp_avg_sq``.
    """
    whole = torch.zeros(parameter.numel(), device=parameter.device)
    part = hp_mapping(parameter)
    if part is not None:
        first, count = part.hp_fragment_address.start, part.hp_fragment_address.numel
        block, last = first // BLOCK, -(-(first + count) // BLOCK)
        codes, table, largest = (state[f"{name}{MOMENTS[kind]}"] for name in ("state", "qmap", "absmax"))
        values = table[codes[block * BLOCK : last * BLOCK].long()]
        values *= largest[block:last].repeat_interleave(BLOCK)[: len(values)]
        start = part.lp_fragment_address.start
        whole[start : start + count] = values[first - block * BLOCK :][:count]
    dist.all_reduce(whole, group=parameter._dp_group)  # pyright: ignore[reportAttributeAccessIssue]  # DeepSpeed puts it there
    return whole.view_as(parameter)


class Restoring:
    """Collect the moments of a flat partition, float32 in host memory, until all are there. Then quantise them.

    The moments must wait for each other, because the largest value of a block may belong to another parameter.
    """

    def __init__(self, flat: Tensor, steps: int):
        self._steps = steps
        self._values = {kind: torch.zeros(flat.numel()) for kind in MOMENTS}

    def take(self, parameter: torch.nn.Parameter, kind: str, value: Tensor) -> None:
        """Take this rank's part of a whole moment of one parameter."""
        part = hp_mapping(parameter)
        if part is not None:
            start, first, count = part.lp_fragment_address.start, part.hp_fragment_address.start, part.hp_fragment_address.numel
            self._values[kind][first : first + count] = value.flatten()[start : start + count].cpu()

    @torch.no_grad()
    def finish(self, optimizer: Any, flat: Tensor) -> None:
        """Quantise the moments, and fill the optimizer's state of this partition with them."""
        from bitsandbytes.functional import quantize_blockwise

        group = next(number for number, each in enumerate(optimizer.param_groups) if any(flat is one for one in each["params"]))
        optimizer.init_state(optimizer.param_groups[group], flat, group, 0)
        state = optimizer.state[flat]
        state["step"] = self._steps
        for kind, number in MOMENTS.items():
            values, chunk = self._values[kind], BLOCK << 16  # 16 M values at a time on the device
            for start in range(0, len(values), chunk):
                codes, quantized = quantize_blockwise(
                    values[start : start + chunk].to(flat.device), code=state[f"qmap{number}"], blocksize=BLOCK
                )
                state[f"state{number}"][start : start + chunk] = codes
                state[f"absmax{number}"][start // BLOCK :][: len(quantized.absmax)] = quantized.absmax
