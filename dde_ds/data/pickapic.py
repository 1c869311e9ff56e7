"""Read preference pairs from parquet files in the columns of Pick-a-Pic v2 (``yuvalkirstain/pickapic_v2``), local or
behind a URL.

``label_0`` is 1 if image 0 is preferred, and 0 if image 1 is. Any other value is no decision. A label may be a number,
a truth value or text. Columns may be stored as dictionaries (pandas categories) or as views.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dde_ds.data.pairs import PairRow, Survey, SurveyBuilder, label_of
from dde_ds.data.storage import filesystem, is_url
from dde_ds.errors import UserError
from dde_ds.text import encodable

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")
PROVENANCE = ("best_image_uid", "image_0_uid", "image_1_uid", "ranking_id")
# Rows that are decoded at a time. Of Pick-a-Pic, their images take some 20 MB.
BATCH = 64


class ParquetPairs:
    """Pairs of parquet files.

    A process reads only the row groups that hold its rows.

    Args:
        inputs: paths, globs and URLs, as :func:`find_files` takes them.

    Raises:
        UserError: a pattern matches nothing, a file is not parquet, or a column is missing or has an unusable type.
    """

    def __init__(self, inputs: Sequence[str]):
        self.files = [file for name in inputs for file in find_files(name)]
        self.groups: list[np.ndarray] = []
        """Per file, the first row of each row group and then the first row of the next file.

        Rows are counted through all files.
        """
        self.identity: list[dict] = []
        rows = 0
        for file in self.files:
            with _opened(file) as parquet:
                metadata, schema = parquet.metadata, parquet.schema_arrow
            check_columns(file, schema)
            sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            self.groups.append(rows + np.cumsum([0, *sizes]))
            rows += metadata.num_rows
            # The footer has the offset, size and statistics of every column chunk, so another file has another footer.
            # Hashing the 335 GB of Pick-a-Pic before each start would take longer than many runs.
            self.identity.append(
                {"name": encodable(Path(file).name), "rows": metadata.num_rows, "footer": _footer_digest(metadata)}
            )

    def name(self, row: int) -> str:
        number = int(np.searchsorted([groups[-1] for groups in self.groups], row, side="right"))
        return f"{encodable(Path(self.files[number]).name)}:{row - int(self.groups[number][0])}"

    def survey(self, keep_no_caption: bool = False, undecided: bool = False) -> Survey:
        survey = SurveyBuilder(keep_no_caption, undecided)
        for file in self.files:
            with _opened(file) as parquet:
                row = 0
                for batch in parquet.iter_batches(columns=["caption", "label_0"]):
                    captions = captions_of(batch["caption"], f"input {file}", row)
                    for caption, label in zip(captions, batch["label_0"].to_pylist(), strict=True):
                        survey.add(caption, label_of(label))
                    row += len(captions)
        return survey.finish()

    def read(self, rows: np.ndarray) -> Iterator[PairRow]:
        for file, groups in zip(self.files, self.groups, strict=True):
            file_rows = rows[(rows >= groups[0]) & (rows < groups[-1])]
            if not len(file_rows):
                continue
            with _opened(file) as parquet:
                columns = [*COLUMNS, *(name for name in PROVENANCE if name in parquet.schema_arrow.names)]
                for number in np.unique(np.searchsorted(groups, file_rows, side="right") - 1).tolist():
                    wanted = set(file_rows[(file_rows >= groups[number]) & (file_rows < groups[number + 1])].tolist())
                    row = int(groups[number])
                    for batch in parquet.iter_batches(batch_size=BATCH, row_groups=[number], columns=columns):
                        inside = [index for index in range(len(batch)) if row + index in wanted]
                        for index in inside:
                            values = {name: batch[name][index].as_py() for name in columns}
                            yield pair_row(row + index, f"{encodable(Path(file).name)}:{row + index - int(groups[0])}", values)
                        row += len(batch)
                        if row > max(wanted):
                            break


def pair_row(row: int, source: str, values: dict[str, Any]) -> PairRow:
    """Return a decided row of Pick-a-Pic's columns as a pair, winner first. A row without a caption gets the empty one.

    Args:
        row: number of the row, counted through all files.
        source: name of the row for messages.
        values: the row's cells by column.
    """
    images = tuple(_bytes(values[name]) for name in ("jpg_0", "jpg_1"))
    winner, loser = images if label_of(values["label_0"]) == 1 else images[::-1]
    kept = {name: str(values[name]) for name in PROVENANCE if values.get(name) is not None}
    return PairRow(row, source, values["caption"] or "", winner, loser, kept)


def _bytes(cell: bytes | dict | None) -> bytes | None:
    """Return the bytes of an image's cell. ``datasets`` stores an image as a record of bytes and path."""
    return cell.get("bytes") if isinstance(cell, dict) else cell


def captions_of(column: Any, where: str, first: int, name: str = "caption") -> list[str | None]:
    """Return the captions of a column.

    Args:
        column: a pyarrow column of text.
        where: name of the input for messages.
        first: number of the column's first row.
        name: what the column holds, for messages.

    Raises:
        UserError: a caption is not UTF-8, such as half a surrogate pair that the writer of the file let through.
    """
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        for row, cell in enumerate(column, first):
            try:
                cell.as_py()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}, row {row}: the {name} is not UTF-8 text: {error.object[:40]!r}") from None
        raise


