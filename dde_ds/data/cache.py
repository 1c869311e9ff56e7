"""A bounded local cache of byte ranges, shared by any number of processes without a lock.

Keys are digests of what is cached, so that two data sets with equal file names never meet. An entry appears by rename, whole
or not at all; whoever reads it checks it again. The folder is split into buckets, each with its share of the limit: a writer
looks only at its own bucket and removes what was used longest ago. Losing a race costs one more fetch, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path

from dde_ds.errors import UserError
from dde_ds.untrusted import read_regular
from dde_ds.warn import reason

BUCKETS = 256


class Cache:
    """``limit``: bytes that the whole cache may hold."""

    def __init__(self, folder: str | Path, limit: int):
        self.folder, self.limit = Path(folder), limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {folder}: not writable: {reason(error).lower()}") from None

    def get(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            data = read_regular(path, self.limit // BUCKETS)
        except (OSError, ValueError):  # none, or nothing that we put there
            return None
        with contextlib.suppress(OSError):  # removed meanwhile, or not ours to touch
            os.utime(path)
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep ``data`` unless it alone is more than its bucket may hold. A full or failing disk only means that nothing is kept."""
        share = self.limit // BUCKETS
        if len(data) > share:
            return
        path = self._path(key)
        # A name that nobody can have put a link under, and that no process of another container with this one's number has too.
        staged = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            self._make_room(path.parent, share - len(data))
            handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError:
            return
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            staged.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                staged.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name[2:]

    @staticmethod
    def _make_room(bucket: Path, allowed: int) -> None:
        """Remove the entries used longest ago until ``allowed`` bytes remain; what a killed writer left goes like any other."""
        entries = []
        with os.scandir(bucket) as found:
            for entry in found:
                try:
                    state = entry.stat()
                except FileNotFoundError:  # another process was quicker
                    continue
                entries.append((state.st_mtime_ns, state.st_size, entry.path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= allowed:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
