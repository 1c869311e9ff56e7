"""Checkpoints that are whole or absent, and that any number of ranks and any ZeRO stage can resume.

    checkpoints/step-00000100/
      state-00000-000.safetensors   float32 weights and optimizer moments of whole parameters, NAME/weight, NAME/exp_avg, …; the
                                    first number is the rank that wrote it, which means nothing when it is read
      objective.safetensors         the correction table
      state.json                    step, position, and what must not change on resume
      manifest.json                 every file with its bytes and sha256

A checkpoint is written in ``checkpoints/.staging``, each file fsynced by the rank that wrote it, and renamed when every rank is done.
Loading checks every file first.
Nothing is pickled: reading a checkpoint runs no code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dde_ds.distributed import any_rank
from dde_ds.engine import state as training_state
from dde_ds.errors import OtherRankError, RankError, UserError
from dde_ds.files import TRASH, discard, publish, sha256_of, sync
from dde_ds.objective.objective import Objective

STATE, TABLE, MANIFEST = "state.json", "objective.safetensors", "manifest.json"
FORMAT = "dde_ds checkpoint 1"
# What a rank holds in memory before it writes a file.
PART_BYTES = 2 * 2**30


def save(
    folder: Path, policy: Any, objective: Objective, state: dict, keep: int, keep_every: int | None = None
) -> tuple[Path, int]:
    """Write the checkpoint of ``state["step"]``, then delete what need not be kept. Collective; ranks share ``folder``.

    Args:
        keep: how many of the newest stay.
        keep_every: checkpoints at multiples of this step stay as well.

    Returns:
        The checkpoint and its size in bytes.

    Raises:
        RankError: no room on the disk, or a file that cannot be written. Older checkpoints stay as they are.
    """
    staging, target = folder / ".staging", folder / f"step-{state['step']:08d}"
    trouble = None
    if dist.get_rank() == 0:
        trouble = _make_room(staging, policy)
    _raise_together(trouble, policy.device)
    try:
        rows, trouble = _write_parts(staging, policy), None
    except (OSError, SafetensorError) as error:
        rows, trouble = [], error
    _raise_together(trouble and _unwritable(staging, trouble), policy.device)
    everyone: list[list[dict]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, rows)
    if dist.get_rank() == 0:
        try:
            _finish(staging, target, [row for rank in everyone for row in rank], policy, objective, state)
            finished = list_checkpoints(folder)
            for later in (path for path in finished if step_of(path) > state["step"]):
                discard(later)  # damaged, or the run would not have gone on from before it: not to be kept in this one's place
            for old in [path for path in finished if step_of(path) <= state["step"]][:-keep]:
                if not keep_every or step_of(old) % keep_every:
                    discard(old)
        except (OSError, SafetensorError) as error:
            trouble = error
    _raise_together(trouble and _unwritable(staging, trouble), policy.device)
    return target, sum(row["bytes"] for rank in everyone for row in rank)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first. Whether their files are still whole is for :func:`damage` to say."""
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_state(checkpoint: Path) -> dict:
    """``state.json`` of a checkpoint."""
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {checkpoint}: {STATE} not readable: {error}") from None


def damage(checkpoint: Path, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} says {manifest['format']!r}, this version reads {FORMAT!r}"
        for row in manifest["files"][rank::world]:
            path = checkpoint / row["name"]
            if path.stat().st_size != row["bytes"] or sha256_of(path) != row["sha256"]:
                return f"{row['name']} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def newest_whole(checkpoints: list[Path], device: torch.device, on_damage) -> Path | None:
    """The newest checkpoint whose files are what was written; ``on_damage`` is told of each newer one. Collective."""
    for checkpoint in reversed(checkpoints):
        wrong = damage(checkpoint, dist.get_rank(), dist.get_world_size())
        if wrong:
            on_damage(f"checkpoint {checkpoint}: damaged: {wrong}")
        if not any_rank(wrong is not None, device):
            return checkpoint
    return None