def find_files(name: str) -> list[str]:
    """Return the files that a path, a glob or the URL of either names, in order.

    A folder stands for all parquet files below it. A name is a glob only if no file or folder of exactly this name
    exists.

    Raises:
        UserError: no file matches, or the URL cannot be read.
    """
    if "://" in name:
        fs, root = filesystem(name, "input")
        try:
            files = sorted(fs.glob(root)) if glob.has_magic(root) and not fs.exists(root) else [root]
        except Exception as error:  # every driver raises its own exceptions
            raise UserError(f"input {name}: not readable: {type(error).__name__} {' '.join(str(error).split())}") from None
        files = [path if "://" in path else fs.unstrip_protocol(path) for path in files]
    elif glob.has_magic(name) and not Path(name).exists():
        files = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (absolute patterns)
    else:
        files = [name]
    files = [file for path in files for file in (_parquet_below(path) if Path(path).is_dir() else [path])]
    if not files and Path(name).is_dir():
        raise UserError(f"input {name}: holds no pairs.jsonl, no parquet file and no data set that `datasets` saved")
    if not files:
        raise UserError(f"input {name}: no file matches")
    return files


def _parquet_below(folder: str) -> list[str]:
    pattern = str(Path(glob.escape(folder)) / "**" / "*.parquet")
    return sorted(path for path in glob.glob(pattern, recursive=True) if not Path(path).is_dir())  # noqa: PTH207 (leaves out hidden ones)


@contextlib.contextmanager
def _opened(file: str):
    """Open a parquet file. Any failure of its bytes or of the network while it is read becomes a one-line error."""
    import pyarrow as pa

    opened = False
    try:
        with _open(file) as parquet:
            opened = parquet.schema_arrow is not None
            yield parquet
    except (UserError, AttributeError, NameError):  # an error that already has its message, or a bug
        raise
    except FileNotFoundError:
        raise UserError(
            f"input {file}: no such file; give parquet files or a quoted glob such as 'pickapic/train-*.parquet'"
        ) from None
    except Exception as error:  # from pyarrow, the file system or a remote driver, which all raise their own
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, UnicodeDecodeError):
            problem = f"a text or a column's name in it is not UTF-8: {error.object[:40]!r}"
        rest = "what is made is kept, a second run goes on"
        if not opened and isinstance(error, pa.ArrowInvalid | UnicodeDecodeError):
            rest = (
                "parquet files in Pick-a-Pic's columns, one pairs.jsonl, a folder of either or a data set for `datasets` are read; "
                "with columns or preset other tables too"
            )
        raise UserError(f"input {file}: not readable as parquet: {problem}; {rest}") from error


def _open(file: str):
    """Open a parquet file so that its column chunks are read in small pieces: a row group of images can take hundreds
    of megabytes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not is_url(file):
        if not Path(file).is_file():
            if Path(file).exists():  # a pipe or a device, which would be waited for
                raise UserError(f"input {file}: is not a regular file")
            raise FileNotFoundError(file)
        # The path is absolute because pyarrow takes `~/` for a home folder and `v2:final/` for a URL, even if such a
        # folder exists. It is bytes because pyarrow opens no text that is not UTF-8.
        return pq.ParquetFile(pa.OSFile(os.fsencode(Path(file).absolute())), buffer_size=1 << 20, pre_buffer=False)
    fs, root = filesystem(file, "input")
    return pq.ParquetFile(fs.open(root, "rb", block_size=4 << 20), pre_buffer=False)


def check_columns(file: str, schema: Any) -> None:
    """Refuse a file that lacks one of Pick-a-Pic's columns.

    Args:
        file: name of the file for messages.
        schema: its pyarrow schema.

    Raises:
        UserError: a column is missing, or its type cannot be read.
    """
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise UserError(
            f"input {file}: no column {', '.join(missing)}; Pick-a-Pic v2's {', '.join(COLUMNS)} are needed; columns or preset names others"
        )
    for name, is_kind in (("caption", _is_text), ("label_0", _is_label), ("jpg_0", _is_image), ("jpg_1", _is_image)):
        kind = schema.field(name).type
        if not is_kind(_values_of(kind)):
            raise UserError(f"input {file}: column {name} holds {kind}; Pick-a-Pic v2 has text, a number and JPEG bytes")


# Types are compared by name because older versions of pyarrow have no function that recognises views.
TEXT = ("string", "large_string", "string_view", "null")
BYTES = ("binary", "large_binary", "binary_view", "null")


def _values_of(kind: Any) -> Any:
    """Return the type of a column's values.

    A dictionary column (pandas categories) stores each distinct value once and numbers them.
    """
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    return str(kind) in TEXT


def _is_label(kind: Any) -> bool:
    import pyarrow as pa

    numbers = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_decimal)
    return _is_text(kind) or any(is_number(kind) for is_number in numbers)


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):  # as `datasets` stores an image
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return str(kind) in BYTES or pa.types.is_fixed_size_binary(kind)


def _footer_digest(metadata: Any) -> str:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    metadata.write_metadata_file(sink)
    return hashlib.sha256(sink.getvalue()).hexdigest()
