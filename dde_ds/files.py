"""Files that are whole or absent, and their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
from pathlib import Path

TRASH = ".deleted"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """``path`` holds either all of ``data`` or what it held before, whenever the machine stops."""
    staged = staged_path(path)
    with staged.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    put_in_place(staged, path)


def staged_path(path: Path) -> Path:
    """Where this process writes a file before it gets its name: two that write the same must not write into each other's."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def put_in_place(staged: Path, path: Path) -> None:
    """Rename a written file, and make the rename survive a loss of power where the file system can."""
    staged.replace(path)
    with contextlib.suppress(OSError):
        sync(path.parent)


def publish(staging: Path, target: Path) -> None:
    """Give a folder its name when every file in it has reached the disk; a folder of that name is replaced."""
    for path in [*staging.rglob("*"), staging]:
        sync(path)
    if target.exists():
        discard(target)
    staging.rename(target)
    sync(target.parent)


def discard(folder: Path) -> None:
    """Delete a folder. It loses its name first: a half-deleted one must not be taken for whole, nor stay for ever."""
    trash = folder.with_name(TRASH)
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash)


def sync(path: Path) -> None:
    """Return when a file or folder has reached the disk. Of what another node wrote, its own call alone can say so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
