"""Checkpoints that are whole or absent, and that any number of ranks and any ZeRO stage can resume.

    checkpoints/step-00000100/
      state-00000-000.safetensors   float32 weights and optimizer moments of whole parameters, NAME/weight, NAME/exp_avg, …; the
                                    first number is the rank that wrote the file; readers ignore it
      objective.safetensors         the correction table
      state.json                    step, position, and what must not change on resume
      manifest.json                 every file with its bytes and sha256

All ranks write a checkpoint into ``checkpoints/.staging``. Each file is fsynced by the rank that wrote it. The folder is
renamed when every rank is done.

The first rank alone reads a checkpoint. It reads only files that the manifest names, and uses only bytes that it has checked.
A checkpoint counts as damaged only if reading has proved the damage. A read that fails proves nothing, so nothing may be
deleted because of it.

Nothing is pickled: reading a checkpoint runs no code.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dde_ds.distributed.collectives import any_rank, first_does
from dde_ds.engine import state as training_state
from dde_ds.errors import OtherRankError, RankError, UserError
from dde_ds.files import discard, empty_trash, publish, save_tensors, sha256_of, sha256_of_open, sync
from dde_ds.objective.objective import Objective
from dde_ds.shape import COUNT, require_shape
from dde_ds.untrusted import JSON_BYTES, open_regular, parse_json
from dde_ds.warn import reason, warn_once

STATE, TABLE, MANIFEST = "state.json", "objective.safetensors", "manifest.json"
FORMAT = "dde_ds checkpoint 1"
FILES = {"files": [{"name": str, "bytes": COUNT, "sha256": str}]}
STATE_OF_A_RUN = {"step": COUNT, "optimizer": {"steps": COUNT, "moments": [str]}, "identity": {}, "config": {}}
# Bytes that a rank collects in memory before it writes a file.
PART_BYTES = 2 * 2**30
# A name with more text after the number is somebody's copy or mark, and no checkpoint of the run.
_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")
_WEIGHTS = re.compile(r"state-[0-9]{5,}-[0-9]{3,}\.safetensors")
# Files that are checked at the same time. One thread reads half a gigabyte a second if the processor has no SHA instructions.
_READERS = 8

T = TypeVar("T")


class DamagedError(UserError):
    """The error for a checkpoint that is proved to differ from what was written."""


class MisnamedError(UserError):
    """A checkpoint of another step than its folder's name says: a copy, or renamed. That is no damage."""


