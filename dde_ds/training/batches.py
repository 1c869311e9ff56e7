"""The typed micro-batch that a training step takes, and the stream of one rank's micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dde_ds.config import RunConfig
from dde_ds.data.mixture import MixedShards, order_of
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset, ReadingTotals, Slices, micro_batches
from dde_ds.data.shards import ShardSet
from dde_ds.models.family import Conditioning
from dde_ds.objective.objective import Objective


@dataclass(frozen=True)
class Batch:
    """B preference pairs: B winners, then their B losers."""

    latents: Tensor
    """(2B,C,H,W), scaled as the UNet takes latents."""
    noise: Tensor
    """(B,C,H,W), shared by winner and loser; or (2B,C,H,W) if each has its own."""
    timesteps: Tensor
    """(B,) int64."""
    positions: Tensor
    """(B,) int64 on the CPU: each pair's position in the run. The pair's noise and timestep follow from the position."""
    prompt_embeds: Tensor
    """(2B,S,D)."""
    pooled_prompt_embeds: Tensor | None = None
    """(2B,P), SDXL's."""
    time_ids: Tensor | None = None
    """(2B,6) float32, SDXL's sizes and crops in pixels."""
    reference_errors: Tensor | None = None
    """(2B,) float32: the reference's errors, if an earlier run has written them down."""
    soft_label: Tensor | None = None
    """(B,) float32 in [0.5, 1]: each winner's share of the votes, if the shards hold it."""

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(self.prompt_embeds, self.pooled_prompt_embeds, self.time_ids)

    def step(self, pairs: int) -> int:
        """Return the optimizer step, counted from 0, that the batch belongs to. Waits for no device.

        Args:
            pairs: pairs of one optimizer step.
        """
        return int(self.positions[0]) // pairs

    def to(self, device: torch.device) -> Batch:
        """Return the batch with all tensors but ``positions`` on ``device``, without waiting for the copies."""
        moved = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "positions"}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in moved.items() if value is not None})


def open_batches(
    run: RunConfig,
    shards: ShardSet | MixedShards,
    objective: Objective,
    slices: Slices,
    device: torch.device,
    totals: ReadingTotals | None = None,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches in order. The run's seed, order and dropouts determine them.

    Args:
        slices: positions of each micro-batch, such as :class:`dde_ds.data.reader.RankSlices`.
        device: for a CUDA device, memory is pinned. The batches themselves are on the CPU.
        totals: counts what was read and replaced.
    """
    draws = PairRng(run.seed, objective.timestep_probabilities, run.objective.shared_noise, run.data.caption_dropout, run.data.flip)
    dataset = PairDataset(shards, order_of(shards, run.seed, run.data.block_shards), draws, run.data.max_bad_samples)
    for batch in micro_batches(dataset, slices, run.data.workers, pin_memory=device.type == "cuda", totals=totals):
        yield Batch(**batch)
