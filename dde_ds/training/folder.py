"""The run folder: tell what it holds before a run, and let one run at a time write in it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from dde_ds.distributed.collectives import first_does
from dde_ds.engine import checkpoint
from dde_ds.errors import UserError
from dde_ds.training.lock import Lock, lock
from dde_ds.untrusted import read_regular
from dde_ds.warn import reason

LOCK = "run.lock"
# Files that may lie in a folder before its first run: our own traces of a start, those of a mounted disk, a launcher's log.
NO_CONTENTS = re.compile(rf"STOP|heartbeat|{LOCK}.*|lost\+found|\.nfs.*|\.snapshot|\.config\.yaml\..*|.*\.(log|out|err)")
# Keys that every config.yaml of a run has.
KEYS = {"output", "steps", "model", "data", "batch", "optimizer", "objective"}


def holds(folder: Path) -> str:
    """Return what a folder holds: ``nothing``, ``run``, ``done run`` or ``other files``.

    Raises:
        UserError: the path is no folder, or cannot be read.
    """
    try:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise UserError(f"output {folder}: not a folder that can be read: {reason(error).lower()}") from None
    names = {name for name in names if not NO_CONTENTS.fullmatch(name)}
    if not names:
        return "nothing"
    if checkpoint.list_checkpoints(folder / "checkpoints") or _has_keys(folder / "config.yaml"):
        return "done run" if "DONE" in names else "run"
    return (
        "run" if names <= {"metrics.jsonl", "correction.jsonl", "credit.jsonl", "skipped.jsonl", "checkpoints"} else "other files"
    )


def require_usable(folder: Path, resume: str | None) -> None:
    """Refuse a folder that a run would overwrite.

    Args:
        resume: None, ``required`` or ``auto``, as in :func:`dde_ds.training.loop.train`.

    Raises:
        UserError: the folder holds other files than a run's, a run although ``resume`` is None, or a finished run without a
            checkpoint.
    """
    contents = holds(folder)
    if contents == "other files":
        raise UserError(f"output {folder}: is not empty and holds no run; choose another folder")
    if contents == "nothing":
        return
    checkpoints = checkpoint.list_checkpoints(folder / "checkpoints")
    if contents == "done run" and not checkpoints:
        raise UserError(f"output {folder}: holds a finished run without a checkpoint to go on from; choose another folder")
    if resume is None and checkpoints:
        raise UserError(f"output {folder}: holds a run already; go on with --resume, or choose another folder")
    if resume is None:
        raise UserError(
            f"output {folder}: holds a run already, without a checkpoint yet; start it anew with --resume auto, or choose another folder"
        )


@contextlib.contextmanager
def claimed(folder: Path, resume: str | None, say: Callable[[str], None]) -> Iterator[Lock | None]:
    """Keep other runs out of the run folder within the block. Yield the lock on the first rank, and None on the others.
    Collective.

    If the folder is made here and is still empty at the end, it is removed again.

    Args:
        resume: None, ``required`` or ``auto``, as in :func:`dde_ds.training.loop.train`.
        say: takes one line for the user.

    Raises:
        UserError: as :func:`require_usable`; or the folder cannot be written; or another run is writing there.
    """
    with contextlib.ExitStack() as cleanup:
        locks: list[Lock] = []

        def claim() -> None:
            require_usable(folder, "auto")  # before anything is written there
            try:
                created = [path for path in (folder, *folder.parents) if not path.exists()]
                folder.mkdir(parents=True, exist_ok=True)
                cleanup.callback(_remove_empty, created)
                locks.append(cleanup.enter_context(lock(folder / LOCK, f"output {folder}", say)))
            except OSError as error:
                raise UserError(f"output {folder}: not writable: {reason(error).lower()}") from None
            require_usable(folder, resume)

        first_does(claim)
        yield locks[0] if locks else None


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders in this order, up to the first that is not empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _has_keys(config: Path) -> bool:
    """Return whether a file is a run's ``config.yaml``, of any version."""
    try:
        text = read_regular(config, 2**20).decode()
    except (OSError, ValueError):
        return False
    return set(re.findall(r"^(\w+):", text, re.MULTILINE)) >= KEYS