def save(
    folder: Path,
    policy: Any,
    objective: Objective,
    state: dict,
    keep: int,
    keep_every: int | None = None,
    damaged: Collection[Path] = (),
) -> tuple[Path, int]:
    """Write the checkpoint of ``state["step"]``, then delete checkpoints that need not be kept. Collective; ranks share
    ``folder``.

    Args:
        keep: number of the newest checkpoints to keep.
        keep_every: checkpoints at multiples of this step are kept as well.
        damaged: checkpoints that were proved damaged when the run resumed from an earlier one. A checkpoint of a later step is
            deleted only if it is listed here. Any other later checkpoint is not of this run and stays.

    Returns:
        The checkpoint's folder, and the size of its weight files in bytes.

    Raises:
        RankError: no room on the disk, a file that cannot be written, or a finished checkpoint of this step that another run
            has written. Older checkpoints stay as they are.
    """
    staging, target = folder / ".staging", folder / f"step-{state['step']:08d}"
    problem = None
    if dist.get_rank() == 0:
        problem = _make_room(staging, target, policy, damaged)
    _raise_together(problem, policy.device)
    try:
        rows, problem = _write_parts(staging, policy), None
    except (OSError, SafetensorError) as error:
        rows, problem = [], error
    _raise_together(problem and _unwritable(staging, problem), policy.device)
    rows_by_rank: list[list[dict]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(rows_by_rank, rows)
    if dist.get_rank() == 0:
        try:
            _finish(staging, target, [row for rank in rows_by_rank for row in rank], policy, objective, state)
            _delete_old(folder, state["step"], keep, keep_every, damaged)
        except (OSError, SafetensorError) as error:
            problem = error
    _raise_together(problem and _unwritable(staging, problem), policy.device)
    return target, sum(row["bytes"] for rank in rows_by_rank for row in rank)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first. :func:`damage` tells whether their files are still whole.

    Raises:
        UserError: the folder cannot be read. An unreadable folder does not count as empty.
    """
    try:
        paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(filter(_is_finished, paths), key=step_of)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"checkpoints in {folder}: could not be read: {reason(error)}; nothing was deleted: mend it, then try again"
        ) from None


def _is_finished(checkpoint: Path) -> bool:
    """Return whether a path is a folder with a manifest, or a link to a disk that is not mounted."""
    try:
        (checkpoint / MANIFEST).lstat()
    except NotADirectoryError:
        return False
    except FileNotFoundError:
        return checkpoint.is_symlink() and not checkpoint.exists()  # its disk is not mounted: reading it reports that
    return True


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))


def read_state(checkpoint: Path) -> dict:
    """Read ``state.json`` of a checkpoint: ``step``, ``optimizer``, and the ``identity`` and ``config`` of the run.

    Raises:
        DamagedError: the file is not what was written.
        MisnamedError: the checkpoint is of another step than the name of its folder says.
        UserError: the file could not be read.
    """
    try:
        found = parse_json(_contents(checkpoint, STATE))
        require_shape(found, {})
        state = {"identity": {}, "config": {}} | found
        require_shape(state, STATE_OF_A_RUN)
    except UserError:
        raise
    except ValueError as error:
        raise _damaged(checkpoint, f"{STATE}: {error}") from None
    if _NAME.fullmatch(checkpoint.name) and step_of(checkpoint) != state["step"]:
        step = state["step"]
        raise MisnamedError(
            f"checkpoint {checkpoint}: {STATE} is of step {step}: it was renamed or copied; it stays, and a run does not go on from it: "
            f"name it step-{step:08d} to have it back"
        )
    return state


def misnamed(checkpoint: Path) -> str | None:
    """One line about a checkpoint that lies under another step's name, otherwise None. Whatever else is wrong is for :func:`damage` to say."""
    try:
        read_state(checkpoint)
    except MisnamedError as error:
        return str(error)
    except UserError:
        pass
    return None


def damage(checkpoint: Path) -> str | None:
    """Return one line about what is wrong with a checkpoint, or None if it is whole. Reads all of its files.

    Raises:
        UserError: the checkpoint could not be read, or is of another version. Neither proves any damage.
    """
    try:
        read_state(checkpoint)
        read_table(checkpoint)
        WeightReader(checkpoint)
    except DamagedError as error:
        return str(error)
    return None


def newest_whole(checkpoints: list[Path], on_damage: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint whose files are what was written and whose folder names its own step, or None. Collective.

    Args:
        checkpoints: oldest first.
        on_damage: takes one line about each newer, damaged or renamed checkpoint, on the first rank.

    Raises:
        UserError: a checkpoint could not be read, so it may or may not be the newest whole one. Raised on all ranks.
    """
    for checkpoint in reversed(checkpoints):
        problem = first_does(lambda checkpoint=checkpoint: misnamed(checkpoint) or damage(checkpoint))
        if problem is None:
            return checkpoint
        if dist.get_rank() == 0:
            on_damage(problem)
    return None


def load(checkpoint: Path, policy: Any, objective: Objective) -> None:
    """Restore weights, optimizer state and correction table. Collective; only the first rank reads files.

    Raises:
        UserError: the checkpoint is damaged, cannot be read, or belongs to another model or optimizer. Raised on all ranks.
    """
    parameters = training_state.trained(policy)
    reader: WeightReader | None = None

    def read() -> tuple[dict, dict[str, Tensor]]:
        nonlocal reader
        reader = WeightReader(checkpoint)
        state = read_state(checkpoint)
        kinds = (training_state.WEIGHT, *state["optimizer"]["moments"])
        _check_fit(checkpoint, reader, {f"{name}/{kind}": value for name, value in parameters for kind in kinds})
        return state, read_table(checkpoint)

    state, table = first_does(read)
    _set_table(checkpoint, objective, table)
    kinds = state["optimizer"]["moments"]
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


def _check_fit(checkpoint: Path, reader: WeightReader, expected: dict[str, torch.nn.Parameter]) -> None:
    """Refuse a checkpoint whose tensors have other names or shapes than ``expected``."""
    if unexpected := sorted(expected.keys() ^ set(reader.names))[:3]:
        raise UserError(f"checkpoint {checkpoint}: is not of this model: {', '.join(unexpected)} is in one of them only")
    for name, parameter in expected.items():
        stored, shape = reader.shape(name), list(training_state.full_shape(parameter))
        if stored != shape:
            raise UserError(f"checkpoint {checkpoint}: is not of this model: {name} has shape {stored} there, {shape} here")


def load_table(checkpoint: Path, objective: Objective) -> None:
    """Restore the correction table alone. Not collective.

    Raises:
        UserError: the table is missing, damaged, or not readable.
    """
    _set_table(checkpoint, objective, read_table(checkpoint))


def _set_table(checkpoint: Path, objective: Objective, table: dict[str, Tensor]) -> None:
    try:
        objective.load_state_dict(table)
    except KeyError as error:
        raise _damaged(checkpoint, f"{TABLE}: {reason(error)}") from None


def read_table(checkpoint: Path) -> dict[str, Tensor]:
    """Read the correction table's state.

    Raises:
        UserError: it is missing, damaged, not readable, or of an earlier version.
    """
    try:
        table = safetensors.torch.load(_contents(checkpoint, TABLE))
    except SafetensorError as error:
        raise _damaged(checkpoint, f"{TABLE}: {reason(error)}") from None
    if {"average", "count"} <= table.keys():
        raise UserError(
            f"checkpoint {checkpoint}: its correction table is an earlier version's, one average a timestep, and cannot be continued; end "
            "the run with that version, or export it and start a new one from the export"
        )
    return table


class WeightReader:
    """Read tensors of a checkpoint by name, each when it is asked for. The constructor checks all files first.

    Raises:
        DamagedError: a file is not what was written, or two files hold the same tensor.
        UserError: a file could not be read.
    """

    def __init__(self, checkpoint: Path):
        self._files: dict[str, Any] = {}
        rows = [row for name, row in _manifest(checkpoint).items() if _WEIGHTS.fullmatch(name)]
        with ThreadPoolExecutor(_READERS) as pool:
            files = list(pool.map(lambda row: _open_weights(checkpoint, row), rows))
        for file in files:
            for name in file.keys():  # noqa: SIM118  not a dict
                if name in self._files:
                    raise _damaged(checkpoint, f"{name} is in two files")
                self._files[name] = file

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> list[int]:
        return self._files[name].get_slice(name).get_shape()

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def _open_weights(checkpoint: Path, row: dict) -> Any:
    """Open a weight file after reading all of it and finding every byte as it was written."""

    def check(file: BinaryIO) -> Any:
        same = os.fstat(file.fileno()).st_size == row["bytes"] and sha256_of_open(file) == row["sha256"]
        return safe_open(checkpoint / row["name"], framework="pt") if same else None

    try:
        file = _read(checkpoint, row["name"], check)
    except SafetensorError as error:
        raise _damaged(checkpoint, f"{row['name']}: {reason(error)}") from None
    if file is None:
        raise _damaged(checkpoint, f"{row['name']} is not what was written")
    return file


def _contents(checkpoint: Path, name: str) -> bytes:
    """Return the bytes of a small file, after checking them."""
    row = _manifest(checkpoint)[name]
    data = _read(checkpoint, name, lambda file: file.read() if os.fstat(file.fileno()).st_size == row["bytes"] else b"")
    if len(data) != row["bytes"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise _damaged(checkpoint, f"{name} is not what was written")
    return data


def _manifest(checkpoint: Path) -> dict[str, dict]:
    """Return the manifest's rows by file name. The names contain no folder, so that nothing outside the checkpoint is ever
    opened."""
    data = _read(checkpoint, MANIFEST, lambda file: file.read(JSON_BYTES + 1))
    try:
        manifest = parse_json(data)
        require_shape(manifest, {"format": str})
        form = manifest["format"]
        if form != FORMAT and re.fullmatch(r"dde_ds checkpoint [0-9]+", form):
            raise UserError(
                f"checkpoint {checkpoint}: {MANIFEST} says {form!r}, this version reads {FORMAT!r}: use the version that wrote it"
            )
        if form != FORMAT:
            raise _damaged(checkpoint, f"{MANIFEST} says {form!r}, expected {FORMAT!r}")
        require_shape(manifest, FILES)
    except UserError:
        raise
    except ValueError as error:
        raise _damaged(checkpoint, f"{MANIFEST}: {error}") from None
    rows = manifest["files"]
    names = [row["name"] for row in rows]
    if unexpected := [name for name in names if name not in (TABLE, STATE) and not _WEIGHTS.fullmatch(name)]:
        raise _damaged(checkpoint, f"{MANIFEST} names {unexpected[0]!r}, which is no file of a checkpoint")
    if len(set(names)) < len(names):
        raise _damaged(checkpoint, f"{MANIFEST} names a file twice")
    if missing := [name for name in (TABLE, STATE) if name not in names] or (len(names) < 3 and ["state-*.safetensors"]):
        raise _damaged(checkpoint, f"{MANIFEST} does not name {missing[0]}")
    return {row["name"]: row for row in rows}


def _read(checkpoint: Path, name: str, read: Callable[[BinaryIO], T]) -> T:
    """Return ``read(file)`` for one file of a checkpoint.

    Raises:
        DamagedError: the file is missing.
        UserError: the file could not be read. This proves no damage: the cause may pass, or another node may be able to read
            the file.
    """
    try:
        with open_regular(checkpoint / name) as file:
            return read(file)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and os.path.isdir(checkpoint):  # noqa: PTH112  Path.is_dir() may raise
            raise _damaged(checkpoint, f"{name} is missing") from None
        raise UserError(
            f"checkpoint {checkpoint}: {name} could not be read: {reason(error)}; nothing was deleted: mend it, then try again"
        ) from None


def _damaged(checkpoint: Path, why: str) -> DamagedError:
    return DamagedError(f"checkpoint {checkpoint}: damaged: {why}")


def _make_room(staging: Path, target: Path, policy: Any, damaged: Collection[Path]) -> RankError | None:
    """Make an empty staging folder and check that the disk has room, on the first rank. Return the error, if any, instead of
    raising it."""
    weights = sum(training_state.full_shape(parameter).numel() for _, parameter in training_state.trained(policy))
    need = 4 * weights * (1 + len(training_state.moments(policy)))
    try:
        if target not in damaged and _is_finished(target) and not _set_aside_misnamed(target):
            return RankError(
                f"checkpoint {target}: is there already, and not of this run: does another one write here? Move it away, or go on "
                "from it with --resume"
            )
        empty_trash(staging.parent)
        if os.path.lexists(staging):  # left by a save that was killed
            with contextlib.suppress(OSError):  # only its name must become free
                discard(staging)
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


def _set_aside_misnamed(target: Path) -> bool:
    """Give a checkpoint of another step a name that is no step's, where it lies under that of ``target``. Return whether it did."""
    if not misnamed(target):
        return False
    names = (target.with_name(f"{target.name}.renamed-{number}") for number in itertools.count(1))
    aside = next(path for path in names if not os.path.lexists(path))
    target.rename(aside)
    warn_once(f"checkpoint {target}: is of another step, and this run writes its own there: the other one is kept as {aside.name}")
    return True


def _write_parts(staging: Path, policy: Any) -> list[dict]:
    """Write this rank's share of the parameters, in files of about ``PART_BYTES``. Collective.

    Returns:
        Their rows of the manifest.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    rows: list[dict] = []
    buffer: dict[str, Tensor] = {}
    trouble: Exception | None = None

    def flush() -> None:
        nonlocal trouble
        if buffer and not trouble:
            path = staging / f"state-{rank:05d}-{len(rows):03d}.safetensors"
            try:
                save_tensors(buffer, path)
                rows.append(_row(path))
            except (OSError, SafetensorError) as error:
                # Raised only after the last parameter: the other ranks wait for this one in the next gathering.
                trouble = error
        buffer.clear()

    for number, (name, tensors) in enumerate(training_state.gather(policy)):
        if number % world == rank:
            buffer |= {f"{name}/{kind}": value.cpu().contiguous() for kind, value in tensors.items()}
            if sum(value.nbytes for value in buffer.values()) >= PART_BYTES:
                flush()
    flush()
    if trouble:
        raise trouble
    return rows


def _finish(staging: Path, target: Path, rows: list[dict], policy: Any, objective: Objective, state: dict) -> None:
    """Write the table, the state and the manifest, then publish the folder. On the first rank."""
    save_tensors(objective.state_dict(), staging / TABLE)
    optimizer = {"steps": training_state.optimizer_steps(policy), "moments": training_state.moments(policy)}
    (staging / STATE).write_text(json.dumps(state | {"optimizer": optimizer}, indent=1) + "\n", encoding="utf-8")
    files = [*rows, _row(staging / TABLE), _row(staging / STATE)]
    (staging / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8")
    publish(staging, target)


def _delete_old(folder: Path, step: int, keep: int, keep_every: int | None, damaged: Collection[Path]) -> None:
    """Delete checkpoints that need not be kept.

    A checkpoint that cannot be deleted costs room, but is no reason to end a run: it is a warning.
    """
    try:
        finished = [path for path in list_checkpoints(folder) if not misnamed(path)]  # these stay, and take nobody's place
    except UserError as error:
        warn_once(f"old checkpoints are not deleted: {error}")
        return
    later = [path for path in finished if step_of(path) > step]
    old = [path for path in finished if step_of(path) <= step][:-keep]
    # Delete damaged later checkpoints: every resume would take them for the newest ones and check them again.
    for path in [
        *(path for path in later if path in damaged),
        *(path for path in old if not keep_every or step_of(path) % keep_every),
    ]:
        try:
            discard(path)
        except OSError as error:
            warn_once(f"checkpoint {path} could not be deleted: {reason(error)}; delete it by hand where room is short")
    for path in later:
        if path not in damaged:
            warn_once(
                f"checkpoint {path} is later than what this run saves, and not of it: it stays, and --resume would go on from it"
            )


def _row(path: Path) -> dict:
    """Return the manifest's row of a file that this rank wrote, once the file is on the disk.

    Each rank must sync its own files: the first rank's fsync flushes no other node's cache.
    """
    sync(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _unwritable(staging: Path, error: Exception) -> RankError:
    return RankError(
        f"checkpoints in {staging.parent}: not writable: {' '.join(str(error).split())}; older checkpoints are as they were: "
        "mend it, then go on with --resume"
    )


def _raise_together(error: Exception | None, device: torch.device) -> None:
    """Raise ``error`` on this rank, and OtherRankError on the others, which would otherwise wait for this rank. Collective."""
    failed = any_rank(error is not None, device)
    if error is not None:
        raise error
    if failed:
        raise OtherRankError("another rank failed; its own message says why")
