"""Read files that anybody may have written: only regular files, no more bytes than a limit, and JSON within a limit of
depth.

All JSON from outside goes through :func:`parse_json` or :func:`read_json`. They refuse with a ``ValueError`` of one
line. The caller adds the file's name and what to do.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from dde_ds.text import half_surrogate

JSON_BYTES = 64 * 2**20
"""Default limit of a JSON file. An index of 1,000 pairs takes 40 kB."""
JSON_DEPTH = 64
"""Limit on the nesting of lists and objects. The project's own files need 6."""


def read_regular(path: str | Path, limit: int | None = None) -> bytes:
    """Return the bytes of a regular file. A pipe or a device is refused, since reading it might never end.

    Raises:
        OSError: the file cannot be opened or read.
        ValueError: the file is not regular, or larger than ``limit`` bytes.
    """
    with open_regular(path) as file:
        data = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(data) > limit:
        raise ValueError(f"larger than {limit:,} bytes")
    return data


def open_regular(path: str | Path):
    """Open a regular file for reading bytes.

    The call never waits: opening a pipe in the usual way would block until somebody writes to it.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is not regular.
    """
    # Check before opening too, because opening some devices already has an effect.
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError("not a regular file")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("not a regular file")
    return os.fdopen(handle, "rb")


def read_json(path: str | Path, limit: int = JSON_BYTES, unique_keys: bool = False) -> Any:
    """Return what a JSON file holds. Raises what :func:`read_regular` and :func:`parse_json` raise."""
    return parse_json(read_regular(path, limit), limit, unique_keys)


def parse_json(data: bytes | str, limit: int = JSON_BYTES, unique_keys: bool = False) -> Any:
    """Return what JSON text holds.

    Args:
        data: the text, or its bytes.
        limit: the longest text that is accepted.
        unique_keys: refuse an object with a key that occurs twice, of which the last would count. Use it for files that
            people write by hand.

    Raises:
        ValueError: the text is not JSON, is longer than ``limit``, is nested deeper than :data:`JSON_DEPTH`, or holds
            half a surrogate pair.
    """
    if len(data) > limit:
        raise ValueError(f"larger than {limit:,} bytes")
    try:
        value = json.loads(data, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise ValueError(f"nested deeper than {JSON_DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    _check(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, and refuse a key that occurs twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice} is there twice")
    return value


def _check(value: Any) -> None:
    """Refuse a value that is nested too deep or holds half a surrogate pair."""
    level = [value]
    for _ in range(JSON_DEPTH + 1):
        below = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and not item.isascii() and half_surrogate(item):
                raise ValueError(f"text holds half a surrogate pair: {item[:40]!r}")
        if not below:
            return
        level = below
    raise ValueError(f"nested deeper than {JSON_DEPTH} levels")
