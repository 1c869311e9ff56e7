"""Preference pairs of one's own: a ``pairs.jsonl`` beside image files.

    {"winner": "images/0001_a.png", "loser": "images/0001_b.png", "caption": "a lighthouse at dusk"}

Paths are relative to the file and stay below its folder. A line that is no such record is an error, not a lost pair; an image
that is missing is counted, as in Pick-a-Pic.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dde_ds.data.pairs import PairRow, Survey, SurveyBuilder
from dde_ds.errors import UserError

KEYS = ("winner", "loser", "caption")


class FolderPairs:
    """Pairs of a ``pairs.jsonl``.

    Raises:
        UserError: no such file, or a line that is no record of two paths and a caption.
    """

    def __init__(self, path: Path):
        self.path, self.root = path, path.parent.resolve()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"--input {path}: not readable: {error.strerror.lower()}") from None
        self.pairs = [self._parse(number, line) for number, line in enumerate(data.splitlines()) if line.strip()]
        self.identity = [{"name": path.name, "rows": len(self.pairs), "sha256": hashlib.sha256(data).hexdigest()}]

    def name(self, row: int) -> str:
        return f"{self.path.name}:{row}"

    def survey(self) -> Survey:
        found = SurveyBuilder()
        for _, _, caption in self.pairs:
            found.add(caption, 1.0)
        return found.finish()

    def read(self, rows: np.ndarray) -> Iterator[PairRow]:
        for row in rows.tolist():
            winner, loser, caption = self.pairs[row]
            names = {"winner": winner, "loser": loser}
            yield PairRow(row, self.name(row), caption, self._image(winner), self._image(loser), names)

    def _image(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except OSError:
            return None

    def _parse(self, number: int, line: bytes) -> tuple[str, str, str]:
        where = f"--input {self.path}, line {number + 1}"
        try:
            record = json.loads(line)
            values = tuple(record[key] for key in KEYS)
            for value in values:
                value.encode()  # text, and such as can be written again
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{where}: expected {{"winner": path, "loser": path, "caption": text}}, found {line[:80]!r}') from None
        for name in values[:2]:
            if "\0" in name or not (self.root / name).resolve().is_relative_to(self.root):
                raise UserError(f"{where}: {name!r} lies outside of the folder of {self.path.name}")
        return values
