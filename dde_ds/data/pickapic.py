"""Preference pairs from parquet files in Pick-a-Pic v2's columns (``yuvalkirstain/pickapic_v2``), local or behind a URL.

``label_0`` is 1 where image 0 is preferred, 0 where image 1 is, anything else is no decision.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dde_ds.data.pairs import PairRow, Survey, SurveyBuilder
from dde_ds.data.storage import filesystem, is_url
from dde_ds.errors import UserError

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")
PROVENANCE = ("best_image_uid", "image_0_uid", "image_1_uid", "ranking_id")
# Rows decoded at a time: some 20 MB of Pick-a-Pic's images.
BATCH = 64


class ParquetPairs:
    """Pairs of parquet files, taken row group by row group: a process reads the groups that hold its rows and no others.

    Raises:
        UserError: a pattern that matches nothing, a file that is no parquet, a missing column or one of another type.
    """

    def __init__(self, inputs: Sequence[str]):
        self.files = [file for pattern in inputs for file in _find(pattern)]
        self.groups: list[np.ndarray] = []
        """For each file, the first row of each row group and, last, of the next file; counted through all files."""
        self.identity: list[dict] = []
        rows = 0
        for file in self.files:
            with _opened(file) as parquet:
                metadata, schema = parquet.metadata, parquet.schema_arrow
            check_columns(file, schema)
            sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            self.groups.append(rows + np.cumsum([0, *sizes]))
            rows += metadata.num_rows
            # The footer has the offset, size and statistics of every column chunk: another file has another one, and hashing
            # 335 GB before each start would take longer than many a run.
            self.identity.append({"name": Path(file).name, "rows": metadata.num_rows, "footer": _footer_digest(metadata)})

    def name(self, row: int) -> str:
        number = int(np.searchsorted([groups[-1] for groups in self.groups], row, side="right"))
        return f"{Path(self.files[number]).name}:{row - int(self.groups[number][0])}"

    def survey(self) -> Survey:
        found = SurveyBuilder()
        for file in self.files:
            with _opened(file) as parquet:
                for batch in parquet.iter_batches(columns=["caption", "label_0"]):
                    for caption, label in zip(batch["caption"].to_pylist(), batch["label_0"].to_pylist(), strict=True):
                        found.add(caption, label)
        return found.finish()

    def read(self, rows: np.ndarray) -> Iterator[PairRow]:
        for file, groups in zip(self.files, self.groups, strict=True):
            own = rows[(rows >= groups[0]) & (rows < groups[-1])]
            if not len(own):
                continue
            with _opened(file) as parquet:
                columns = [*COLUMNS, *(name for name in PROVENANCE if name in parquet.schema_arrow.names)]
                for number in np.unique(np.searchsorted(groups, own, side="right") - 1).tolist():
                    wanted = set(own[(own >= groups[number]) & (own < groups[number + 1])].tolist())
                    row = int(groups[number])
                    for batch in parquet.iter_batches(batch_size=BATCH, row_groups=[number], columns=columns):
                        inside = [index for index in range(len(batch)) if row + index in wanted]
                        for index in inside:
                            values = {name: batch[name][index].as_py() for name in columns}
                            yield pair_row(row + index, f"{Path(file).name}:{row + index - int(groups[0])}", values)
                        row += len(batch)
                        if row > max(wanted):
                            break


def pair_row(row: int, source: str, values: dict[str, Any]) -> PairRow:
    """A decided row of Pick-a-Pic's columns, winner first."""
    images = tuple(_bytes(values[name]) for name in ("jpg_0", "jpg_1"))
    winner, loser = images if values["label_0"] == 1 else images[::-1]
    kept = {name: str(values[name]) for name in PROVENANCE if values.get(name) is not None}
    return PairRow(row, source, values["caption"] or "", winner, loser, kept)


def _bytes(cell: bytes | dict | None) -> bytes | None:
    """``datasets`` stores an image as a record of bytes and path."""
    return cell.get("bytes") if isinstance(cell, dict) else cell


def _find(pattern: str) -> list[str]:
    """Files of a path, a glob or the URL of either, in order."""
    if is_url(pattern) and not pattern.startswith("file://"):
        fs, root = filesystem(pattern, "--input")
        try:
            found = sorted(fs.glob(root)) if glob.has_magic(root) else [root]
        except Exception as error:  # every driver has exceptions of its own
            raise UserError(f"--input {pattern}: not readable: {type(error).__name__} {' '.join(str(error).split())}") from None
        found = [name if "://" in name else fs.unstrip_protocol(name) for name in found]
    else:
        pattern = pattern.removeprefix("file://")
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207 (absolute patterns)
    if not found:
        raise UserError(f"--input {pattern}: no file matches")
    return found


@contextlib.contextmanager
def _opened(file: str):
    """An open parquet file; whatever its bytes or the network do while it is read ends in one line."""
    try:
        with _open(file) as parquet:
            yield parquet
    except (UserError, AttributeError, NameError):  # ours, or a bug
        raise
    except FileNotFoundError:
        raise UserError(
            f"--input {file}: no such file; give parquet files or a quoted glob such as 'pickapic/train-*.parquet'"
        ) from None
    except Exception as error:  # pyarrow's, the file system's, and every remote driver's own
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"--input {file}: not readable as parquet: {problem}; what is made is kept, a second run goes on"
        ) from error


def _open(file: str):
    """A parquet file, its column chunks read in small pieces: a row group of images would be hundreds of megabytes."""
    import pyarrow.parquet as pq

    if not is_url(file):
        if not Path(file).is_file():
            raise FileNotFoundError(file)
        return pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    fs, root = filesystem(file, "--input")
    return pq.ParquetFile(fs.open(root, "rb", block_size=4 << 20), pre_buffer=False)


def check_columns(file: str, schema: Any) -> None:
    import pyarrow as pa

    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise UserError(f"--input {file}: no column {', '.join(missing)}; Pick-a-Pic v2's {', '.join(COLUMNS)} are needed")
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    number = (pa.types.is_floating, pa.types.is_integer, pa.types.is_null)
    image = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_struct, pa.types.is_null)
    for name, kinds in (("caption", text), ("label_0", number), ("jpg_0", image), ("jpg_1", image)):
        kind = schema.field(name).type
        if not any(is_kind(kind) for is_kind in kinds):
            raise UserError(f"--input {file}: column {name} holds {kind}; Pick-a-Pic v2 has text, a number and JPEG bytes")


def _footer_digest(metadata: Any) -> str:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    metadata.write_metadata_file(sink)
    return hashlib.sha256(sink.getvalue()).hexdigest()
