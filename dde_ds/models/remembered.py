"""Digests of large files, remembered from one start to the next: SDXL's weights take a minute to read, and seldom change.

They are kept in the user's cache folder, under the files' paths with what the file system says of each. A file whose size, inode or time
of change is another is read again. The cache may be lost, damaged or not writable at any time: then the files are read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dde_ds.files import write_atomically
from dde_ds.untrusted import read_json

DIGEST = re.compile("[0-9a-f]{64}")
ENTRIES = 500
BYTES = 8 * 2**20
# A file changed just now may change once more within one tick of its clock, which nobody could see.
SETTLED_SECONDS = 2.0


def remembered(what: str, files: Sequence[Path], compute: Callable[[], list[str]], count: int = 1) -> list[str]:
    """Return the digests of ``files`` that ``compute`` makes, or made when they were what they are now.

    Args:
        what: says which digests of them these are.
        count: how many; SHA-256 each, in hexadecimal.

    Raises:
        OSError: a file is not there. ``compute`` may raise what it likes.
    """
    before = _states(files)
    key = f"{what} {files[0].resolve()}"
    cache = _cache()
    known = _read(cache).get(key)
    if isinstance(known, dict) and known.get("files") == before and _are_digests(known.get("digests"), count):
        return known["digests"]
    digests = compute()
    latest = max(max(mtime, ctime) for *_, mtime, ctime in before) / 1e9
    if cache and _states(files) == before and time.time() - latest > SETTLED_SECONDS:
        # Read again: another process may have written meanwhile. What two write at once, one of them loses, and reads its files again.
        kept = {name: value for name, value in _read(cache).items() if name != key}
        kept = dict(list(kept.items())[-ENTRIES + 1 :]) | {key: {"files": before, "digests": digests}}
        with contextlib.suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, json.dumps(kept).encode())
    return digests


def _are_digests(found: Any, count: int) -> bool:
    return isinstance(found, list) and len(found) == count and all(isinstance(one, str) and DIGEST.fullmatch(one) for one in found)


def _cache() -> Path | None:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home
        return None
    return folder / "dde_ds" / "digests.json" if folder.is_absolute() else None


def _read(cache: Path | None) -> dict:
    try:
        found = read_json(cache, BYTES) if cache else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _states(files: Sequence[Path]) -> list[list]:
    return [
        [str(file.resolve()), (state := file.stat()).st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns] for file in files
    ]
