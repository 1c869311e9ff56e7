"""Files of JSON lines that a run writes beside its training: ``metrics.jsonl``, ``correction.jsonl``, ``credit.jsonl``,
``skipped.jsonl``.

They are advice, not state. A line that cannot be read is left out, a row that cannot be written waits, and the run
continues.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dde_ds.files import write_atomically
from dde_ds.untrusted import parse_json, read_regular
from dde_ds.warn import reason, warn_once


class RowFile:
    """A file of JSON lines, one line a step.

    Args:
        path: the file.
        resume_step: rows of later steps are dropped, because these steps will be run again.
    """

    def __init__(self, path: Path, resume_step: int):
        self._path, self._resume_step = path, resume_step
        self._file: Any = None
        self._waiting = b""
        self._write_waiting()

    def write(self, row: dict) -> None:
        """Append a row. If that fails, the next call tries again."""
        self._waiting += _line(row)
        self._write_waiting()

    def _write_waiting(self) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except (OSError, ValueError) as error:
            warn_once(f"{self._path} could not be written: {reason(error)}; the run goes on, and its rows wait in memory")

    def _open(self) -> Any:
        kept = [row for row in _read(self._path, is_row) if row["step"] <= self._resume_step]
        write_atomically(self._path, b"".join(map(_line, kept)))
        return self._path.open("ab", buffering=0)  # a buffer would keep rows that a full disk refused, and lose parts of them


def read_rows(path: Path, is_whole: Callable[[Any], bool] | None = None) -> list[dict]:
    """Return the rows of such a file. A file that cannot be read counts as empty, with a warning.

    Damaged lines are left out, and one warning counts them. A last line that a kill cut short is not counted.

    Args:
        path: the file.
        is_whole: returns whether a row belongs to this kind of file. By default any row with a ``step`` does.
    """
    try:
        return _read(path, is_whole or is_row)
    except (OSError, ValueError) as error:
        warn_once(f"{path} could not be read: {reason(error)}; it is taken for empty")
        return []


def is_row(row: Any) -> bool:
    """Return whether a value is a row: an object with a ``step``, a whole number from 0 to 2^53 - 1."""
    return isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53


def is_metrics(row: Any) -> bool:
    """Return whether a value is a row of ``metrics.jsonl``, which holds only numbers."""
    return is_row(row) and all(map(_is_number, row.values()))


def is_correction(row: Any) -> bool:
    """Return whether a value is a row of ``correction.jsonl``, which holds as many corrections as timesteps."""
    return is_row(row) and _are_numbers(row.get("timesteps"), row.get("correction"))


def is_credit(row: Any) -> bool:
    """Return whether a value is a row of ``credit.jsonl``: a sum and a number of pairs for each of some ranges of the timesteps, which
    divide into tenths."""
    return is_row(row) and _are_numbers(row.get("credit"), row.get("pairs")) and len(row["pairs"]) % 10 == 0 < len(row["pairs"])


def _are_numbers(*lists: Any) -> bool:
    """Return whether these are lists of numbers, of one length."""
    return all(isinstance(values, list) and len(values) == len(lists[0]) and all(map(_is_number, values)) for values in lists)


def last_numbers(rows: list[dict]) -> dict:
    """Return all numbers of the last step.

    Its rows are merged: an interrupted evaluation on held-out pairs writes its results as a row of their own.
    """
    return {key: value for row in rows if row["step"] == rows[-1]["step"] for key, value in row.items()}


def _read(path: Path, is_whole: Callable[[Any], bool]) -> list[dict]:
    """Read rows as :func:`read_rows` does, but raise an error if the file cannot be read: a caller that rewrites the
    file must not lose it.
    """
    try:
        lines = read_regular(path).split(b"\n")
    except FileNotFoundError:
        return []
    rows = [_parsed(line, is_whole) for line in lines]
    cut_short = rows[-1] is None  # or empty, after the end of the last line
    if damaged := rows.count(None) - cut_short:
        warn_once(f"{path}: {damaged} damaged {'line is' if damaged == 1 else 'lines are'} left out")
    return [row for row in rows if row is not None]


def _parsed(line: bytes, is_whole: Callable[[Any], bool]) -> dict | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if is_whole(row) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def _line(row: dict) -> bytes:
    return (json.dumps(row) + "\n").encode()
