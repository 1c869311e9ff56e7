"""Files that are whole or absent, and their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

TRASH = ".deleted"
_TRASH = re.compile(rf"{re.escape(TRASH)}(-[0-9]+)?")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return sha256_of_open(file)


def sha256_of_open(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """``path`` holds either all of ``data`` or what it held before, whenever the machine stops."""
    staged = staged_path(path)
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(staged, path)
    except OSError:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise


def staged_path(path: Path) -> Path:
    """Where this process writes a file before it gets its name: two that write the same must not write into each other's."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, with the mode of any new file. Not atomic: ``path`` lies in a folder that is published later,
    or is a :func:`staged_path`.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    import safetensors.torch  # brings PyTorch

    safetensors.torch.save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    follow_umask(path)


def follow_umask(*paths: Path) -> None:
    """Give files the mode of any new file in their folder: safetensors makes its files readable for their owner alone."""
    for path in paths:
        # Not os.umask(): it changes the umask to read it, for all threads.
        probe = staged_path(path)
        probe.touch()
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
        probe.unlink()


def put_in_place(staged: Path, path: Path) -> None:
    """Rename a written file, and make the rename survive a loss of power where the file system can."""
    staged.replace(path)
    with contextlib.suppress(OSError):
        sync(path.parent)


def publish(staging: Path, target: Path) -> None:
    """Give a folder its name when every file in it has reached the disk; a folder of that name is replaced."""
    for path in [*staging.rglob("*"), staging]:
        sync(path)
    replaced = _set_aside(target) if os.path.lexists(target) else None
    staging.rename(target)
    sync(target.parent)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a folder; where it is a link, the link alone.

    It loses its name first: a half-deleted one must not be taken for whole, nor stay for ever.

    Raises:
        OSError: it could not be deleted. What has lost its name is deleted by a later call: NFS keeps files that are still open.
    """
    left = _set_aside(folder)
    if left:
        shutil.rmtree(left)


def empty_trash(folder: Path) -> None:
    """Delete what a kill or an error left in ``folder`` of discarded folders, where that is possible."""
    for path in folder.glob(f"{TRASH}*"):
        if _TRASH.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _set_aside(folder: Path) -> Path | None:
    """Take a folder's name away, and return the one that it has then. None for a link, which is deleted."""
    if folder.is_symlink():
        folder.unlink()
        return None
    empty_trash(folder.parent)
    names = (folder.with_name(f"{TRASH}-{number}" if number else TRASH) for number in itertools.count())
    return folder.rename(next(path for path in names if not os.path.lexists(path)))


def sync(path: Path) -> None:
    """Return when a file or folder has reached the disk. Of what another node wrote, its own call alone can say so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
