"""What pairs are made from: parquet files, a ``pairs.jsonl`` beside images, or a data set of the Hugging Face hub.

Each kind is a :class:`PairSource`: it numbers its rows, says of each whether it counts, and reads any rows again by number. So
any number of processes split the work by arithmetic alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dde_ds.data.storage import SCHEMES
from dde_ds.errors import UserError

DECIDED, TIE, NO_LABEL = "decided", "tie", "no label"


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
    """Rows that no decision was found in, and why."""

    @property
    def counts(self) -> Counter:
        return Counter({DECIDED: len(self.rows)} if len(self.rows) else {}) + Counter(self.excluded.values())


class PairSource(Protocol):
    identity: list[dict]
    """What the shards' settings say of the input: another input gives another identity."""

    def survey(self) -> Survey:
        """Labels and captions of all rows; reads no image."""

    def read(self, rows: np.ndarray) -> Iterator[PairRow]:
        """The decided rows of these ascending numbers, winner first. Memory stays that of a few rows."""

    def name(self, row: int) -> str:
        """``file:row``."""


class SurveyBuilder:
    """Collects a :class:`Survey` row by row."""

    def __init__(self):
        self._index: dict[str, int] = {}
        self._caption_of: list[int] = []
        self._rows: list[int] = []
        self._excluded: dict[int, str] = {}
        self._next = 0

    def add(self, caption: str | None, label: float | None) -> None:
        decision = decide(label)
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


def find_pairs(inputs: Sequence[str], split: str = "train") -> PairSource:
    """The pairs that ``--input`` names.

    Parquet files, globs and their URLs (local, ``s3://``, ``hf://`` …); one ``pairs.jsonl`` or a folder with one; a folder of
    parquet files; a folder that ``datasets`` saved, or the name of a data set on the hub.

    Raises:
        UserError: nothing is there, or it has not the columns that are needed.
    """
    from dde_ds.data.pickapic import ParquetPairs

    path = Path(inputs[0])
    single = len(inputs) == 1 and "://" not in inputs[0]
    if single and (path.suffix == ".jsonl" or (path / "pairs.jsonl").is_file()):
        from dde_ds.data.folder import FolderPairs

        return FolderPairs(path if path.suffix == ".jsonl" else path / "pairs.jsonl")
    if single and path.is_dir() and not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        if not any(path.rglob("*.parquet")):
            raise UserError(f"--input {path}: holds no pairs.jsonl, no parquet file and no data set that `datasets` saved")
        return ParquetPairs([str(path / "**" / "*.parquet")])
    if single and (path.is_dir() or (inputs[0].count("/") == 1 and not path.exists() and "*" not in inputs[0] and not path.suffix)):
        from dde_ds.data.hub import HubPairs

        return HubPairs(inputs[0], split)
    for item in inputs:
        if "://" in item and item.partition("://")[0] not in (*SCHEMES, "file"):
            raise UserError(f"--input {item}: expected a path or a URL of {', '.join(f'{s}://' for s in SCHEMES)}")
    return ParquetPairs(inputs)
