"""A lock file: it allows one run at a time in a folder, on whatever machine, and a crash does not leave the folder locked.

The file says which process holds the lock. On the same machine, the system tells whether that process still lives. On another
host or in another container, the file's age tells, because the holder renews the file every few seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dde_ds.errors import RankError, UserError
from dde_ds.untrusted import parse_json, read_regular

RENEWED_EVERY, STALE_AFTER = 10.0, 90.0
"""Seconds. A lock that nobody has renewed for ``STALE_AFTER`` belongs to a process that is gone. The time is long because network
file systems may show a change late."""


class Lock:
    """Hold a lock for this process. A thread renews its file."""

    def __init__(self, path: Path, content: bytes):
        self.path, self.content, self._taken = path, content, False
        self._released = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)
        self._renewing.start()

    def check(self) -> None:
        """Check what the last renewal found. No file is read.

        Raises:
            RankError: another process holds the lock now, since this process had stood still for long.
        """
        if self._taken:
            raise RankError(f"{self.path}: another run has taken this folder over while this one stood still; this one ends here")

    def release(self) -> None:
        """Stop renewing the file. Delete it if it is still this process's."""
        self._released.set()
        self._renewing.join(RENEWED_EVERY)  # otherwise the thread might make the file again
        with contextlib.suppress(OSError, ValueError):
            if read_regular(self.path) == self.content:
                self.path.unlink()

    def _renew(self) -> None:
        while not self._released.wait(RENEWED_EVERY):
            with contextlib.suppress(OSError, ValueError):  # the file system may be away; the next try may succeed
                if not _create(self.path, self.content):  # somebody may have deleted it
                    self._taken = read_regular(self.path) != self.content
                if self._taken:
                    return
                os.utime(self.path)


@contextlib.contextmanager
def lock(path: Path, what: str, say: Callable[[str], None]) -> Iterator[Lock]:
    """Hold the lock file ``path`` within the block.

    Args:
        what: the thing that is locked, for messages, such as ``output runs/first``.
        say: takes a line for the user if it takes a while to find out whether the holder lives.

    Raises:
        UserError: another process holds the lock. The message says which process, and the way out.
        OSError: the folder cannot be written.
    """
    acquired = Lock(path, _acquire(path, what, say))
    try:
        yield acquired
    finally:
        acquired.release()


class _Seen(NamedTuple):
    content: bytes
    changed: float


def _acquire(path: Path, what: str, say: Callable[[str], None]) -> bytes:
    """Make the lock file, or replace it if its holder is gone. Return its content.

    Raises:
        UserError: the holder lives.
    """
    content = json.dumps(_myself()).encode()
    while not _create(path, content):
        seen = _look(path)
        if seen is None:  # released meanwhile
            continue
        _require_stale(path, seen, what, say)
        # Several processes may find the lock stale. A second lock, named after the stale content, lets only one of them replace it.
        # The new lock has other content, so the others cannot replace it.
        successor = path.with_name(f"{path.name}.{hashlib.sha256(seen.content).hexdigest()[:16]}")
        _acquire(successor, what, say)
        try:
            if _look(path) == seen:
                staged = path.with_name(f"{path.name}.{os.getpid()}.{uuid.uuid4().hex}")
                staged.write_bytes(content)
                staged.replace(path)
                return content
        finally:
            successor.unlink(missing_ok=True)
    return content


def _create(path: Path, content: bytes) -> bool:
    """Make the file and return True, or return False if it exists. Of several processes that try at once, one makes it."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(handle, content)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(handle)
    return True


def _look(path: Path) -> _Seen | None:
    """Return the file's content and when it changed, by the clock of its file system. Return None if the file is gone."""
    try:
        # The file is opened each time. A network file system then asks its server, instead of answering from its cache.
        content = read_regular(path, 4096)
        return _Seen(content, path.stat().st_mtime)
    except FileNotFoundError:
        return None
    except ValueError:
        return _Seen(b"", path.stat().st_mtime)


def _require_stale(path: Path, seen: _Seen, what: str, say: Callable[[str], None]) -> None:
    """Return when the holder of a lock is found to be gone. A lock that cannot be read is judged by its age.

    Raises:
        UserError: the holder lives.
    """
    holder = _holder(seen.content)
    refusal = UserError(
        f"{what}: a run is going on there, started {holder['started']} by process {holder['pid']} on {holder['host']}; stop it by a file "
        f"named STOP there, or choose another folder"
    )
    if (holder["machine"], holder["processes"]) == _here() and (ticks := _started(holder["pid"])) is not None:
        if ticks == holder["ticks"]:
            raise refusal
        return
    # Two machines' clocks must not be compared. So the current time is taken from a file that is written there now.
    age = _now(path) - seen.changed
    if age < STALE_AFTER:
        say(
            f"{what}: locked by process {holder['pid']} on {holder['host']}; looking for up to {STALE_AFTER - age:.0f} s whether it lives"
        )
    deadline = time.monotonic() + STALE_AFTER - age
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 2.0))
        now = _look(path)
        if now is None:
            return
        if now != seen:
            raise refusal


def _myself() -> dict:
    """Return what the lock file says of this process."""
    machine, processes = _here()
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "ticks": _started(os.getpid()) or "",
        "machine": machine,
        "processes": processes,
        "token": uuid.uuid4().hex,
    }


def _holder(content: bytes) -> dict:
    """Return what a lock file says, with every field and each of its type. Unusable fields become ``unknown`` or 0."""
    kinds = {"host": str, "pid": int, "started": str, "ticks": str, "machine": str, "processes": str}
    try:
        fields = parse_json(content)
    except ValueError:
        fields = None
    fields = fields if isinstance(fields, dict) else {}
    return {
        name: fields[name] if isinstance(fields.get(name), kind) else ("unknown" if kind is str else 0)
        for name, kind in kinds.items()
    }


def _here() -> tuple[str, str]:
    """Return an identifier of the machine since its last start, and the name space in which its process ids are valid.

    Each container has its own name space of process ids.
    """
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return machine, str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux: only ages tell
        return uuid.uuid4().hex, ""


def _started(process: int) -> str | None:
    """Return when a process of this machine started, in clock ticks since the machine did.

    Return an empty text if there is no such process, and None if it cannot be seen from here.
    """
    try:
        stat = Path("/proc", str(process), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        try:
            os.kill(process, 0)
        except PermissionError:  # another user's process, on a system that hides those
            return None
        except (OSError, OverflowError):
            pass
        return ""
    # Fields after the name. The name is in brackets and may hold any character:
    # https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    state, *rest = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]


def _now(path: Path) -> float:
    """Return the current time by the clock of the file system that ``path`` is on."""
    probe = path.with_name(f"{path.name}.{os.getpid()}.{uuid.uuid4().hex}")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()
