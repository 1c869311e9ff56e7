"""A whole run, from a configuration to an aligned model."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from dde_ds.config import RunConfig, load_config
from dde_ds.data.draws import Draws
from dde_ds.data.mixture import MixedShards, open_sources, order_of
from dde_ds.data.reader import PairDataset, RankSlices, ReadingTotals, micro_batches
from dde_ds.data.shards import ShardSet
from dde_ds.distributed import any_rank, first_says, ranks_of_a_node, start
from dde_ds.engine import checkpoint
from dde_ds.engine.ema import update_ema
from dde_ds.engine.export import export_policy
from dde_ds.engine.update import update
from dde_ds.engine.zero import complete_config, initialize
from dde_ds.errors import UserError
from dde_ds.evaluation.generate import PromptSet, save_row
from dde_ds.evaluation.heldout import HeldOut
from dde_ds.files import write_atomically
from dde_ds.models import unet as models
from dde_ds.models.checkpointing import set_checkpointing
from dde_ds.models.lora import add_adapters
from dde_ds.models.quiet import quiet_libraries
from dde_ds.models.speed import compile_blocks, use_channels_last
from dde_ds.objective.objective import Objective, build_objective
from dde_ds.objective.schedule import NoiseSchedule
from dde_ds.training.guards import Guards
from dde_ds.training.heartbeat import Heartbeat
from dde_ds.training.ledger import open_ledger
from dde_ds.training.look import Look
from dde_ds.training.metrics import Averages, Clock, RunLog, last_numbers, read_rows
from dde_ds.training.planning import Utilisation, chosen_checkpointing
from dde_ds.training.progress import ProgressLine
from dde_ds.training.reading import reading_row
from dde_ds.training.reference import Reference, adapters_off, frozen_model
from dde_ds.training.resume import choose_checkpoint, cut_off, drawing, state_at
from dde_ds.training.step import micro_step
from dde_ds.training.stop import StopRequest, unless_stopped
from dde_ds.training.track import open_trackers
from dde_ds.training.watch import Watch

DONE, STOPPED = 0, 75


def train(run: RunConfig, resume: str | None = None) -> int:
    """Run to the end, or to a request to stop. Every rank calls this.

    Args:
        resume: None starts a new run and refuses a folder that holds one; ``required`` goes on from the newest checkpoint;
            ``auto`` does so where there is one and starts otherwise.

    Returns:
        0 when the run is done, 75 when it was asked to stop and can be resumed.

    Raises:
        UserError: unusable input.
    """
    quiet_libraries()
    deadline = None if run.max_hours is None else time.monotonic() + 3600 * run.max_hours
    folder = Path(run.output)
    shards, held_out_shards = open_shards(run)
    objective = build_run_objective(run)
    ranks, device = start(run.timeout_minutes)
    on_a_node = ranks_of_a_node(ranks, device)
    ds_config = complete_config(run, ranks.world, on_a_node)
    resumed = choose_checkpoint(run, shards, resume, device, lambda line: print(f"warning: {line}", flush=True))

    first_step = checkpoint.read_state(resumed)["step"] if resumed else 0
    ledger = open_ledger(run, shards, objective, ranks)
    with_reference = objective.needs_reference and not (ledger and ledger.covers(first_step, run.steps))
    checkpointing = chosen_checkpointing(run, shards, ranks.world, on_a_node, device)
    policy, reference = _load_engines(run, ds_config, with_reference, checkpointing)
    utilisation = Utilisation(run, shards, with_reference, ranks.world, device)
    dtype = next(policy.parameters()).dtype
    objective.to(device)
    if ranks.is_first:
        _open_folder(folder, run)
    any_rank(False, device)  # nobody goes on before the folder is there
    stop = StopRequest(folder, device, deadline)
    look = None
    if held_out_shards:
        held_out = HeldOut(held_out_shards, objective.schedule, run.evaluation.pairs, run.batch.micro, ranks.rank, ranks.world)
        # Before a checkpoint is loaded: the policy is still its own reference.
        look = unless_stopped(lambda: Look(held_out, policy.module, stop.poll))
    guards = Guards(run.guards.max_skipped_in_a_row)
    if resumed is not None:
        checkpoint.load(resumed, policy, objective)
        guards = Guards(run.guards.max_skipped_in_a_row, **checkpoint.read_state(resumed)["skipped"])

    draws = Draws(run.seed, objective.timestep_probabilities, run.objective.shared_noise, run.data.caption_dropout, run.data.flip)
    dataset = PairDataset(shards, order_of(shards, run.seed, run.data.block_shards), draws, run.data.max_bad_samples)
    slices = RankSlices(run.batch.pairs, run.batch.micro, ranks.rank, ranks.world, first_step, run.steps)
    clock, averages, watch, reading = Clock(), Averages(), Watch(), ReadingTotals()
    batches = clock.timed(micro_batches(dataset, slices, run.data.workers, pin_memory=device.type == "cuda", totals=reading))
    if ledger:
        batches = ledger.fill(batches)
    accumulation = run.batch.accumulation(ranks.world)
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
                save_row(images, drawing(run, step))

    def save_checkpoint(step: int) -> None:
        started = time.perf_counter()
        if ledger:
            ledger.write(ranks)
        state, keep = state_at(run, shards, step) | {"skipped": guards.counts()}, run.checkpoint
        path, size = checkpoint.save(folder / "checkpoints", policy, objective, state, keep.keep, keep.keep_every)
        progress.say(f"checkpoint {path.name}: {size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s")

    with ProgressLine(first_step, run.steps, visible=ranks.is_first) as progress:
        progress.say(
            f"{run.objective.name} on {ranks.world} x {device.type}, ZeRO-{ds_config['zero_optimization']['stage']}, {run.precision}: "
            f"{run.batch.pairs} pairs a step = {ranks.world} ranks x {accumulation} micro-batches of {run.batch.micro}"
            + (f"; {'no reference, but' if reference is None else 'reference errors into'} {ledger.path}" if ledger else "")
            + (f"; gradient checkpointing {checkpointing}" if checkpointing != run.model.gradient_checkpointing else "")
            + (f"; resumed after step {first_step}" if first_step else "")
        )
        row = last_numbers(read_rows(folder / "metrics.jsonl"))
        look_missing, drawing_missing = first_says(cut_off(run, first_step), ranks)
        if drawing_missing:
            draw_samples(first_step)
        if look and look_missing and (looked := unless_stopped(lambda: look(objective))):
            row |= looked
            if log:
                log.write(first_step, first_step * run.batch.pairs, looked)
        if stop.agreed():
            progress.say("stopped as asked before a step was made; go on with --resume auto")
            return STOPPED
        clock.read()  # what came before was not training
        for step in range(first_step + 1, run.steps + 1):
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
        write_atomically(folder / "DONE", f"{run.steps} steps\n".encode())
    return DONE


def build_run_objective(run: RunConfig) -> Objective:
    options = run.objective
    schedule = NoiseSchedule.from_scheduler(models.load_scheduler_config(run.model.path, run.model.revision), options.variance)
    return build_objective(
        options.name,
        schedule,
        beta=options.beta,
        correction_weight=options.correction_weight,
        correction_ema=options.correction_ema,
        discount=options.discount,
        discount_mode=options.discount_mode,
        timestep_range=options.timestep_range,
    )


def load_run_objective(folder: Path) -> tuple[Objective, list[dict]]:
    """The objective of a run folder with the table of its newest checkpoint, and the rows of its ``correction.jsonl``.

    Raises:
        UserError: no run folder, no checkpoint in it, or a run whose objective has no reference.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--run {folder}: no config.yaml there; name the output folder of a run")
    objective = build_run_objective(load_config(folder / "config.yaml"))
    checkpoints = checkpoint.list_checkpoints(folder / "checkpoints")
    if not checkpoints:
        raise UserError(f"--run {folder}: no checkpoint there yet; explain the run after its first one")
    if not objective.needs_reference:
        raise UserError(f"--run {folder}: {objective.name} compares with no reference and records no table")
    checkpoint.load_table(checkpoints[-1], objective)
    return objective, read_rows(folder / "correction.jsonl")


