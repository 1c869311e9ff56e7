"""Precompute a run's reference errors without training: run the reference's forward passes and nothing else."""

from __future__ import annotations

from pathlib import Path

from dde_ds.config import RunConfig
from dde_ds.data.reader import RankSlices
from dde_ds.distributed.group import start
from dde_ds.errors import UserError
from dde_ds.models import unet as models
from dde_ds.models.silence import silence_libraries
from dde_ds.training.batches import open_batches
from dde_ds.training.precomputed import open_precomputed
from dde_ds.training.prepare import apply_compute_options, build_run_objective, open_shards
from dde_ds.training.reference import frozen_model
from dde_ds.training.step import errors_of


def precompute_reference(run: RunConfig) -> None:
    """Write the reference's errors of every pair that ``run`` will train on and its file lacks. Collective: every rank calls this
    function.

    The file is written as often as the run would save a checkpoint. So the process may be killed and started again. The
    micro-batches have the run's own size, since another size may round differently.

    Raises:
        UserError: ``reference.precomputed`` is not set, the objective has no reference, or the file belongs to another
            reference, data, seed or sampling.
    """
    silence_libraries()
    shards, _ = open_shards(run)
    objective = build_run_objective(run)
    if not run.reference.precomputed:
        raise UserError(
            "reference.precomputed is not set: name the file to write, such as reference.precomputed=precomputed/first.safetensors"
        )
    if not objective.needs_reference:
        raise UserError(f"objective.name is {run.objective.name!r}: it compares with no reference and needs none precomputed")
    ranks, device = start(run.timeout_minutes)
    accumulation = run.batch.accumulation(ranks.world_size)
    precomputed = open_precomputed(run, shards, objective, ranks)
    missing = [step for step in range(run.steps) if not precomputed.covers(step, step + 1)]
    if missing:
        path, revision, variant = run.model.path, run.model.revision, run.model.variant
        reference = models.load_unet(path, revision, run.reference_precision, variant).to(device)
        reference.requires_grad_(False).eval()
        apply_compute_options(run, reference)
        objective.to(device)
        slices = [
            RankSlices(run.batch.pairs, run.batch.micro_batch_size, ranks.rank, ranks.world_size, step, step + 1)
            for step in missing
        ]
        batches = open_batches(run, shards, objective, [positions for each in slices for positions in each], device)
        model, dtype = frozen_model(reference), models.DTYPES[run.precision]
        for number, batch in enumerate(batches, 1):
            precomputed.add(batch, errors_of(model, objective.schedule, batch, device, dtype))
            if number % (accumulation * run.checkpoint.every) == 0:
                precomputed.write(ranks)
        precomputed.write(ranks)
    if ranks.is_main:
        pairs = run.steps * run.batch.pairs
        print(f"{len(missing) * run.batch.pairs} of {pairs} pairs were missing; {Path(run.reference.precomputed)} holds them all")
