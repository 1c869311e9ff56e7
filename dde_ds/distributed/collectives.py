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
    """Return True on every rank if ``flag`` is true on at least one.

    Collective. It synchronises the host with the device.
    """
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def find_local_world_size(ranks: DistributedEnv, device: torch.device) -> int:
    """Return how many ranks a node has. If nodes differ, return the largest number. Collective."""
    if ranks.world_size == 1:
        return 1
    value = torch.tensor([ranks.local_rank + 1], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value.item())


def barrier(ranks: DistributedEnv, device: torch.device) -> None:
    """Wait for all ranks. A single process does not wait, since it may have no process group. Collective."""
    if ranks.world_size > 1:
        any_rank(False, device)


def broadcast_object(value: Any, ranks: DistributedEnv) -> Any:
    """Return the first rank's ``value`` on every rank. The value must be plain data. Collective."""
    if ranks.world_size == 1:
        return value
    buffer = [value]
    dist.broadcast_object_list(buffer, src=0)
    return buffer[0]


def first_does(work: Callable[[], T]) -> T:
    """Call ``work()`` on the first rank alone, and return its result on every rank.

    The result must be plain data. Collective.

    Raises:
        UserError: ``work()`` raised it. Every rank raises it then.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    buffer: list = [None, None]
    if dist.get_rank() == 0:
        try:
            buffer[0] = work()
        except UserError as error:
            buffer[1] = str(error)
    dist.broadcast_object_list(buffer, src=0)
    if buffer[1] is not None:
        raise UserError(buffer[1])
    return buffer[0]


def gather_rows(rows: torch.Tensor, ranks: DistributedEnv) -> torch.Tensor:
    """Return the rows (n, k) of all ranks as (ranks × n, k). Every rank must bring the same number of rows. Collective."""
    if ranks.world_size == 1:
        return rows
    gathered = rows.new_empty(ranks.world_size * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows)
    return gathered


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum ``values`` over all ranks in place, and return them. Collective."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Average ``values`` over all ranks in place, and return them. Collective."""
    return sum_over_ranks(values).div_(dist.get_world_size())


def union_over_ranks(items: set) -> set:
    """Return the union of all ranks' sets. Collective.

    Items are pickled, so use this only for small sets and seldom.
    """
    if dist.get_world_size() == 1:
        return items
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, items)
    return set().union(*gathered)
