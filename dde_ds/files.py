"""Write files and folders that are whole or absent, and compute their checksums."""

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
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return sha256_of_open(file)


def sha256_of_open(file: BinaryIO) -> str:
    """Return the SHA-256 of the rest of an open file, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either all of it or what it held before, even if the machine stops at any
    moment.

    Raises:
        OSError: the file cannot be written.
    """
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
    """Return the path at which this process writes a file before renaming it.

    The path differs between processes, so that two that write the same file do not write into each other's.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, with the mode of any new file.

    The write is not atomic: ``path`` must lie in a folder that is published later, or be a :func:`staged_path`.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    import safetensors.torch  # importing it imports PyTorch

    safetensors.torch.save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    follow_umask(path)


def follow_umask(*paths: Path) -> None:
    """Give files the mode of any new file in their folder. safetensors makes its files readable only for their owner."""
    for path in paths:
        # os.umask() is not used: to read the umask it must change it, for all threads.
        probe = staged_path(path)
        probe.touch()
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
        probe.unlink()


def put_in_place(staged: Path, path: Path) -> None:
    """Rename a written file. Where the file system can, make the rename survive a loss of power."""
    staged.replace(path)
    with contextlib.suppress(OSError):
        sync(path.parent)


def publish(staging: Path, target: Path) -> None:
    """Give a folder its name once every file in it has reached the disk. A folder of that name is replaced."""
    for path in [*staging.rglob("*"), staging]:
        sync(path)
    replaced = _set_aside(target) if os.path.lexists(target) else None
    staging.rename(target)
    sync(target.parent)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a folder. If it is a link, delete only the link.

    The folder loses its name first: a half-deleted folder must neither be taken for a whole one nor stay for ever.

    Raises:
        OSError: the folder could not be deleted. If it has lost its name already, a later call deletes it. This happens
            on NFS, which keeps files that are still open.
    """
    renamed = _set_aside(folder)
    if renamed:
        shutil.rmtree(renamed)


def empty_trash(folder: Path) -> None:
    """Delete discarded folders that a kill or an error left in ``folder``, where that is possible."""
    for path in folder.glob(f"{TRASH}*"):
        if _TRASH.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _set_aside(folder: Path) -> Path | None:
    """Rename a folder to an unused name for deleted folders, and return its new path.

    Delete a link instead, and return None.
    """
    if folder.is_symlink():
        folder.unlink()
        return None
    empty_trash(folder.parent)
    names = (folder.with_name(f"{TRASH}-{number}" if number else TRASH) for number in itertools.count())
    return folder.rename(next(path for path in names if not os.path.lexists(path)))


def sync(path: Path) -> None:
    """Wait until a file or folder has reached the disk.

    Only the node that wrote a file can wait for it in this way.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
