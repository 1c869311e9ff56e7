"""Preference pairs before they are encoded. Every kind of input gives them in this form.

Each kind of input is a :class:`PairSource`. It numbers its rows, says of each row whether it counts, and reads any rows
again by their numbers. So any number of processes can split the work by arithmetic alone.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

DECIDED, TIE, NO_LABEL, NO_CAPTION = "decided", "tie", "no label", "no caption"
# Labels that are words. Any other word decides nothing.
WORDS = {"true": 1.0, "false": 0.0, "": None, "none": None, "null": None}


@dataclass(frozen=True)
class PairRow:
    """One decided row. Its images are still encoded as they were stored."""

    row: int
    """Number of the row in the input, counted through all files."""
    source: str
    """``file:row``, which names the row in a message."""
    caption: str
    winner: bytes | None
    loser: bytes | None
    provenance: dict
    """The uids of the row, if it has any; or the paths of its images."""
    soft_label: float | None = None
    """The winner's share of the votes, in [0.5, 1], or None if the input has no votes."""


@dataclass(frozen=True)
class Survey:
    """The labels and captions of an input, in its order. A survey takes some 20 bytes a row."""

    captions: list[str]
    """Distinct captions of the decided rows."""
    caption_of: np.ndarray
    """(decided,) index in ``captions`` of each decided pair's caption."""
    rows: np.ndarray
    """(decided,) number of each decided pair's row in the input."""
    excluded: dict[int, str]
    """Number and reason of each row that holds no decision or no caption."""
    noted: dict[str, int] = field(default_factory=dict)
    """Other counts by name, such as the pairs that came from rankings."""

    @property
    def counts(self) -> Counter:
        """Return the number of rows for each reason, ``decided`` among them."""
        return Counter({DECIDED: len(self.rows)} if len(self.rows) else {}) + Counter(self.excluded.values())


class PairSource(Protocol):
    """Preference pairs of any kind of input. Rows are counted through all its files."""

    identity: list[dict]
    """Entry for the input in the settings of the shards. Another input has another identity."""

    def survey(self, keep_no_caption: bool = False, undecided: bool = False) -> Survey:
        """Read the labels and captions of all rows, and no image.

        Args:
            keep_no_caption: give a decided row without a caption the empty one, instead of excluding the row.
            undecided: count ties and rows without a label as decided, because they are going to be labelled.
        """
        ...

    def read(self, rows: np.ndarray) -> Iterator[PairRow]:
        """Yield the decided rows with these ascending numbers. The winner comes first. Memory stays that of a few rows."""
        ...

    def name(self, row: int) -> str:
        """Return ``file:row``, which names the row in a message."""
        ...


class SurveyBuilder:
    """Build a :class:`Survey` row by row."""

    def __init__(self, keep_no_caption: bool = False, undecided: bool = False):
        self._keep_no_caption, self._undecided = keep_no_caption, undecided
        self._index: dict[str, int] = {}
        self._caption_of, self._rows = array("i"), array("q")  # lists would take six times as much
        self._excluded: dict[int, str] = {}
        self._next = 0

    def add(self, caption: str | None, label: float | None) -> None:
        """Add the next row.

        Args:
            caption: the row's caption, or None.
            label: the row's label, as :func:`label_of` returns it.
        """
        self.add_decision(caption, decide(label))

    def add_decision(self, caption: str | None, decision: str) -> None:
        """Add the next row.

        Args:
            caption: the row's caption, or None.
            decision: :data:`DECIDED`, or why the row does not count.
        """
        if self._undecided and decision in (TIE, NO_LABEL):
            decision = DECIDED
        if decision == DECIDED and caption is None and not self._keep_no_caption:
            decision = NO_CAPTION
        if decision == DECIDED:
            self._caption_of.append(self._index.setdefault(caption or "", len(self._index)))
            self._rows.append(self._next)
        else:
            self._excluded[self._next] = decision
        self._next += 1

    def finish(self, noted: dict[str, int] | None = None) -> Survey:
        """Return the survey of the rows that were added."""
        rows = np.array(self._rows, np.int64)
        return Survey(list(self._index), np.array(self._caption_of, np.int32), rows, self._excluded, noted or {})


def reading_of(source: PairSource) -> dict:
    """Return what, beside the files, decides which pairs a source gives: columns, labels. Empty for the sources that have no such choice."""
    return getattr(source, "reading", {})


def has_soft_labels(source: PairSource) -> bool:
    """Return whether every pair of a source comes with :attr:`PairRow.soft_label`."""
    return getattr(source, "soft", False)


def decide(label: float | None) -> str:
    """Return the decision that a label stands for: ``decided``, ``tie`` or ``no label``.

    As in the published Diffusion-DPO recipe, the label alone decides: 1 prefers image 0, and 0 prefers image 1.
    """
    if label is None or label != label:
        return NO_LABEL
    return DECIDED if label in (0.0, 1.0) else TIE


def label_of(cell: Any) -> float | None:
    """Return the label in a cell as a number, or None if the cell holds no label.

    The cell may hold a number, a truth value or text such as ``"1"``. Other words, such as ``"tie"``, become 0.5, which
    is no decision.
    """
    if not isinstance(cell, str):
        return None if cell is None else float(cell)
    word = cell.strip().lower()
    try:
        return float(word)
    except ValueError:
        return WORDS.get(word, 0.5)
