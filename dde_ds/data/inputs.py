"""Choose the reader for an input: parquet files, a ``pairs.jsonl`` beside images, or a data set of the Hugging Face
hub.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from dde_ds.data.folder import FolderPairs
from dde_ds.data.hub import HubPairs
from dde_ds.data.pairs import PairSource
from dde_ds.data.pickapic import ParquetPairs, find_files
from dde_ds.data.storage import SCHEMES
from dde_ds.errors import UserError


def find_pairs(inputs: Sequence[str], split: str = "train", root: Path | None = None, follow_links: bool = False) -> PairSource:
    """Return the pairs that ``--input`` names.

    Inputs may be

    - parquet files, globs and URLs of either (local, ``s3://``, ``hf://`` …),
    - one ``pairs.jsonl``, or a folder that holds one,
    - a folder of parquet files,
    - a folder that ``datasets`` saved, or the name of a data set on the hub.

    Args:
        inputs: one or more of them; several only for parquet files.
        split: name of the split, for a data set of the hub or one that ``datasets`` saved.
        root, follow_links: only for a ``pairs.jsonl``, as :class:`~dde_ds.data.folder.FolderPairs` takes them.

    Raises:
        UserError: nothing is found, the needed columns are missing, or the arguments do not fit the kind of input.
    """
    inputs = [item.removeprefix("file://") for item in inputs]
    for item in inputs:
        if "://" in item and item.partition("://")[0] not in SCHEMES:
            raise UserError(f"input {item}: expected a path or a URL of {', '.join(f'{s}://' for s in SCHEMES)}")
    if lines := _pairs_jsonl(inputs):
        return FolderPairs(lines, root, follow_links)
    if root or follow_links:
        option = "root" if root else "follow_links"
        raise UserError(f"{option}: is for the images of a pairs.jsonl, and --input {inputs[0]} is none; leave it out")
    path = Path(inputs[0])
    if len(inputs) == 1 and "://" not in inputs[0]:
        saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        name = inputs[0].count("/") == 1 and not path.exists() and not glob.has_magic(inputs[0]) and not path.suffix
        if saved or name:
            return HubPairs(inputs[0], split)
    return ParquetPairs(inputs)


def _pairs_jsonl(inputs: list[str]) -> Path | None:
    """Return the ``pairs.jsonl`` that the inputs name, or None if they name none."""
    if len(inputs) == 1 and (Path(inputs[0]) / "pairs.jsonl").exists():
        return Path(inputs[0]) / "pairs.jsonl"
    files = [Path(file) for item in inputs if item.endswith(".jsonl") and "://" not in item for file in find_files(item)]
    if files and (len(files) > 1 or len(inputs) > 1):
        raise UserError(f"input {files[0]}: one pairs.jsonl is read at a time, without other inputs")
    return files[0] if files else None
