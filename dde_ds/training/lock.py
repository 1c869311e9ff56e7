"""A lock file: one run at a time in a folder, on whatever machine, and none that a crash leaves closed.

The file says which process holds it. The same machine can ask the system whether that process still lives. From elsewhere, another
host or another container, the file's age tells: its holder renews it every few seconds.
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
"""Seconds. A lock that nobody renewed for so long belongs to a process that is gone; network file systems may show a change late."""


class Lock:
    """A lock that this process holds."""

    def __init__(self, path: Path, content: bytes):
        self.path, self.content, self._taken = path, content, False
        self._released = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)
        self._renewing.start()

    def check(self) -> None:
        """Look at what the last renewal found; no file is read.

        Raises:
            RankError: another process holds the lock now, since this one had stood still for long.
        """
        if self._taken:
            raise RankError(f"{self.path}: another run has taken this folder over while this one stood still; this one ends here")

    def release(self) -> None:
        self._released.set()
        self._renewing.join(RENEWED_EVERY)  # or it would make the file again
        with contextlib.suppress(OSError, ValueError):
            if read_regular(self.path) == self.content:
                self.path.unlink()

    def _renew(self) -> None:
        while not self._released.wait(RENEWED_EVERY):
            with contextlib.suppress(OSError, ValueError):  # a file system that is away for a while: the next try may do it
                if not _create(self.path, self.content):  # which somebody may have deleted
                    self._taken = read_regular(self.path) != self.content
                if self._taken:
                    return
                os.utime(self.path)


@contextlib.contextmanager
def lock(path: Path, what: str, say: Callable[[str], None]) -> Iterator[Lock]:
    """Hold the lock file ``path`` within the block.

    Args:
        what: is locked, for messages, such as ``output runs/first``.
        say: takes a line for the user where it takes a while to find out whether the holder lives.

    Raises:
        UserError: another process holds it. The line says which, and the way out.
        OSError: the folder cannot be written.
    """
    held = Lock(path, _acquire(path, what, say))
    try:
        yield held
    finally:
        held.release()


class _Seen(NamedTuple):
    content: bytes
    changed: float


def _acquire(path: Path, what: str, say: Callable[[str], None]) -> bytes:
    content = json.dumps(_myself()).encode()
    while not _create(path, content):
        seen = _look(path)
        if seen is None:  # released meanwhile
            continue
        _require_stale(path, seen, what, say)
        # Several may find it stale. A second lock, named after its content, lets one of them replace it, and none replace the next one.
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
    """Return whether the file was not there, and is now: of several that try at once it is True for one."""
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
    """Return what the file holds and when it changed, by the clock of its file system. None: it is gone."""
    try:
        # Opened each time: a network file system then asks its server, and does not answer from what it remembers.
        content = read_regular(path, 4096)
        return _Seen(content, path.stat().st_mtime)
    except FileNotFoundError:
        return None
    except ValueError:
        return _Seen(b"", path.stat().st_mtime)


def _require_stale(path: Path, seen: _Seen, what: str, say: Callable[[str], None]) -> None:
    """Return when the holder of a lock is found to be gone; a lock that cannot be read is judged by its age.

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
    # No two machines' clocks are compared: the age counts from the time of a file that is written there now.
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
    """Return what a lock file says, every field there and of its type."""
    kinds = {"host": str, "pid": int, "started": str, "ticks": str, "machine": str, "processes": str}
    try:
        found = parse_json(content)
    except ValueError:
        found = None
    found = found if isinstance(found, dict) else {}
    return {
        name: found[name] if isinstance(found.get(name), kind) else ("unknown" if kind is str else 0)
        for name, kind in kinds.items()
    }


def _here() -> tuple[str, str]:
    """Return the machine since its last start, and the name space in which a process id means something: each container has its own."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return machine, str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # no Linux: ages alone tell
        return uuid.uuid4().hex, ""


def _started(process: int) -> str | None:
    """Return when a process of this machine started, in clock ticks since the machine did. Empty: there is none. None: it may not be
    seen from here."""
    try:
        stat = Path("/proc", str(process), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        try:
            os.kill(process, 0)
        except PermissionError:  # another user's, on a system that hides those
            return None
        except (OSError, OverflowError):
            pass
        return ""
    # Fields behind the name, which stands in brackets and may hold anything: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    state, *rest = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]


def _now(path: Path) -> float:
    probe = path.with_name(f"{path.name}.{os.getpid()}.{uuid.uuid4().hex}")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()
