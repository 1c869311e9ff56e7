"""AdamW with moments of 8 bits (bitsandbytes, arXiv 2110.02861): 2 bytes a parameter in the place of 8, under ZeRO-1 and 2.

Each block of 256 moments is stored as codes (uint8), a table of the 256 values that they stand for, and the block's largest value. A
checkpoint holds the values in float32 under AdamW's own names, so that a run goes on with 32 bits, and the other way round. Quantised
again they may round once more: the codes reach 1 but not -1, so that a block whose largest value is negative gets another scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dde_ds.errors import UserError

TYPE = "AdamW8bit"
"""``optimizer.type`` in DeepSpeed's configuration, which knows of none such itself."""
BLOCK = 256
MOST = 2**31 - 1
"""Elements of a rank's partition: bitsandbytes counts them in 32 bits on a GPU (``backends/cuda/ops.py``), and wraps without a word."""
# Suffix of bitsandbytes' names for each of AdamW's.
MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}


def client_optimizer(config: dict) -> Callable | None:
    """What makes the optimizer from its parameters, where ``config`` asks for this one; it is then taken out of ``config``.

    Raises:
        UserError: bitsandbytes is not installed, or the stage is another.
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
    config["zero_allow_untested_optimizer"] = True  # "untested" are all but six optimizers by name

    def make(parameters: list[torch.nn.Parameter]) -> AdamW8bit:
        check_partition(sum(parameter.numel() for parameter in parameters), dist.get_world_size())
        return AdamW8bit(parameters, min_8bit_size=1, **options)

    return make


def check_partition(trained: int, ranks: int) -> None:
    """Refuse what bitsandbytes would miscount.

    Args:
        trained: elements that are trained.

    Raises:
        UserError: a rank's part of them is too large.
    """
    if trained / ranks > MOST:
        raise UserError(
            f"optimizer.type is adamw_8bit, which takes at most {MOST:,} elements a rank, but {trained:,} are trained on {ranks}: "
            "take more ranks, or adamw"
        )


def is_ours(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes.")


def is_quantized(state: dict) -> bool:
    """Whether this is the optimizer's state of a flat partition."""
    return "qmap1" in state


def hp_mapping(parameter: torch.nn.Parameter) -> Any:
    """Return where in its flat partition this rank's part of a parameter lies, as DeepSpeed has it; None where it has no part."""
    return parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]  # DeepSpeed puts it there


@torch.no_grad()
def full_moment(parameter: torch.nn.Parameter, state: dict, kind: str) -> Tensor:
    """One of AdamW's moments of a whole parameter, float32, from all ranks' partitions. Collective.

    Args:
        state: of the flat partition that holds this rank's part.
    """
    whole = torch.zeros(parameter.numel(), device=parameter.device)
    place = hp_mapping(parameter)
    if place is not None:
        first, count = place.hp_fragment_address.start, place.hp_fragment_address.numel
        block, last = first // BLOCK, -(-(first + count) // BLOCK)
        codes, table, largest = (state[f"{name}{MOMENTS[kind]}"] for name in ("state", "qmap", "absmax"))
        values = table[codes[block * BLOCK : last * BLOCK].long()]
        values *= largest[block:last].repeat_interleave(BLOCK)[: len(values)]
        start = place.lp_fragment_address.start
        whole[start : start + count] = values[first - block * BLOCK :][:count]
    dist.all_reduce(whole, group=parameter._dp_group)  # pyright: ignore[reportAttributeAccessIssue]  # DeepSpeed puts it there
    return whole.view_as(parameter)


class Restoring:
    """Collects the moments of a flat partition, float32 in the host's memory, until all are there and can be quantised: the largest
    value of a block may be another parameter's."""

    def __init__(self, flat: Tensor, steps: int):
        self._steps = steps
        self._values = {kind: torch.zeros(flat.numel()) for kind in MOMENTS}

    def take(self, parameter: torch.nn.Parameter, kind: str, value: Tensor) -> None:
        place = hp_mapping(parameter)
        if place is not None:
            start, first, count = place.lp_fragment_address.start, place.hp_fragment_address.start, place.hp_fragment_address.numel
            self._values[kind][first : first + count] = value.flatten()[start : start + count].cpu()

    @torch.no_grad()
    def finish(self, optimizer: Any, flat: Tensor) -> None:
        """Fill the optimizer's state of this partition."""
        from bitsandbytes.functional import quantize_blockwise

        group = next(number for number, each in enumerate(optimizer.param_groups) if any(flat is one for one in each["params"]))
        optimizer.init_state(optimizer.param_groups[group], flat, group, 0)
        state = optimizer.state[flat]
        state["step"] = self._steps
        for kind, number in MOMENTS.items():
            values, chunk = self._values[kind], BLOCK << 16  # 16 M values at a time on the device
            for start in range(0, len(values), chunk):
                codes, found = quantize_blockwise(
                    values[start : start + chunk].to(flat.device), code=state[f"qmap{number}"], blocksize=BLOCK
                )
                state[f"state{number}"][start : start + chunk] = codes
                state[f"absmax{number}"][start // BLOCK :][: len(found.absmax)] = found.absmax
