"""Decide whether a run starts or resumes, and from which checkpoint."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from dde_ds import __version__
from dde_ds.config import LoraConfig, RunConfig
from dde_ds.data.mixture import MixedShards
from dde_ds.data.shards import ShardSet
from dde_ds.distributed.collectives import first_does
from dde_ds.engine import checkpoint
from dde_ds.errors import UserError
from dde_ds.models.lora import adapters_digest
from dde_ds.rows import is_metrics, read_rows
from dde_ds.training.check import ENCODERS, SCHEDULE, WEIGHTS
from dde_ds.training.folder import require_usable


class Origin(NamedTuple):
    """The checkpoint that a run continues from. A new run has an empty origin."""

    checkpoint: Path | None = None
    state: dict[str, Any] = {}  # noqa: RUF012  never changed
    damaged: tuple[Path, ...] = ()
    """Later checkpoints, which were proved damaged."""


def choose_checkpoint(run: RunConfig, shards: ShardSet | MixedShards, base: dict[str, str], resume: str | None, say) -> Origin:
    """Return the checkpoint to continue from, or an empty origin for a new run. Collective.

    The first rank's view of the folder counts, since a network file system may show each rank another view.

    Args:
        base: as :func:`dde_ds.training.check.base_identity`.
        resume: None, ``required`` or ``auto``, as in :func:`dde_ds.training.loop.train`.
        say: takes one line for the user.

    Raises:
        UserError: there is no checkpoint to resume; every checkpoint is damaged or renamed; one could not be read; or the newest
            whole one belongs to another run.
    """
    folder = Path(run.output)
    if resume is None:
        return Origin()
    checkpoints = first_does(lambda: checkpoint.list_checkpoints(folder / "checkpoints"))
    if not checkpoints:
        if resume == "required":
            raise UserError(f"output {run.output}: --resume found no checkpoint there; start without it, or use --resume auto")
        return Origin()
    renamed = first_does(lambda: [path for path in checkpoints if checkpoint.misnamed(path)])
    chosen = checkpoint.newest_whole(checkpoints, say)
    if chosen is None:
        raise UserError(
            f"output {run.output}: all {len(checkpoints)} checkpoints are damaged{' or renamed' * bool(renamed)}; restore one from a copy, "
            "or delete the folder to start anew"
        )
    state = first_does(lambda: checkpoint.read_state(chosen))
    require_same_run(run, shards, base, chosen, state)
    return Origin(chosen, state, tuple(path for path in checkpoints[checkpoints.index(chosen) + 1 :] if path not in renamed))


def check_folder(run: RunConfig, shards: ShardSet | MixedShards, base: dict[str, str], resume: bool) -> None:
    """Check that a run can start in the run folder or, with ``resume``, continue from it, as :func:`choose_checkpoint` would.

    This is for one process. It does not read the checkpoints' files to their end.

    Raises:
        UserError: as :func:`dde_ds.training.folder.require_usable` and :func:`choose_checkpoint`.
    """
    folder = Path(run.output)
    require_usable(folder, "required" if resume else None)
    checkpoints = [path for path in checkpoint.list_checkpoints(folder / "checkpoints") if not checkpoint.misnamed(path)]
    if resume and not checkpoints:
        raise UserError(f"output {run.output}: --resume found no checkpoint there; start without it, or use --resume auto")
    if resume:
        checkpoint.read_table(checkpoints[-1])
        require_same_run(run, shards, base, checkpoints[-1], checkpoint.read_state(checkpoints[-1]))


def require_same_run(run: RunConfig, shards: ShardSet | MixedShards, base: dict[str, str], chosen: Path, state: dict) -> None:
    """Refuse to continue from the checkpoint ``chosen`` if another run has written it.

    Args:
        base: as :func:`dde_ds.training.check.base_identity`.
        state: the checkpoint's ``state.json``.

    Raises:
        UserError: the runs differ, and the message names the differences; or the checkpoint is past the run's last step.
    """
    if run.steps < state["step"]:
        raise UserError(f"steps is {run.steps}, but {chosen} is at step {state['step']} already; raise steps to train on")
    before = {"model.trainable": "all"} | state["identity"]  # earlier versions trained all
    require_same_base(run.model.path, base, chosen, before)
    # Paths may change if the content is known. Checkpoints of earlier versions know the base by its path alone.
    free = {*base, *(("model.path", "model.revision") if before.get(WEIGHTS) else ())}
    current = {key: value for key, value in identity(run, shards, base).items() if key not in free}
    if changed := differences(current, before):
        raise UserError(
            f"{', '.join(changed)} in {chosen}: a resumed run would not be the same run; set it back, or start another one in a new output "
            "folder, from this one's export/ if its training is to count"
        )


def require_same_base(path: str, base: dict[str, str], chosen: Path, before: dict) -> None:
    """Refuse a base whose content differs from the base that the checkpoint ``chosen`` was trained from.

    Args:
        base: as :func:`dde_ds.training.check.base_identity`.
        before: the ``identity`` in the checkpoint's ``state.json``.

    Raises:
        UserError: the contents differ.
    """
    for key, what in (
        (WEIGHTS, "UNet has other weights"),
        (ENCODERS, "VAE or text encoder has other weights"),
        (SCHEDULE, "scheduler has another noise schedule or prediction type"),
    ):
        if before.get(key) not in (None, base.get(key, before.get(key))):
            raise UserError(
                f"model.path {path}: its {what} than the base that {chosen} was trained from (SHA-256 {base[key][:12]}, was "
                f"{before[key][:12]}); name that base, wherever it lies now"
            )


def differences(own: dict, found: dict, prefix: str = "") -> list[str]:
    """Return the differences between two identities, one text for each value, such as ``objective.beta is 300, was 500``."""
    lines = []
    for key in {**own, **(found if prefix else {})}:  # a later version may have more keys than this one
        value, other = own.get(key), found.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            lines += differences(value, other, f"{prefix}{key}.")
        elif value != other:
            lines.append(f"{prefix}{key} is {_short(value)}, was {_short(other)}")
    return lines


def _short(value: Any) -> str:
    """Return a value as text for a message: numbers as they are written, and only the beginning of digests."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:8]}…"
    return json.dumps(value, ensure_ascii=False).removesuffix(".0")


