"""Choose the reader for an input: parquet files, a ``pairs.jsonl`` beside images, or a data set of the Hugging Face
hub.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dde_ds.data.columns import parse_columns
from dde_ds.data.folder import FolderPairs
from dde_ds.data.hub import HubPairs
from dde_ds.data.pairs import PairSource
from dde_ds.data.pickapic import ParquetPairs, find_files
from dde_ds.data.storage import SCHEMES, is_url
from dde_ds.data.table_pairs import TablePairs, open_table_pairs
from dde_ds.data.tables import HubTable, open_tables
from dde_ds.errors import UserError


@dataclass(frozen=True)
class TableOptions:
    """How to read a table whose columns are not Pick-a-Pic's. Without any option, the name of an input decides how it is read."""

    columns: tuple[str, ...] = ()
    """``ROLE=NAME`` for each column. :mod:`dde_ds.data.columns` lists the roles."""
    preset: str | None = None
    """Name of a public data set with known columns."""
    pairs: str | None = None
    """The pairs to take from a ranking: ``all`` (default), ``adjacent`` or ``best-worst``."""
    min_margin: float | None = None
    """The least difference between the winner's and the loser's share of the votes, 0 to 1."""


def find_pairs(
    inputs: Sequence[str],
    split: str = "train",
    root: Path | str | None = None,
    follow_links: bool = False,
    table: TableOptions = TableOptions(),
) -> PairSource:
    """Return the pairs that ``--input`` names.

    Inputs may be

    - parquet files, globs and URLs of either (local, ``s3://``, ``hf://`` …),
    - one ``pairs.jsonl``, or a folder that holds one,
    - a folder of parquet files,
    - a folder that ``datasets`` saved, or the name of a data set on the hub,
    - with ``columns`` or a ``preset``, tables of any kind that :mod:`dde_ds.data.tables` reads.

    Args:
        inputs: one input, or several parquet files or tables.
        split: name of the split, for a data set of the hub or one that ``datasets`` saved.
        root, follow_links: for a ``pairs.jsonl``, the arguments of :class:`~dde_ds.data.folder.FolderPairs`; for a table, those of
            :class:`~dde_ds.data.image_files.ImageFiles`.
        table: how to read a table whose columns are not Pick-a-Pic's.

    Raises:
        UserError: no input is found, a needed column is missing, or an argument does not fit the kind of input.
    """
    inputs = [item.removeprefix("file://") for item in inputs]
    for item in inputs:
        if "://" in item and item.partition("://")[0] not in SCHEMES:
            raise UserError(f"input {item}: expected a path or a URL of {', '.join(f'{s}://' for s in SCHEMES)}")
    if table.columns or table.preset:
        return _table_pairs(inputs, split, root, follow_links, table)
    for option in ("pairs", "min_margin"):
        if getattr(table, option) is not None:
            raise UserError(f"{option}: is for tables; name their columns with columns or preset")
    if lines := _pairs_jsonl(inputs):
        return FolderPairs(lines, None if root is None else Path(root), follow_links)
    if root or follow_links:
        option = "root" if root else "follow_links"
        raise UserError(f"{option}: is for the images of a pairs.jsonl, and --input {inputs[0]} is none; leave it out")
    if len(inputs) == 1 and "://" not in inputs[0] and _is_dataset(inputs[0]):
        return HubPairs(inputs[0], split)
    return ParquetPairs(inputs)


def _is_dataset(name: str) -> bool:
    """Return whether ``datasets`` has to read the input: a folder that ``datasets`` saved, or a name on the hub."""
    path = Path(name)
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    return saved or (name.count("/") == 1 and not path.exists() and not glob.has_magic(name) and not path.suffix)


def _table_pairs(inputs: list[str], split: str, root: Path | str | None, follow_links: bool, options: TableOptions) -> TablePairs:
    """Return the pairs of tables whose columns are named."""
    columns = parse_columns(options.columns)
    if len(inputs) == 1 and _is_dataset(inputs[0]):
        tables, folders = [HubTable(inputs[0], split)], [None]
    else:
        tables = open_tables(inputs)
        folders = [None if is_url(table.file) else Path(table.file).parent for table in tables]
    return open_table_pairs(tables, folders, columns, options.preset, root, follow_links, options.pairs, options.min_margin)


def _pairs_jsonl(inputs: list[str]) -> Path | None:
    """Return the ``pairs.jsonl`` that the inputs name, or None if they name none."""
    if len(inputs) == 1 and (Path(inputs[0]) / "pairs.jsonl").exists():
        return Path(inputs[0]) / "pairs.jsonl"
    files = [Path(file) for item in inputs if item.endswith(".jsonl") and "://" not in item for file in find_files(item)]
    if files and (len(files) > 1 or len(inputs) > 1):
        raise UserError(f"input {files[0]}: one pairs.jsonl is read at a time, without other inputs")
    return files[0] if files else None
