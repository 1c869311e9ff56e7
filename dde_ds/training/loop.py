"""A whole run, from a configuration to an aligned model."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path

from torch.nn import functional

from dde_ds.config import RunConfig
from dde_ds.data.draws import Draws
from dde_ds.data.mixture import order_of
from dde_ds.data.reader import PairDataset, RankSlices, ReadingTotals, micro_batches
from dde_ds.distributed import any_rank, first_does, ranks_of_a_node, start
from dde_ds.engine import checkpoint
from dde_ds.engine.ema import update_ema
from dde_ds.engine.export import export_policy
from dde_ds.engine.update import accumulating, update
from dde_ds.engine.zero import complete_config
from dde_ds.errors import RankError
from dde_ds.evaluation.generate import PromptSet, save_row
from dde_ds.evaluation.heldout import HeldOut
from dde_ds.files import write_atomically
from dde_ds.models.quiet import quiet_libraries
from dde_ds.rows import is_metrics, last_numbers, read_rows
from dde_ds.training.folder import claimed
from dde_ds.training.guards import Guards
from dde_ds.training.heartbeat import Heartbeat
from dde_ds.training.ledger import open_ledger
from dde_ds.training.look import Look
from dde_ds.training.metrics import Averages, Clock, RunLog
from dde_ds.training.planning import Utilisation, chosen_checkpointing
from dde_ds.training.prepare import build_run_objective, load_engines, open_folder, open_shards
from dde_ds.training.progress import ProgressLine
from dde_ds.training.reading import reading_row
from dde_ds.training.resume import choose_checkpoint, cut_off, drawing, state_at
from dde_ds.training.signals import asked, listening
from dde_ds.training.step import micro_step
from dde_ds.training.stop import StopRequest, unless_stopped
from dde_ds.training.track import open_trackers
from dde_ds.training.watch import Watch
from dde_ds.warn import reason, warn_once

DONE, STOPPED = 0, 75
UNSTARTED = "stopped as asked before a step was made; go on with --resume auto"


def train(run: RunConfig, resume: str | None = None) -> int:
    """Run to the end, or to a request to stop. Every rank calls this. Signals ask it to stop while it runs in the main thread;
    their handlers are the old ones when it returns.

    Args:
        resume: None starts a new run and refuses a folder that holds one; ``required`` goes on from the newest checkpoint;
            ``auto`` does so where there is one and starts otherwise.

    Returns:
        0 when the run is done, 75 when it was asked to stop and can be resumed.

    Raises:
        UserError: unusable input.
    """
    with listening(), contextlib.ExitStack() as held:
        # ZeRO-3 leaves a function of its own there, which rounds otherwise: for the next run in this process.
        held.callback(setattr, functional, "linear", functional.linear)
        return _train(run, resume, held)


def _train(run: RunConfig, resume: str | None, held: contextlib.ExitStack) -> int:
    """As :func:`train`. What ``held`` takes is given back when the run ends, however that comes about."""
    quiet_libraries()
    deadline = None if run.max_hours is None else time.monotonic() + 3600 * run.max_hours
    folder = Path(run.output)
    shards, held_out_shards = open_shards(run)
    objective = build_run_objective(run)
    ranks, device = start(run.timeout_minutes)
    if any_rank(asked(), device):  # while libraries were imported and the others waited for
        if ranks.is_first:
            print(UNSTARTED, flush=True)
        return STOPPED
    on_a_node = ranks_of_a_node(ranks, device)
    ds_config = complete_config(run, ranks.world, on_a_node)

    def warn(line: str) -> None:
        print(f"warning: {line}", flush=True)

    lock = held.enter_context(claimed(folder, resume, warn))
    resumed, state, damaged = choose_checkpoint(run, shards, resume, warn)

    first_step, guards = state.get("step", 0), Guards(run.guards.max_skipped_in_a_row, **state.get("skipped", {}))
    ledger = open_ledger(run, shards, objective, ranks)
    # All that can be wrong with the input has been found; loading takes minutes, in which a request to stop must count.
    first_does(lambda: open_folder(folder, run))
    stop = StopRequest(folder, device, deadline)
    with_reference = objective.needs_reference and not (ledger and ledger.covers(first_step, run.steps))
    checkpointing = chosen_checkpointing(run, shards, with_reference, ranks.world, on_a_node, device)
    policy, reference = load_engines(run, ds_config, with_reference, checkpointing)
    utilisation = Utilisation(run, shards, with_reference, ranks.world, device)
    dtype = next(policy.parameters()).dtype
    objective.to(device)
    look = None
    if held_out_shards:
        held_out = HeldOut(held_out_shards, objective.schedule, run.evaluation.pairs, run.batch.micro, ranks.rank, ranks.world)
        # Before a checkpoint is loaded: the policy is still its own reference.
        look = unless_stopped(lambda: Look(held_out, policy.module, stop.poll))
    if stop.agreed():
        if ranks.is_first:
            print(UNSTARTED, flush=True)
        return STOPPED
    if resumed is not None:
        checkpoint.load(resumed, policy, objective)

    draws = Draws(run.seed, objective.timestep_probabilities, run.objective.shared_noise, run.data.caption_dropout, run.data.flip)
    dataset = PairDataset(shards, order_of(shards, run.seed, run.data.block_shards), draws, run.data.max_bad_samples)
    slices = RankSlices(run.batch.pairs, run.batch.micro, ranks.rank, ranks.world, first_step, run.steps)
    clock, averages, watch, reading = Clock(), Averages(), Watch(), ReadingTotals()
    batches = clock.timed(micro_batches(dataset, slices, run.data.workers, pin_memory=device.type == "cuda", totals=reading))
    if ledger:
        batches = ledger.fill(batches)
    accumulation = run.batch.accumulation(ranks.world)
    averages.restore(state.get("averages", {}), accumulation, device)
    prompts = PromptSet(run.model.path, run.model.revision, run.samples.prompts, device, dtype) if run.samples.prompts else None
    log = RunLog(folder, first_step, open_trackers(run, first_step)) if ranks.is_first else None
    heartbeat = Heartbeat(folder) if ranks.is_first else None
    if heartbeat:
        heartbeat.beat(first_step)
    if ranks.is_first:
        guards.write_to(folder, first_step)

    def draw_samples(step: int) -> None:
        if prompts:
            options = (run.samples.seed, run.samples.inference_steps, run.samples.guidance_scale)
            images = unless_stopped(lambda: prompts.draw(policy.module, *options, poll=stop.poll))
            if ranks.is_first and images is not None:
                try:
                    save_row(images, drawing(run, step))
                except OSError as error:
                    warn_once(f"pictures in {folder / 'samples'} could not be saved: {reason(error)}; the run goes on")
                log.show(step, images)

    def save_checkpoint(step: int) -> None:
        started = time.perf_counter()
        if ledger:
            ledger.write(ranks)
        beside = {"skipped": guards.counts(), "averages": averages.state(accumulation)}
        state, keep = state_at(run, shards, step) | beside, run.checkpoint
        path, size = checkpoint.save(folder / "checkpoints", policy, objective, state, keep.keep, keep.keep_every, damaged)
        progress.say(f"checkpoint {path.name}: {size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s")

    with ProgressLine(first_step, run.steps, visible=ranks.is_first) as progress:
        progress.say(
            f"{run.objective.name} on {ranks.world} x {device.type}, ZeRO-{ds_config['zero_optimization']['stage']}, {run.precision}: "
            f"{run.batch.pairs} pairs a step = {ranks.world} ranks x {accumulation} micro-batches of {run.batch.micro}"
            + (f"; {'no reference, but' if reference is None else 'reference errors into'} {ledger.path}" if ledger else "")
            + (f"; gradient checkpointing {checkpointing}" if checkpointing != run.model.gradient_checkpointing else "")
            + (f"; resumed after step {first_step}" if first_step else "")
        )
        row = last_numbers(read_rows(folder / "metrics.jsonl", is_metrics)) if ranks.is_first else {}
        look_missing, drawing_missing = first_does(lambda: cut_off(run, first_step))
        if drawing_missing:
            draw_samples(first_step)
        if look and look_missing and (looked := unless_stopped(lambda: look(objective))):
            row |= looked
            if log:
                log.write(first_step, first_step * run.batch.pairs, looked)
        if stop.agreed():
            progress.say(UNSTARTED)
            return STOPPED
        clock.read()  # what came before was not training
        for step in range(first_step + 1, run.steps + 1):
            with accumulating(policy):
                for _ in range(accumulation):
                    batch = next(batches)
                    out = micro_step(policy, reference, objective, batch, device)
                    if ledger:
                        ledger.add(batch, out.reference_errors)
                    policy.backward(guards.watch(out.loss, batch))
                    averages.add(out)
                    if not policy.is_gradient_accumulation_boundary():
                        policy.step()
            for group in policy.optimizer.param_groups:
                group["lr"] = run.optimizer.rate(step - 1)
            norm = update(policy)
            if heartbeat:
                heartbeat.beat(step)
                lock.check()
            if made := math.isfinite(norm):
                guards.passed()
                objective.commit()
                averages.commit()
                if run.ema:
                    update_ema(policy, run.ema.decay)
            else:
                objective.discard()
                averages.discard()
                progress.say(f"warning: {guards.skipped(step)}")
            clock.add(run.batch.pairs)

            looked = {}
            last = step == run.steps
            if look and (step % run.evaluation.every == 0 or last):
                with clock.stopped():
                    looked = unless_stopped(lambda: look(objective)) or {}
            if looked or step % run.log.every == 0 or last:
                row = {**averages.read(objective.schedule.timesteps), **clock.read(), **looked}
                row |= utilisation.row(row["perf/pairs_per_s"])
                row |= reading_row(reading, run.data.max_bad_samples, row["perf/pairs_per_s"], device)
                row |= {"learning_rate": run.optimizer.rate(step - 1), "guard/skipped_steps": guards.steps}
                if made:
                    row["grad_norm"] = norm
                if log:
                    log.write(step, step * run.batch.pairs, row, objective)
                progress.update(step, row)
                for warning in watch(row):
                    progress.say(f"warning: step {step}: {warning}")
            with clock.stopped():
                if step % run.samples.every == 0 or last:
                    draw_samples(step)
                stopping = stop.agreed()
                # Not among skipped steps, whose older checkpoints may be the last good ones.
                if stopping or last or (step % run.checkpoint.every == 0 and not guards.in_a_row):
                    save_checkpoint(step)
            if stopping:
                progress.say(f"stopped after step {step} as asked; go on with --resume")
                return STOPPED
    export_policy(policy, run, run.steps, row, folder / "export")
    if ranks.is_first:
        write_done(folder, run.steps)
    return DONE


def write_done(folder: Path, steps: int) -> None:
    """Write the proof that a run has ended.

    Raises:
        RankError: it cannot be written.
    """
    try:
        write_atomically(folder / "DONE", f"{steps} steps\n".encode())
    except OSError as error:
        raise RankError(
            f"{folder / 'DONE'} could not be written: {reason(error)}; the model is in {folder / 'export'}: mend it, then --resume "
            "writes both anew"
        ) from None
