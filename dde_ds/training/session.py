"""The parts of a run while it trains, and the function that opens all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dde_ds.config import RunConfig
from dde_ds.data.reader import RankSlices, ReadingTotals
from dde_ds.distributed.collectives import any_rank, find_local_world_size, first_does
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.distributed.group import start
from dde_ds.engine import checkpoint
from dde_ds.engine.zero import complete_config
from dde_ds.objective.objective import Objective, ObjectiveOutput
from dde_ds.planning.workload import Utilisation, chosen_checkpointing
from dde_ds.rows import RowFile
from dde_ds.training.batches import Batch, open_batches
from dde_ds.training.check import check_start
from dde_ds.training.checkpoints import Checkpoints
from dde_ds.training.folder import claimed
from dde_ds.training.guards import Guards
from dde_ds.training.health import HealthMonitor
from dde_ds.training.heartbeat import Heartbeat
from dde_ds.training.heldout import HeldOutEvaluator
from dde_ds.training.lock import Lock
from dde_ds.training.metrics import Averages, Clock, RunLog
from dde_ds.training.precomputed import PrecomputedReference, open_precomputed
from dde_ds.training.prepare import build_run_objective, load_engines, open_folder, open_shards
from dde_ds.training.progress import ProgressLine
from dde_ds.training.reading import reading_row
from dde_ds.training.reference import Reference
from dde_ds.training.resume import choose_checkpoint
from dde_ds.training.samples import Samples
from dde_ds.training.signals import asked
from dde_ds.training.stop import StopRequest
from dde_ds.training.track import open_trackers


@dataclass(frozen=True)
class Session:
    """Hold the parts of a run, on every rank.

    A feature that is switched off still has its part. That part is never due and does nothing.
    """

    run: RunConfig
    ranks: DistributedEnv
    device: torch.device
    folder: Path
    first_step: int
    """Optimizer steps in the checkpoint that the run continues from; 0 for a new run."""
    accumulation: int
    """Micro-batches of one optimizer step on this rank."""

    policy: Any
    """DeepSpeed's engine of the policy."""
    reference: Reference | None
    """The source of the reference's predictions. None if the objective compares with no reference, or if the precomputed
    reference holds every error that the run needs."""
    objective: Objective
    batches: Iterator[Batch]

    precomputed: PrecomputedReference
    guards: Guards
    heartbeat: Heartbeat
    lock: Lock | None
    """The lock on the run folder, on the first rank; None on the others."""
    stop: StopRequest

    averages: Averages
    clock: Clock
    utilisation: Utilisation
    reading: ReadingTotals
    health: HealthMonitor
    log: RunLog
    progress: ProgressLine
    evaluator: HeldOutEvaluator
    samples: Samples
    checkpoints: Checkpoints

    def take(self, batch: Batch, out: ObjectiveOutput) -> torch.Tensor:
        """Add a micro-batch's metrics and reference errors to the run's records. Return the loss for the backward pass, a scalar."""
        self.precomputed.add(batch, out.reference_errors)
        self.averages.add(out)
        return self.guards.watch(out.loss, batch)

    def row(self, step: int, grad_norm: float | None) -> dict[str, float]:
        """Return the metrics of the steps since the last row. Collective.

        Args:
            grad_norm: the gradient's norm in the last step, before clipping; None if that step was skipped.

        Raises:
            UserError: the ranks have met more damaged samples than the run may replace.
        """
        row = {**self.averages.read(self.objective.schedule.num_train_timesteps), **self.clock.read()}
        row |= self.utilisation.row(row["perf/pairs_per_s"])
        row |= reading_row(self.reading, self.run.data.max_bad_samples, row["perf/pairs_per_s"], self.device)
        row |= {"learning_rate": self.run.optimizer.rate(step - 1), "guard/skipped_steps": self.guards.steps}
        return row | ({} if grad_norm is None else {"grad_norm": grad_norm})