def load(checkpoint: Path, policy: Any, objective: Objective) -> None:
    """Restore weights, optimizer and correction table. Collective; only the first rank reads the weights.

    Raises:
        UserError: the checkpoint is of another model or of another optimizer.
    """
    load_table(checkpoint, objective)
    state = read_state(checkpoint)
    kinds = state["optimizer"]["moments"]
    parameters = training_state.trained(policy)
    first = dist.get_rank() == 0
    reader = WeightReader(checkpoint) if first else None
    names = [f"{name}/{kind}" for name, _ in parameters for kind in (training_state.WEIGHT, *kinds)]
    strange = sorted(set(names) ^ set(reader.names))[:3] if reader else []
    _raise_together(
        UserError(f"checkpoint {checkpoint}: is not of this model: {', '.join(strange)} is in one of them only")
        if strange
        else None,
        policy.device,
    )
    training_state.begin_restoring(policy, state["optimizer"]["steps"], kinds)
    for name, parameter in parameters:
        tensors = {}
        for kind in (training_state.WEIGHT, *kinds):
            value = torch.empty(training_state.full_shape(parameter), dtype=torch.float32, device=policy.device)
            if reader:
                value.copy_(reader.read(f"{name}/{kind}"))
            dist.broadcast(value, 0)
            tensors[kind] = value
        training_state.restore(policy, parameter, tensors)
    training_state.end_restoring(policy)
    policy.global_steps = state["step"]


def load_table(checkpoint: Path, objective: Objective) -> None:
    """Restore the correction table alone.

    Raises:
        UserError: the table is missing or damaged.
    """
    try:
        objective.load_state_dict(safetensors.torch.load_file(checkpoint / TABLE))
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"checkpoint {checkpoint}: {TABLE} not readable: {' '.join(str(error).split())}") from None


class WeightReader:
    """Tensors of a checkpoint by name, each read when it is asked for."""

    def __init__(self, checkpoint: Path):
        self._files = {}
        for path in sorted(checkpoint.glob("state-*.safetensors")):
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def _make_room(staging: Path, policy: Any) -> RankError | None:
    weights = sum(training_state.full_shape(parameter).numel() for _, parameter in training_state.trained(policy))
    need = 4 * weights * (1 + len(training_state.moments(policy)))
    try:
        for left in (staging, staging.with_name(TRASH)):  # by a save that was killed
            shutil.rmtree(left, ignore_errors=True)
        staging.mkdir(parents=True)
        free = shutil.disk_usage(staging).free
    except OSError as error:
        return _unwritable(staging, error)
    if free < need:
        return RankError(
            f"checkpoints in {staging.parent}: {free / 1e9:.1f} GB free, one takes {need / 1e9:.1f} GB: make room, then go on "
            "with --resume; lower checkpoint.keep where space is short"
        )
    return None


def _write_parts(staging: Path, policy: Any) -> list[dict]:
    """This rank's share of the parameters, in files of about ``PART_BYTES``; their rows of the manifest. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows: list[dict] = []
    held: dict[str, Tensor] = {}
    trouble: Exception | None = None

    def flush() -> None:
        nonlocal trouble
        if held and not trouble:
            path = staging / f"state-{rank:05d}-{len(rows):03d}.safetensors"
            try:
                safetensors.torch.save_file(held, path)
                rows.append(_row(path))
            except (OSError, SafetensorError) as error:
                # Told when all parameters are through: the other ranks wait for this one in the next gathering.
                trouble = error
        held.clear()

    for number, (name, tensors) in enumerate(training_state.gather(policy)):
        if number % world == rank:
            held |= {f"{name}/{kind}": value.cpu().contiguous() for kind, value in tensors.items()}
            if sum(value.nbytes for value in held.values()) >= PART_BYTES:
                flush()
    flush()
    if trouble:
        raise trouble
    return rows


def _finish(staging: Path, target: Path, rows: list[dict], policy: Any, objective: Objective, state: dict) -> None:
    safetensors.torch.save_file(objective.state_dict(), staging / TABLE)
    optimizer = {"steps": training_state.optimizer_steps(policy), "moments": training_state.moments(policy)}
    (staging / STATE).write_text(json.dumps(state | {"optimizer": optimizer}, indent=1) + "\n", encoding="utf-8")
    files = [*rows, _row(staging / TABLE), _row(staging / STATE)]
    (staging / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8")
    publish(staging, target)


def _row(path: Path) -> dict:
    """The manifest's row of a file that this rank wrote, when it is on the disk: the first rank's fsync flushes no other node's cache."""
    sync(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _unwritable(staging: Path, error: Exception) -> RankError:
    return RankError(
        f"checkpoints in {staging.parent}: not writable: {' '.join(str(error).split())}; older checkpoints are as they were: "
        "mend it, then go on with --resume"
    )


def _raise_together(error: Exception | None, device: torch.device) -> None:
    """Raise ``error`` here, and leave the other ranks as well, which would otherwise wait for this one. Collective."""
    failed = any_rank(error is not None, device)
    if error is not None:
        raise error
    if failed:
        raise OtherRankError("another rank failed; its own message says why")
