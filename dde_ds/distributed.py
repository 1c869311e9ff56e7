"""Ranks: the one reader of the launchers' variables, and the few collectives that training needs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dde_ds.errors import UserError


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read_environment() -> Ranks:
    """Rank, number of ranks and local rank as ``deepspeed`` or ``torchrun`` exported them; a lone process is rank 0 of 1.

    Raises:
        UserError: some of RANK, WORLD_SIZE, LOCAL_RANK are set and others not, or not a number.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    missing = [name for name in names if name not in os.environ]
    if len(missing) == len(names):
        return Ranks(0, 1, 0)
    if missing:
        raise UserError(
            f"environment: {', '.join(missing)} not set beside the other of {', '.join(names)}; start with deepspeed or torchrun"
        )
    try:
        rank, world, local = (int(os.environ[name]) for name in names)
    except ValueError:
        raise UserError(f"environment: {', '.join(f'{n}={os.environ[n]!r}' for n in names)}: expected whole numbers") from None
    return Ranks(rank, world, local)


def start() -> tuple[Ranks, torch.device]:
    """Join the process group through DeepSpeed and pick this rank's device: its GPU, or the CPU (gloo)."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    ranks = read_environment()
    if ranks.world == 1:
        for name, value in (
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("LOCAL_RANK", "0"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "0"),
        ):
            os.environ.setdefault(name, value)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a shared-memory collective here: a minute with a compiler, a crash without one. It has no
        # switch for it; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(ranks.local_rank)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    return ranks, torch.device(accelerator.current_device_name())


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if ``flag`` is true on one. Collective; a host synchronisation."""
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """In place. Collective."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """In place. Collective."""
    return sum_over_ranks(values).div_(dist.get_world_size())


def is_lost_peer(error: Exception) -> bool:
    """Whether a gloo collective failed because another rank is gone: a bare RuntimeError that only its text tells apart."""
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def agree(ranks: Ranks, device: torch.device) -> None:
    """Wait for all ranks; a lone process, which may have no process group, goes on. Collective."""
    if ranks.world > 1:
        any_rank(False, device)


def first_says(value: Any, ranks: Ranks) -> Any:
    """The first rank's ``value`` on every rank; plain data only. Collective."""
    if ranks.world == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
