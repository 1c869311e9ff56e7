"""Read your own preference pairs: a ``pairs.jsonl`` beside image files.

    {"winner": "images/0001_a.png", "loser": "images/0001_b.png", "caption": "a lighthouse at dusk"}

Paths are relative to the file's folder, or to a root that you choose, and must stay below it. ``"tie": true`` marks a
pair without a decision. A ``"label"`` may say the same, as in Pick-a-Pic.

Pairs with a null image, a null caption, a tie or a missing image are counted. A line that is not such a record is an
error: it is not counted as a lost pair.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dde_ds.data.pairs import DECIDED, PairRow, Survey, SurveyBuilder, decide, label_of
from dde_ds.errors import UserError
from dde_ds.text import encodable
from dde_ds.untrusted import parse_json, read_regular
from dde_ds.warn import reason

RECORD = '{"winner": path, "loser": path, "caption": text}'
# Limit of one image file, far above what MAX_PIXELS allows. A larger file counts as no image.
IMAGE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a ``pairs.jsonl``."""

    winner: str | None
    loser: str | None
    caption: str | None
    label: float | None


class FolderPairs:
    """Pairs of a ``pairs.jsonl``.

    Args:
        path: the file.
        root: folder that paths are relative to and must stay below; None means the folder of the file.
        follow_links: also read files behind symbolic links that lead out of ``root``.

    Raises:
        UserError: the file or ``root`` does not exist, or a line is not a record of two paths and a caption.
    """

    def __init__(self, path: Path, root: Path | None = None, follow_links: bool = False):
        if root is not None and not root.is_dir():
            raise UserError(f"root {root}: no such folder")
        folder = root or path.parent
        self.path, self.root, self.follow_links = path, folder.resolve(), follow_links
        self._roots = (self.root, folder.absolute())
        self._option = f"root {root}" if root else f"the folder of {path.name}"
        try:
            data = read_regular(path)
        except OSError as error:
            raise UserError(f"input {path}: not readable: {reason(error).lower()}") from None
        except ValueError as error:
            raise UserError(f"input {path}: {error}") from None
        self.pairs = [self._parse(number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
        self.identity = [{"name": encodable(path.name), "rows": len(self.pairs), "sha256": hashlib.sha256(data).hexdigest()}]

    def name(self, row: int) -> str:
        return f"{encodable(self.path.name)}:{row}"

    def survey(self, keep_no_caption: bool = False, undecided: bool = False) -> Survey:
        survey = SurveyBuilder(keep_no_caption, undecided)
        for line in self.pairs:
            survey.add(line.caption, line.label)
        return survey.finish()

    def read(self, rows: np.ndarray) -> Iterator[PairRow]:
        for row in rows.tolist():
            line = self.pairs[row]
            names = {role: name for role, name in (("winner", line.winner), ("loser", line.loser)) if name is not None}
            yield PairRow(row, self.name(row), line.caption or "", self._image(line.winner), self._image(line.loser), names)

    def _image(self, name: str | None) -> bytes | None:
        try:
            return name if name is None else read_regular(self._place(name), IMAGE_BYTES)
        except (OSError, ValueError):  # missing, or not a file of an image's size
            return None

    def _place(self, name: str) -> Path:
        """Return the path that ``name`` means. Each ``..`` is resolved first, before a link can lead it elsewhere."""
        return Path(os.path.normpath(self.root / name))

    def _parse(self, number: int, line: bytes) -> Line:
        where = f"input {self.path}, line {number}"
        try:
            record = parse_json(line, unique_keys=True)
            winner, loser, caption = (record[key] for key in ("winner", "loser", "caption"))
            label, tie = record.get("label", 1), record.get("tie", False)
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{where}: expected {RECORD}, found {line[:80]!r}") from None
        except ValueError as error:
            raise UserError(f"{where}: expected {RECORD}, found {line[:80]!r}: {error}") from None
        if not all(value is None or isinstance(value, str) for value in (winner, loser, caption)):
            raise UserError(f"{where}: expected {RECORD}, found {line[:80]!r}")
        if not isinstance(tie, bool | None):
            raise UserError(f"{where}: tie is {tie!r}, expected true or false")
        if not isinstance(label, float | int | str | None):
            raise UserError(f"{where}: label is {label!r}, expected 1, or 0.5 for a tie")
        label = 0.5 if tie else label_of(label)
        if decide(label) == DECIDED and label == 0:
            raise UserError(f"{where}: label {record['label']!r} prefers the loser; swap the two paths and leave it out")
        for name in (winner, loser):
            if name is not None:
                self._check(name, where)
        return Line(winner, loser, caption, label)

    def _check(self, name: str, where: str) -> None:
        """Refuse a path that leaves the root, either by itself or through a link that the user did not ask to follow."""
        if "\0" in name:
            raise UserError(f"{where}: {name!r} is no path")
        place = self._place(name)
        inside = any(place.is_relative_to(root) for root in self._roots)
        if place.resolve().is_relative_to(self.root) or (inside and self.follow_links):
            return
        steps = [step for step in (*reversed(place.parents), place) if inside and step not in self._roots]
        link = next((step for step in steps if step.is_symlink() and any(step.is_relative_to(root) for root in self._roots)), None)
        if link is None:
            hint = "name the folder that paths may point into as root"
            raise UserError(f"{where}: {name!r} lies outside of {self._option}; {hint}")
        raise UserError(
            f"{where}: {name!r} lies outside of {self._option}, behind the link {link} -> {link.readlink()}; --follow-links follows it"
        )
