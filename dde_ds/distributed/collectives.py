"""The few collectives that training needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dde_ds.distributed.environment import DistributedEnv
from dde_ds.errors import UserError

T = TypeVar("T")


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if ``flag`` is true on one. Collective; a host synchronisation."""
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def find_local_world_size(ranks: DistributedEnv, device: torch.device) -> int:
    """How many ranks a node has, the fullest where they differ. Collective."""
    if ranks.world_size == 1:
        return 1
    value = torch.tensor([ranks.local_rank + 1], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value.item())


def barrier(ranks: DistributedEnv, device: torch.device) -> None:
    """Wait for all ranks; a lone process, which may have no process group, goes on. Collective."""
    if ranks.world_size > 1:
        any_rank(False, device)


def broadcast_object(value: Any, ranks: DistributedEnv) -> Any:
    """The first rank's ``value`` on every rank; plain data only. Collective."""
    if ranks.world_size == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def first_does(work: Callable[[], T]) -> T:
    """What ``work()`` gives on the first rank, or the UserError that it raises there, on every rank; plain data only. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    held: list = [None, None]
    if dist.get_rank() == 0:
        try:
            held[0] = work()
        except UserError as error:
            held[1] = str(error)
    dist.broadcast_object_list(held, src=0)
    if held[1] is not None:
        raise UserError(held[1])
    return held[0]


def gather_rows(rows: torch.Tensor, ranks: DistributedEnv) -> torch.Tensor:
    """Rows of all ranks, (ranks × n, k), where each brings (n, k). Collective."""
    if ranks.world_size == 1:
        return rows
    gathered = rows.new_empty(ranks.world_size * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows)
    return gathered


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """In place. Collective."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """In place. Collective."""
    return sum_over_ranks(values).div_(dist.get_world_size())


def union_over_ranks(items: set) -> set:
    """What any rank has. Collective; items are pickled, so it is for rare and small sets."""
    if dist.get_world_size() == 1:
        return items
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, items)
    return set().union(*gathered)
