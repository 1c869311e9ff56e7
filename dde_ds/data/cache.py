"""A bounded local cache of byte ranges, shared by any number of processes without a lock.

A key contains the digest of the file that a range belongs to, so two data sets with equal file names never share an
entry. An entry appears by a rename, whole or not at all, and every reader checks its bytes again.

The folder is split into buckets, and each bucket has an equal share of the limit. A writer looks only at the bucket of
its entry, and removes the entries there that were used longest ago. A process that loses a race only fetches a range
once more.
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
    """A cache in ``folder``, shared by all processes that open it.

    Args:
        folder: made if it does not exist.
        limit: bytes that the whole cache may hold.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, limit: int):
        self.folder, self.limit = Path(folder), limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {folder}: not writable: {reason(error).lower()}") from None

    def get(self, key: str) -> bytes | None:
        """Return the data kept under ``key``, or None if there is none. The caller must check the data."""
        path = self._path(key)
        try:
            data = read_regular(path, self.limit // BUCKETS)
        except (OSError, ValueError):  # missing, or not a file that this class wrote
            return None
        with contextlib.suppress(OSError):  # removed meanwhile, or owned by somebody else
            os.utime(path)
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep ``data``, unless it is larger than the share of its bucket.

        If the disk is full or fails, nothing is kept and no error is raised.
        """
        share = self.limit // BUCKETS
        if len(data) > share:
            return
        path = self._path(key)
        # The name is random: nobody can have placed a link there, and no process in another container, which may have
        # the same process number, uses it too.
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
        """Remove the entries that were used longest ago until ``allowed`` bytes remain.

        Files that a killed writer left count as entries.
        """
        entries = []
        with os.scandir(bucket) as listing:
            for entry in listing:
                try:
                    state = entry.stat()
                except FileNotFoundError:  # another process has removed it
                    continue
                entries.append((state.st_mtime_ns, state.st_size, entry.path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= allowed:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
