"""Remember the digests of large files from one start to the next: SDXL's weights take a minute to read, and seldom
change.

The digests are kept in the user's cache folder, by the paths of the files, together with what the file system says of
each file. A file is read again if its size, inode, or time of modification or change differs. The cache may be lost,
damaged or not writable at any time: the files are then read.
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
# A file that was changed just now may change once more within the same tick of its clock, which nobody could notice.
SETTLED_SECONDS = 2.0


def remembered(what: str, files: Sequence[Path], compute: Callable[[], list[str]], count: int = 1) -> list[str]:
    """Return the digests of ``files``: remembered ones if the files have not changed since, otherwise those that
    ``compute`` returns.

    Args:
        what: says which digests of these files they are.
        files: the files that the digests depend on.
        compute: returns the digests, SHA-256 in hexadecimal each.
        count: number of digests.

    Raises:
        OSError: a file does not exist. ``compute`` may raise other exceptions.
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
        # Read the cache again, since another process may have written it meanwhile. If two write at the same time, one
        # loses its entry and will read its files again.
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
    except RuntimeError:  # the user has no home folder
        return None
    return folder / "dde_ds" / "digests.json" if folder.is_absolute() else None


def _read(cache: Path | None) -> dict:
    try:
        entries = read_json(cache, BYTES) if cache else {}
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _states(files: Sequence[Path]) -> list[list]:
    """Return the path, size, inode and both times of each file."""
    return [
        [str(file.resolve()), (state := file.stat()).st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns] for file in files
    ]
