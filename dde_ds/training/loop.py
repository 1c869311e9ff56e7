"""A whole run, from a configuration to an aligned model."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import torch
from torch.nn import functional

from dde_ds.config import RunConfig
from dde_ds.distributed.collectives import first_does
from dde_ds.distributed.environment import read_environment
from dde_ds.engine.ema import update_ema
from dde_ds.engine.export import export_policy
from dde_ds.engine.update import apply_if_finite, gradient_accumulation
from dde_ds.errors import RankError
from dde_ds.files import write_atomically
from dde_ds.models.silence import silence_libraries
from dde_ds.training.resume import missing_outputs
from dde_ds.training.session import Session, open_session
from dde_ds.training.signals import listening
from dde_ds.training.step import micro_step
from dde_ds.warn import reason

DONE, STOPPED = 0, 75
UNSTARTED = "stopped as asked before a step was made; go on with --resume auto"


def train(run: RunConfig, resume: str | None = None) -> int:
    """Run training from a configuration to the export, or until a request to stop. Collective: every rank calls this function.

    Called in the main thread, the run also stops on signals. The earlier signal handlers are back in place when the function
    returns.

    Args:
        resume: None starts a new run and refuses a folder that holds a run. ``required`` continues from the newest checkpoint.
            ``auto`` continues if there is a checkpoint, and starts a new run otherwise.

    Returns:
        0 when the run is done; 75 when the run was asked to stop and can be resumed.

    Raises:
        UserError: unusable input.
    """
    silence_libraries()
    with listening(), contextlib.ExitStack() as cleanup:
        # ZeRO-3 may replace this function by its own, which rounds differently. The next run in this process needs PyTorch's again.
        cleanup.callback(setattr, functional, "linear", functional.linear)
        # A float32 run turns TF32 off, for itself alone.
        cleanup.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)

        # Open models, data and folder; then produce the outputs that an earlier request to stop prevented
        session = open_session(run, resume, cleanup)
        if session is None or not catch_up(session):
            if read_environment().is_main:
                print(UNSTARTED, flush=True)
            return STOPPED

        # Train
        with session.progress:
            for step in range(session.first_step + 1, run.steps + 1):
                grad_norm = optimizer_step(session, step)
                if after_step(session, step, grad_norm):
                    session.progress.say(f"stopped after step {step} as asked; go on with --resume")
                    return STOPPED

        # Export
        export_policy(session.policy, run, run.steps, session.log.last, session.folder / "export")
        if session.ranks.is_main:
            write_done(session.folder, run.steps)
        return DONE


def optimizer_step(session: Session, step: int) -> float | None:
    """Train on the pairs of one optimizer step. Collective.

    Returns:
        The gradient's norm before clipping, or None if the norm was not finite. In that case all ranks skip the step.
    """
    policy, run = session.policy, session.run

    # Add up the gradients of the micro-batches
    with gradient_accumulation(policy):
        for _ in range(session.accumulation):
            batch = next(session.batches)
            out = micro_step(policy, session.reference, session.objective, batch, session.device)
            policy.backward(session.take(batch, out))
            if not policy.is_gradient_accumulation_boundary():
                policy.step()

    # Update the weights
    for group in policy.optimizer.param_groups:
        group["lr"] = run.optimizer.rate(step - 1)
    norm = apply_if_finite(policy)
    session.heartbeat.beat(step)
    if session.lock:
        session.lock.check()

    # Let the step count, or forget it
    session.clock.add(run.batch.pairs)
    if not math.isfinite(norm):
        session.objective.discard()
        session.averages.discard()
        session.progress.say(f"warning: {session.guards.skipped(step)}")
        return None
    session.guards.passed()
    session.objective.commit()
    session.averages.commit()
    if run.ema:
        update_ema(policy, run.ema.decay)
    return norm


def after_step(session: Session, step: int, grad_norm: float | None) -> bool:
    """Evaluate, log, draw and save whatever is due after ``step``. Collective.

    Returns:
        Whether the run was asked to stop.
    """
    evaluated: dict[str, float] = {}
    if session.evaluator.due(step):
        with session.clock.stopped():
            evaluated = session.evaluator.evaluate()
    if evaluated or session.log.due(step):
        row = session.row(step, grad_norm) | evaluated
        session.log.write(step, step * session.run.batch.pairs, row, session.objective, session.averages.credit)
        session.progress.update(step, row)
        for problem in session.health(row):
            session.progress.say(f"warning: step {step}: {problem}")
    with session.clock.stopped():
        if session.samples.due(step):
            session.samples.draw(step)
        stopping = session.stop.agreed()
        if stopping or session.checkpoints.due(step, session.guards):
            save(session, step)
    return stopping


def save(session: Session, step: int) -> None:
    """Write the reference's errors that were collected since the last save, then the checkpoint of ``step``. Collective."""
    session.precomputed.write(session.ranks)
    extra_state = {"skipped": session.guards.counts(), "averages": session.averages.state(session.accumulation)}
    session.progress.say(session.checkpoints.save(step, session.policy, session.objective, extra_state))


def catch_up(session: Session) -> bool:
    """Draw the samples and evaluate the held-out pairs that were due after step ``session.first_step`` and are missing.
    Collective.

    Returns:
        False if the run was asked to stop.
    """
    step = session.first_step
    missing = first_does(lambda: missing_outputs(session.run, step))
    if missing.samples:
        session.samples.draw(step)
    if missing.evaluation and (evaluated := session.evaluator.evaluate()):
        session.log.amend(step, step * session.run.batch.pairs, evaluated)
    session.clock.read()  # restart the clock: the time until now was not spent on training
    return not session.stop.agreed()


def write_done(folder: Path, steps: int) -> None:
    """Write the file ``DONE``, which proves that a run has ended.

    Raises:
        RankError: the file cannot be written.
    """
    try:
        write_atomically(folder / "DONE", f"{steps} steps\n".encode())
    except OSError as error:
        raise RankError(
            f"{folder / 'DONE'} could not be written: {reason(error)}; the model is in {folder / 'export'}: mend it, then --resume "
            "writes both anew"
        ) from None
