"""Preference pairs before they are encoded: what every kind of input gives.

Each kind is a :class:`PairSource`: it numbers its rows, says of each whether it counts, and reads any rows again by number. So
any number of processes split the work by arithmetic alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

DECIDED, TIE, NO_LABEL, NO_CAPTION = "decided", "tie", "no label", "no caption"
# Labels in words; other words decide nothing.
WORDS = {"true": 1.0, "false": 0.0, "": None, "none": None, "null": None}


@dataclass(frozen=True)
class PairRow:
    """One decided row, images still as they were stored."""

    row: int
    """Its number in the input, counted through all files."""
    source: str
    """``file:row``, to name the row in a message."""
    caption: str
    winner: bytes | None
    loser: bytes | None
    provenance: dict
    """The row's uids, where it has them."""


@dataclass(frozen=True)
class Survey:
    """What the narrow columns of an input say, in its order. Some 20 bytes a row."""

    captions: list[str]
    """Distinct captions of the decided rows."""
    caption_of: np.ndarray
    """(decided,) index of each decided pair's caption in ``captions``."""
    rows: np.ndarray
    """(decided,) number of each decided pair's row in the input."""
    excluded: dict[int, str]
    """Rows that hold no decision or no caption, and why."""

    @property
    def counts(self) -> Counter:
        return Counter({DECIDED: len(self.rows)} if len(self.rows) else {}) + Counter(self.excluded.values())


class PairSource(Protocol):
    identity: list[dict]
    """What the shards' settings say of the input: another input gives another identity."""

    def survey(self, keep_no_caption: bool = False) -> Survey:
        """Labels and captions of all rows; reads no image. A decided row without a caption is excluded, or has the empty one."""
        ...

    def read(self, rows: np.ndarray) -> Iterator[PairRow]:
        """The decided rows of these ascending numbers, winner first. Memory stays that of a few rows."""
        ...

    def name(self, row: int) -> str:
        """``file:row``."""
        ...


class SurveyBuilder:
    """Collects a :class:`Survey` row by row."""

    def __init__(self, keep_no_caption: bool = False):
        self._keep_no_caption = keep_no_caption
        self._index: dict[str, int] = {}
        self._caption_of: list[int] = []
        self._rows: list[int] = []
        self._excluded: dict[int, str] = {}
        self._next = 0

    def add(self, caption: str | None, label: float | None) -> None:
        """Take the next row: ``label`` as :func:`label_of` gives it."""
        decision = decide(label)
        if decision == DECIDED and caption is None and not self._keep_no_caption:
            decision = NO_CAPTION
        if decision == DECIDED:
            self._caption_of.append(self._index.setdefault(caption or "", len(self._index)))
            self._rows.append(self._next)
        else:
            self._excluded[self._next] = decision
        self._next += 1

    def finish(self) -> Survey:
        return Survey(list(self._index), np.array(self._caption_of, np.int32), np.array(self._rows, np.int64), self._excluded)


def decide(label: float | None) -> str:
    """As in the published Diffusion-DPO recipe the label alone decides: 1 prefers image 0, 0 prefers image 1."""
    if label is None or label != label:
        return NO_LABEL
    return DECIDED if label in (0.0, 1.0) else TIE


def label_of(cell: Any) -> float | None:
    """Return a label as a number, from a number, a truth value or text such as ``"1"``; None where there is none.

    Words that are neither a number nor true or false, such as ``"tie"``, are 0.5: no decision.
    """
    if not isinstance(cell, str):
        return None if cell is None else float(cell)
    word = cell.strip().lower()
    try:
        return float(word)
    except ValueError:
        return WORDS.get(word, 0.5)
