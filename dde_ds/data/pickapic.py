"""Preference pairs from parquet files in Pick-a-Pic v2's columns (``yuvalkirstain/pickapic_v2``).

``label_0`` is 1 where image 0 is preferred, 0 where image 1 is, anything else is no decision. As in the published
Diffusion-DPO recipe the labels alone decide which rows count.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dde_ds.errors import UserError

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")
PROVENANCE = ("best_image_uid", "image_0_uid", "image_1_uid", "ranking_id")


@dataclass(frozen=True)
class PairRow:
    """One decided row, images still as they were stored."""

    source: str
    """``file:row``, to name the row in a message."""
    caption: str
    winner: bytes | None
    loser: bytes | None
    provenance: dict
    """The row's uids, where it has them."""


def find_parquet(inputs: Sequence[str]) -> list[Path]:
    """Files of paths and globs, in order; each must have the columns that are read.

    Raises:
        UserError: a pattern that matches nothing, a file that is no parquet, a missing column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for pattern in inputs:
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207 (absolute patterns)
        if not found:
            raise UserError(f"--input {pattern}: no file matches")
        files += map(Path, found)
    for file in files:
        if not file.is_file():
            raise UserError(f"--input {file}: no such file; give parquet files or a quoted glob such as 'pickapic/train-*.parquet'")
        try:
            names = pq.read_schema(file).names
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"--input {file}: not readable as parquet: {str(error).splitlines()[0]}") from None
        missing = [name for name in COLUMNS if name not in names]
        if missing:
            raise UserError(f"--input {file}: no column {', '.join(missing)}; Pick-a-Pic v2's {', '.join(COLUMNS)} are needed")
    return files


def count_captions(files: Sequence[Path]) -> tuple[list[str], Counter]:
    """Captions of the decided rows in row order, and all rows counted as ``decided``, ``tie`` or ``no label``.

    Reads two narrow columns only.
    """
    import pyarrow.parquet as pq

    captions, counts = [], Counter()
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(columns=["caption", "label_0"]):
            for caption, label in zip(batch["caption"].to_pylist(), batch["label_0"].to_pylist(), strict=True):
                decision = _decision(label)
                counts[decision] += 1
                if decision == "decided":
                    captions.append(caption or "")
    return captions, counts


def read_pairs(files: Sequence[Path]) -> Iterator[PairRow]:
    """Every decided row in order, winner first. Memory stays that of one batch of rows."""
    import pyarrow.parquet as pq

    for file in files:
        parquet = pq.ParquetFile(file)
        columns = [*COLUMNS, *(name for name in PROVENANCE if name in parquet.schema_arrow.names)]
        number = 0
        for batch in parquet.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                if _decision(row["label_0"]) == "decided":
                    images = (row["jpg_0"], row["jpg_1"])
                    winner, loser = images if row["label_0"] == 1 else images[::-1]
                    kept = {name: row[name] for name in PROVENANCE if name in row}
                    yield PairRow(f"{file.name}:{number}", row["caption"] or "", winner, loser, kept)
                number += 1


def _decision(label: float | None) -> str:
    if label is None or label != label:
        return "no label"
    return "decided" if label in (0.0, 1.0) else "tie"
