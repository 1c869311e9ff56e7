"""A ledger without training: the reference's forward passes of a run, and nothing else."""

from __future__ import annotations

from pathlib import Path

from dde_ds.config import RunConfig
from dde_ds.data.reader import RankSlices
from dde_ds.distributed import start
from dde_ds.errors import UserError
from dde_ds.models import unet as models
from dde_ds.models.quiet import quiet_libraries
from dde_ds.training.batches import open_batches
from dde_ds.training.ledger import open_ledger
from dde_ds.training.prepare import build_run_objective, open_shards, treat_alike
from dde_ds.training.reference import frozen_model
from dde_ds.training.step import errors_of


def fill_ledger(run: RunConfig) -> None:
    """Write the errors of every pair that ``run`` will train on and its ledger does not hold yet. Every rank calls this.

    It writes as often as the run would save a checkpoint, so it may be killed and started again. The batch's micro-batches are the
    run's own: another size may round differently.

    Raises:
        UserError: no ``reference.ledger``, an objective without a reference, or a ledger of something else.
    """
    quiet_libraries()
    shards, _ = open_shards(run)
    objective = build_run_objective(run)
    if not run.reference.ledger:
        raise UserError("reference.ledger is not set: name the file to write, such as reference.ledger=ledgers/first.safetensors")
    if not objective.needs_reference:
        raise UserError(f"objective.name is {run.objective.name!r}: it compares with no reference and needs no ledger")
    ranks, device = start(run.timeout_minutes)
    accumulation = run.batch.accumulation(ranks.world)
    ledger = open_ledger(run, shards, objective, ranks)
    missing = [step for step in range(run.steps) if not ledger.covers(step, step + 1)]
    if missing:
        path, revision, variant = run.model.path, run.model.revision, run.model.variant
        reference = models.load_unet(path, revision, run.reference_precision, variant).to(device)
        reference.requires_grad_(False).eval()
        treat_alike(run, reference)
        objective.to(device)
        slices = [RankSlices(run.batch.pairs, run.batch.micro, ranks.rank, ranks.world, step, step + 1) for step in missing]
        batches = open_batches(run, shards, objective, [own for each in slices for own in each], device)
        model, dtype = frozen_model(reference), models.DTYPES[run.precision]
        for number, batch in enumerate(batches, 1):
            ledger.add(batch, errors_of(model, objective.schedule, batch, device, dtype))
            if number % (accumulation * run.checkpoint.every) == 0:
                ledger.write(ranks)
        ledger.write(ranks)
    if ranks.is_first:
        pairs = run.steps * run.batch.pairs
        print(f"{len(missing) * run.batch.pairs} of {pairs} pairs were missing; {Path(run.reference.ledger)} holds them all")