def identity(run: RunConfig, shards: ShardSet | MixedShards, base: dict[str, str]) -> dict:
    """Return what a run may not change on resume. A change would mix two orders, two objectives or two models in one run.

    Ranks, micro-batches and ZeRO stages may change. Paths may change too, since digests identify the content.
    """
    return {
        **base,
        "seed": run.seed,
        "batch.pairs": run.batch.pairs,
        "data": shards.digest,
        "data.block_shards": run.data.block_shards,
        "data.caption_dropout": run.data.caption_dropout,
        "data.flip": run.data.flip,
        "model.path": run.model.path,
        "model.revision": run.model.revision,
        "model.trainable": json.loads(json.dumps(run.model.trainable)),
        "precision": run.precision,
        # Through JSON, which turns tuples into lists.
        "objective": json.loads(json.dumps(asdict(run.objective))),
        "lora": json.loads(json.dumps(run.lora and _lora_identity(run.lora))),
        "ema": run.ema and asdict(run.ema),
    }


def _lora_identity(lora: LoraConfig) -> dict:
    """Return the adapters' settings, with the content of their file in the place of its path."""
    settings = {key: value for key, value in asdict(lora).items() if key != "init"}
    return settings | ({"init": adapters_digest(lora.init)} if lora.init else {})


class MissingOutputs(NamedTuple):
    """Outputs that were due after a step and are missing, since a request to stop cut them off."""

    evaluation: bool
    samples: bool


def missing_outputs(run: RunConfig, step: int) -> MissingOutputs:
    """Return whether the evaluation row and the sample images of ``step`` are due and missing."""
    evaluation_due, samples_due = (step % every == 0 or step == run.steps for every in (run.evaluation.every, run.samples.every))
    rows = read_rows(Path(run.output) / "metrics.jsonl", is_metrics) if run.evaluation.path and step and evaluation_due else []
    evaluated = not rows or any(row["step"] == step and "eval/loss" in row for row in rows)
    drawn = not run.samples.prompts or not samples_due or (step > 0 and sample_path(run, step).exists())
    return MissingOutputs(not evaluated, not drawn)


def sample_path(run: RunConfig, step: int) -> Path:
    """Return the path of the images that are drawn after ``step``."""
    return Path(run.output) / "samples" / f"step-{step:08d}.png"


def state_at(run: RunConfig, shards: ShardSet | MixedShards, base: dict[str, str], step: int) -> dict:
    """Return what a checkpoint says of itself: step, position, identity, configuration and versions."""
    packages = ("torch", "deepspeed", "diffusers", *(["peft"] if run.lora else []))
    return {
        "step": step,
        "position": step * run.batch.pairs,
        "identity": identity(run, shards, base),
        "config": run.as_data(),
        "versions": {"dde_ds": __version__, **{name: version(name) for name in packages}},
    }
