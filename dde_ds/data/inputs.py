"""What pairs are made from: parquet files, a ``pairs.jsonl`` beside images, or a data set of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dde_ds.data.folder import FolderPairs
from dde_ds.data.hub import HubPairs
from dde_ds.data.pairs import PairSource
from dde_ds.data.pickapic import ParquetPairs
from dde_ds.data.storage import SCHEMES
from dde_ds.errors import UserError


def find_pairs(inputs: Sequence[str], split: str = "train") -> PairSource:
    """The pairs that ``--input`` names.

    Parquet files, globs and their URLs (local, ``s3://``, ``hf://`` …); one ``pairs.jsonl`` or a folder with one; a folder of
    parquet files; a folder that ``datasets`` saved, or the name of a data set on the hub.

    Raises:
        UserError: nothing is there, or it has not the columns that are needed.
    """
    path = Path(inputs[0])
    single = len(inputs) == 1 and "://" not in inputs[0]
    if single and (path.suffix == ".jsonl" or (path / "pairs.jsonl").is_file()):
        return FolderPairs(path if path.suffix == ".jsonl" else path / "pairs.jsonl")
    if single and path.is_dir() and not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        if not any(path.rglob("*.parquet")):
            raise UserError(f"--input {path}: holds no pairs.jsonl, no parquet file and no data set that `datasets` saved")
        return ParquetPairs([str(path / "**" / "*.parquet")])
    if single and (path.is_dir() or (inputs[0].count("/") == 1 and not path.exists() and "*" not in inputs[0] and not path.suffix)):
        return HubPairs(inputs[0], split)
    for item in inputs:
        if "://" in item and item.partition("://")[0] not in (*SCHEMES, "file"):
            raise UserError(f"--input {item}: expected a path or a URL of {', '.join(f'{s}://' for s in SCHEMES)}")
    return ParquetPairs(inputs)