def _load_engines(run: RunConfig, ds_config: dict, with_reference: bool, checkpointing: str) -> tuple[Any, Reference | None]:
    policy = models.load_unet(run.model.path, run.model.revision)
    if run.lora:
        add_adapters(policy, run.lora.rank, run.lora.alpha_or_rank, run.lora.targets, run.seed)
    set_checkpointing(policy, checkpointing)
    second = models.load_unet(run.model.path, run.model.revision) if with_reference and not run.lora else None
    treat_alike(run, policy)
    if second is not None:
        treat_alike(run, second)
    placed = run.reference
    engine, second = initialize(policy, second, ds_config, reference_placement=placed.placement, reference_dtype=placed.dtype)
    if with_reference and run.lora:
        return engine, adapters_off(engine.module)
    return engine, None if second is None else frozen_model(second)


def treat_alike(run: RunConfig, unet: torch.nn.Module) -> None:
    """What policy and reference must both be, to begin at the same predictions."""
    if run.model.channels_last:
        use_channels_last(unet)
    if run.model.compile:
        compile_blocks(unet)


def open_shards(run: RunConfig) -> tuple[ShardSet | MixedShards, ShardSet | None]:
    """Training shards, and held-out ones where the run names any. They and the model must speak of the same latents: found out
    before any weight is loaded."""
    data = run.data
    remote = {"cache_dir": data.cache_dir, "cache_gb": data.cache_gb, "timeout": data.timeout_s}
    training = open_sources(data.weighted_paths, **remote, strict=not data.max_bad_samples)
    _check_fit(run, training, f"data.path {data.name}")
    if data.flip and not training.manifest["settings"]["flip"]:
        raise UserError(f"data.flip is true, but {data.name} holds no mirrored latents; shard the pairs with --flip")
    held_out = open_sources([(run.evaluation.path, 1.0)], **remote) if run.evaluation.path else None
    if held_out:
        _check_fit(run, held_out, f"evaluation.path {run.evaluation.path}")
    trained_on = {one.digest for one in (training.sets if isinstance(training, MixedShards) else [training])}
    if held_out and held_out.digest in trained_on:
        raise UserError(f"evaluation.path {run.evaluation.path}: holds the pairs of data.path; held-out pairs are needed")
    return training, held_out


def _check_fit(run: RunConfig, shards: ShardSet | MixedShards, name: str) -> None:
    config = models.load_unet_config(run.model.path, run.model.revision)
    channels, height, width = shards.latent_shape
    if channels != config["in_channels"]:
        raise UserError(
            f"{name}: latents have {channels} channels (shape {channels}x{height}x{width}), "
            f"the UNet of model.path {run.model.path} takes {config['in_channels']}; shard the pairs with this model"
        )
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if height % factor or width % factor:
        raise UserError(f"{name}: latents of {height}x{width} do not divide by the UNet's {factor}; shard at another --resolution")
    own = models.family(run.model.path, run.model.revision)
    if own != shards.manifest["settings"]["family"]:
        raise UserError(
            f"{name}: was made for {shards.manifest['settings']['family']!r} models, model.path {run.model.path} is {own!r}"
        )


def _open_folder(folder: Path, run: RunConfig) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(run.to_yaml(), encoding="utf-8")
        for stale in ("DONE", "STOP"):
            (folder / stale).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output {folder}: not writable: {error.strerror.lower()}") from None
    shutil.rmtree(folder / "checkpoints" / ".staging", ignore_errors=True)
