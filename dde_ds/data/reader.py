"""From positions to micro-batches: a map-style dataset, a sampler of this rank's slices, a DataLoader around both.

A micro-batch of B pairs is a dict of tensors: ``latents`` (2B,C,H,W) winners then losers, ``noise`` (B or 2B,C,H,W),
``timesteps`` (B,), ``prompt_embeds`` (2B,S,D), for SDXL ``pooled`` (2B,P) and ``time_ids`` (2B,6), and ``positions`` (B,).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dde_ds.data.draws import Draws
from dde_ds.data.order import Order
from dde_ds.data.shards import ShardSet
from dde_ds.errors import RankError, UserError


class PairDataset(Dataset):
    """Micro-batches by their positions. Indexed by a list, so that a worker hands over one whole micro-batch."""

    def __init__(self, shards: ShardSet, order: Order, draws: Draws):
        self.shards, self.order, self.draws = shards, order, draws

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor] | UserError:
        # An exception that leaves a worker is rewritten with its traceback; handed over as a value it keeps its one line.
        try:
            return self.collate([self.pair(position) for position in positions])
        except UserError as error:
            return error

    def pair(self, position: int) -> dict[str, torch.Tensor]:
        """One pair: every tensor of the shard's sample, its prompt's embeddings, its noise and timestep."""
        sample = self.shards.read(*self.order.locate(position))
        timestep, noise, drop_caption = self.draws(position, sample["latents"].shape)
        prompt = self.shards.prompt(0 if drop_caption else int(sample.pop("prompt")))
        sample.pop("prompt", None)
        return {**sample, **prompt, "noise": noise, "timesteps": torch.tensor(timestep), "positions": torch.tensor(position)}

    @staticmethod
    def collate(pairs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = {key: torch.stack([pair[key] for pair in pairs]) for key in pairs[0]}
        for key in ("latents", "time_ids", "noise"):  # (B,2,…) → winners, then losers; shared noise is (B,1,…)
            if key in batch:
                batch[key] = batch[key].transpose(0, 1).flatten(0, 1)
        for key in ("prompt_embeds", "pooled"):  # one caption for both
            if key in batch:
                batch[key] = torch.cat([batch[key], batch[key]])
        return batch


class RankSlices(Sampler):
    """Positions of one rank's micro-batches, step after step.

    Global batch g is positions [g·B, (g+1)·B); rank r takes the r-th of its equal parts, micro-batches lie inside that.
    """

    def __init__(self, pairs: int, micro: int, rank: int, world: int, start_step: int, end_step: int):
        self.pairs, self.micro, self.rank, self.world = pairs, micro, rank, world
        self.start_step, self.end_step = start_step, end_step

    def __iter__(self) -> Iterator[list[int]]:
        share = self.pairs // self.world
        for step in range(self.start_step, self.end_step):
            first = step * self.pairs + self.rank * share
            for low in range(first, first + share, self.micro):
                yield list(range(low, low + self.micro))

    def __len__(self) -> int:
        return (self.end_step - self.start_step) * (self.pairs // self.world // self.micro)


def _leave_signals_to_the_trainer(_: int) -> None:
    # Launchers send TERM to the whole process group; a worker that died of it would break the step that saves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.set_num_threads(1)


def micro_batches(dataset: PairDataset, slices: RankSlices, workers: int, pin_memory: bool) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches, in order.

    Raises:
        RankError: a sample that cannot be used; nothing is skipped.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=slices,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise RankError(str(batch))
        yield batch


def _as_is(batch):
    return batch
