"""Read preference pairs of a Hugging Face data set, by its name or from a folder that ``datasets`` saved.

``datasets`` first downloads and converts the whole set, so the set takes its space twice. Reading the parquet files
themselves avoids that: as ``hf://datasets/OWNER/NAME/data/train-*.parquet``, or downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dde_ds.data.pairs import PairRow, Survey, SurveyBuilder, label_of
from dde_ds.data.pickapic import BATCH, COLUMNS, PROVENANCE, captions_of, check_columns, pair_row
from dde_ds.errors import UserError
from dde_ds.text import encodable


def load_dataset(name: str, split: str) -> Any:
    """Return a split of a data set of ``datasets``.

    Raises:
        UserError: it cannot be had, or has no such split.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"input {name}: needs `datasets`: pip install -e '.[hub]', or give parquet files") from None
    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever the hub, the network and the builder may raise
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"input {name}: no file, and no data set to be had: {type(error).__name__}: {problem}") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(f"split {split}: {name} has {', '.join(map(str, found))}")
        found = found[split]
    return found


class HubPairs:
    """Pairs of a data set in Pick-a-Pic's columns.

    Args:
        name: name of the data set on the hub, or a folder that ``datasets`` saved.
        split: name of the split.

    Raises:
        UserError: the data set cannot be loaded, has no such split, or lacks columns; or ``datasets`` is not installed.
    """

    def __init__(self, name: str, split: str):
        dataset = load_dataset(name, split)
        check_columns(name, dataset.features.arrow_schema)
        self.label = encodable(f"{name.rstrip('/').rpartition('/')[2]}/{split}")
        columns = [*COLUMNS, *(column for column in PROVENANCE if column in dataset.column_names)]
        self.table: Any = dataset.select_columns(columns).with_format(
            "arrow"
            # Rows then come as pyarrow tables, which the library's type hints do not say.
        )
        self.identity = [{"name": self.label, "rows": len(dataset), "fingerprint": dataset._fingerprint}]

    def name(self, row: int) -> str:
        return f"{self.label}:{row}"

    def survey(self, keep_no_caption: bool = False, undecided: bool = False) -> Survey:
        survey, row = SurveyBuilder(keep_no_caption, undecided), 0
        for batch in self.table.select_columns(["caption", "label_0"]).iter(batch_size=10_000):
            captions = captions_of(batch["caption"], f"input {self.label}", row)
            for caption, label in zip(captions, batch["label_0"].to_pylist(), strict=True):
                survey.add(caption, label_of(label))
            row += len(captions)
        return survey.finish()

    def read(self, rows: np.ndarray) -> Iterator[PairRow]:
        for low in range(0, len(rows), BATCH):
            wanted = rows[low : low + BATCH].tolist()
            for row, values in zip(wanted, self.table[wanted].to_pylist(), strict=True):
                yield pair_row(row, self.name(row), values)
