"""Warn once about problems that a run survives."""

from __future__ import annotations

import contextlib
import sys

from dde_ds.text import printable, without_passwords

_said: set[str] = set()


def warn_once(message: str) -> None:
    """Print ``warning: message``, unless this process has printed it already: a disk that stays full would fill the
    log.
    """
    if message in _said:
        return
    _said.add(message)
    with contextlib.suppress(OSError):  # the log may be on the disk that is full
        print(f"warning: {without_passwords(printable(message))}", file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    """Return what an error says, in one line and without the name of its file."""
    if isinstance(error, KeyError):  # its text is the key alone
        return f"there is no {error}"
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
