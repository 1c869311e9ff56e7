"""Files that are whole or absent, and their checksums."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """``path`` holds either all of ``data`` or what it held before, whenever the machine stops."""
    staged = path.with_name(f".{path.name}.partial")
    with staged.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def publish(staging: Path, target: Path) -> None:
    """Give a folder its name when every file in it has reached the disk; a folder of that name is replaced."""
    for path in [*staging.rglob("*"), staging]:
        _sync(path)
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