def open_session(run: RunConfig, resume: str | None, held: ExitStack) -> Session | None:
    """Open everything that a run needs, and load the checkpoint that the run continues from. Collective.

    Args:
        resume: None, ``required`` or ``auto``, as in :func:`dde_ds.training.loop.train`.
        held: collects the clean-up for the end of the run, whatever ends it.

    Returns:
        The session, or None after a request to stop.

    Raises:
        UserError: unusable input.
    """
    deadline = None if run.max_hours is None else time.monotonic() + 3600 * run.max_hours
    folder = Path(run.output)

    # Shards and objective, which need no other rank
    shards, held_out_shards = open_shards(run)
    objective = build_run_objective(run)

    # Ranks
    ranks, device = start(run.timeout_minutes)
    # A request may have come while libraries were imported, or while this rank waited for the others.
    if any_rank(asked(), device):
        return None
    local_world_size = find_local_world_size(ranks, device)
    ds_config = complete_config(run, ranks.world_size, local_world_size)

    # Run folder: check that the run may write there and that base and shards are whole and fit; choose a checkpoint to continue
    # from
    lock = held.enter_context(claimed(folder, resume, _warn))
    base, notes = first_does(lambda: check_start(run, shards, held_out_shards, objective, ds_config, ranks.world_size))
    for line in notes if ranks.is_main else ():
        print(f"note: {line}", flush=True)
    resumed, state, damaged = choose_checkpoint(run, shards, base, resume, _warn)
    first_step = state.get("step", 0)
    precomputed = open_precomputed(run, shards, objective, ranks)
    first_does(lambda: open_folder(folder, run))

    # Models. All checks of the input are done. Loading takes minutes, and a request to stop must count during that time.
    stop = StopRequest(folder, device, deadline)
    with_reference = objective.needs_reference and not precomputed.covers(first_step, run.steps)
    checkpointing = chosen_checkpointing(run, shards, with_reference, ranks.world_size, local_world_size, device)
    policy, reference = load_engines(run, ds_config, with_reference, checkpointing)
    objective.to(device)
    evaluator = HeldOutEvaluator(run, held_out_shards, objective, policy.module, ranks, stop)  # before weights are restored
    if stop.agreed():
        return None
    if resumed is not None:
        checkpoint.load(resumed, policy, objective)

    # Data
    slices = RankSlices(run.batch.pairs, run.batch.micro_batch_size, ranks.rank, ranks.world_size, first_step, run.steps)
    clock, reading, accumulation = Clock(), ReadingTotals(), run.batch.accumulation(ranks.world_size)
    batches = precomputed.fill(clock.timed(open_batches(run, shards, objective, slices, device, reading)))

    # Counters, logs and progress
    log_folder = folder if ranks.is_main else None
    averages = Averages()
    averages.restore(state.get("averages", {}), accumulation, device)
    skipped = RowFile(folder / "skipped.jsonl", first_step) if log_folder else None
    guards = Guards(run.guards.max_skipped_in_a_row, **state.get("skipped", {}), log=skipped)
    log = RunLog(log_folder, first_step, open_trackers(run, first_step) if log_folder else (), run.log.every, run.steps)
    held.callback(log.close)
    heartbeat = Heartbeat(log_folder)
    heartbeat.beat(first_step)
    progress = ProgressLine(first_step, run.steps, visible=ranks.is_main)
    progress.say(
        f"{run.objective.name} on {ranks.world_size} x {device.type}, ZeRO-{ds_config['zero_optimization']['stage']}, {run.precision}: "
        f"{run.batch.pairs} pairs a step = {ranks.world_size} ranks x {accumulation} micro-batches of {run.batch.micro_batch_size}"
        + (
            f"; {'no reference, but' if reference is None else 'reference errors into'} {precomputed.path}"
            if precomputed.path
            else ""
        )
        + (f"; gradient checkpointing {checkpointing}" if checkpointing != run.model.gradient_checkpointing else "")
        + (f"; resumed after step {first_step}" if first_step else "")
    )
    return Session(
        run=run,
        ranks=ranks,
        device=device,
        folder=folder,
        first_step=first_step,
        accumulation=accumulation,
        policy=policy,
        reference=reference,
        objective=objective,
        batches=batches,
        precomputed=precomputed,
        guards=guards,
        heartbeat=heartbeat,
        lock=lock,
        stop=stop,
        averages=averages,
        clock=clock,
        utilisation=Utilisation(run, shards, with_reference, ranks.world_size, device),
        reading=reading,
        health=HealthMonitor(),
        log=log,
        progress=progress,
        evaluator=evaluator,
        samples=Samples(run, policy, ranks, device, stop, log),
        checkpoints=Checkpoints(run, shards, base, damaged),
    )


def _warn(line: str) -> None:
    print(f"warning: {line}", flush=True)
