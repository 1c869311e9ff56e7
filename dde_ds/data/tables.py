"""Read tables of many kinds row by row: parquet, Arrow, CSV, JSON, JSON lines, and folders that ``datasets`` saved.

A :class:`Table` yields chosen columns of all rows, or of rows with given numbers, as dictionaries of plain values. Memory holds only a few
rows at a time. A parquet or Arrow file is read in batches. A text file is read from its start to the last requested row.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dde_ds.data.hub import load_dataset
from dde_ds.data.pickapic import BATCH, _footer_digest, _opened, captions_of, find_files
from dde_ds.data.storage import filesystem, is_url
from dde_ds.errors import UserError
from dde_ds.untrusted import JSON_BYTES, open_regular, parse_json
from dde_ds.warn import reason

# Number of characters that are read at a time from a .json file, and bytes at a time for a digest.
CHUNK = 1 << 20
Row = dict[str, Any]


class Table(Protocol):
    """Rows of named columns. Rows can be read again by number."""

    file: str
    """Path or URL."""
    name: str
    """The table's name in messages, which name a row as ``name:row``."""
    rows: int
    columns: list[str]
    wide: frozenset[str]
    """The columns that hold bytes. A scan of these columns would read the pictures."""
    identity: dict
    """The identity of the table's content. Different contents have different identities."""

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        """Yield all rows, in order."""
        ...

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
        """Yield the number and the row for each of these ascending row numbers."""
        ...


def open_tables(inputs: Sequence[str]) -> list[Table]:
    """Return the tables of paths, globs, folders and URLs.

    Raises:
        UserError: an input does not exist, a file is of an unknown kind, or its content is not what its suffix says.
    """
    return [_open_table(file) for name in inputs for file in _files(name)]


def _files(name: str) -> list[str]:
    if not Path(name).is_dir():
        return find_files(name)
    paths = sorted(path for path in Path(name).rglob("*") if path.suffix.lower() in READERS and path.is_file())
    files = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(name).parts)]
    kinds = sorted({path.suffix.lower() for path in files})
    if len(kinds) != 1:
        content = f"files of {' and '.join(kinds)}; name those that are meant" if kinds else f"no file of {', '.join(READERS)}"
        raise UserError(f"input {name}: holds {content}")
    return [str(path) for path in files]


def _open_table(file: str) -> Table:
    suffix = Path(file).suffix.lower()
    if suffix not in READERS:
        raise UserError(f"input {file}: its name ends in none of {', '.join(READERS)}")
    return READERS[suffix](file)


class ParquetTable:
    """A parquet file, by path or URL. ``take`` reads only the row groups that hold the requested rows."""

    def __init__(self, file: str):
        self.file, self.name = file, Path(file).name
        with _opened(file) as parquet:
            metadata = parquet.metadata
            self.rows, self.columns = metadata.num_rows, list(parquet.schema_arrow.names)
            self.wide = _wide(parquet.schema_arrow)
            sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            self.identity = {"name": self.name, "rows": self.rows, "footer": _footer_digest(metadata)}
        self._groups = np.cumsum([0, *sizes])

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        with _opened(self.file) as parquet:
            row = 0
            for batch in parquet.iter_batches(batch_size=1024, columns=list(columns)):
                yield from _records(batch, columns, self.file, row)
                row += len(batch)

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
        with _opened(self.file) as parquet:
            for number in np.unique(np.searchsorted(self._groups, rows, side="right") - 1).tolist():
                low, high = self._groups[number], self._groups[number + 1]
                wanted = rows[(rows >= low) & (rows < high)]
                batches = parquet.iter_batches(batch_size=BATCH, row_groups=[number], columns=list(columns))
                yield from _wanted(batches, int(low), wanted, columns, self.file)


class ArrowTable:
    """An Arrow file, such as Feather, or an Arrow stream, which ``datasets`` writes."""

    def __init__(self, file: str):
        self.file, self.name = file, Path(file).name
        _refuse_url(file)
        digest = hashlib.sha256()
        self.rows = 0
        with self._opened() as (schema, batches):
            self.columns, self.wide = list(schema.names), _wide(schema)
            narrow = [name for name in self.columns if name not in self.wide]
            digest.update(str(schema).encode())
            for batch in batches:
                # Hash the size of the batch but not the pictures: hashing all of them at each start would take longer than many runs.
                digest.update(f"{batch.num_rows} {batch.nbytes}\n".encode())
                for name in narrow:
                    digest.update(repr(captions_of(batch[name], f"input {file}", self.rows, name)).encode())
                self.rows += batch.num_rows
        self.identity = {"name": self.name, "rows": self.rows, "bytes": Path(file).stat().st_size, "cells": digest.hexdigest()}

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Iterator[Any]]]:
        import pyarrow as pa

        try:
            with open_regular(self.file), pa.memory_map(str(Path(self.file).absolute())) as source:
                try:
                    reader = pa.ipc.open_file(source)
                    yield reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
                except pa.ArrowInvalid:
                    source.seek(0)
                    reader = pa.ipc.open_stream(source)
                    yield reader.schema, iter(reader)
        except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these.
            raise _unreadable(self.file, "Arrow", error) from None

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        with self._opened() as (_, batches):
            row = 0
            for batch in batches:
                yield from _records(batch.select(list(columns)), columns, self.file, row)
                row += len(batch)

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
        with self._opened() as (_, batches):
            yield from _wanted((batch.select(list(columns)) for batch in batches), 0, rows, columns, self.file)


class HubTable:
    """A data set that ``datasets`` reads, from the hub by name or from a folder that ``datasets`` saved."""

    file = ""

    def __init__(self, name: str, split: str):
        dataset = load_dataset(name, split)
        name = f"{name.rstrip('/').rpartition('/')[2]}/{split}"
        self.name, self.rows, self.columns = name, len(dataset), list(dataset.column_names)
        self.wide = _wide(dataset.features.arrow_schema)
        self._found = dataset.with_format("arrow")
        self.identity = {"name": name, "rows": len(dataset), "fingerprint": dataset._fingerprint}

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        row = 0
        for table in self._found.select_columns(list(columns)).iter(batch_size=1024):
            yield from _records(table, columns, self.name, row)
            row += len(table)

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
        dataset = self._found.select_columns(list(columns))
        for low in range(0, len(rows), BATCH):
            wanted = rows[low : low + BATCH].tolist()
            yield from zip(wanted, dataset[wanted].to_pylist(), strict=True)


class TextTable:
    """A text file, by path or URL, that is read record by record: CSV, JSON, JSON lines.

    Args:
        file: path or URL.
        kind: the name of the format in messages.
        records: a function that yields the records of an opened text. Its second argument is the file's name in messages.
    """

    def __init__(self, file: str, kind: str, records: Callable[[io.TextIOBase, str], Iterator[Row]]):
        self.file, self.name, self._kind, self._parse = file, Path(file).name, kind, records
        self.rows, self.wide = 0, frozenset()
        columns: dict[str, None] = {}  # A set that keeps its order.
        for record in self._records():
            columns.update(dict.fromkeys(record))
            self.rows += 1
        self.columns = list(columns)
        self.identity = {"name": self.name, "rows": self.rows, "sha256": self._digest()}

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        for record in self._records():
            yield {name: record.get(name) for name in columns}

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
        wanted = iter(rows.tolist())
        coming = next(wanted, None)
        for row, record in enumerate(self._records()):
            if coming is None:
                return
            if row == coming:
                yield row, {name: record.get(name) for name in columns}
                coming = next(wanted, None)

    def _records(self) -> Iterator[Row]:
        try:
            with self._bytes() as data:
                yield from self._parse(io.TextIOWrapper(data, encoding="utf-8-sig", newline=""), f"input {self.file}")
        except UnicodeDecodeError as error:
            raise UserError(f"input {self.file}: not UTF-8 text: byte {error.object[error.start]:#04x}") from None
        except UserError:
            raise
        except (OSError, ValueError, csv.Error) as error:
            raise _unreadable(self.file, self._kind, error) from None

    def _bytes(self) -> Any:
        if is_url(self.file):
            fs, root = filesystem(self.file, "input")
            return fs.open(root, "rb")
        return open_regular(self.file)

    def _digest(self) -> str:
        digest = hashlib.sha256()
        with self._bytes() as data:
            while block := data.read(CHUNK):
                digest.update(block)
        return digest.hexdigest()


def csv_records(text: io.TextIOBase, where: str) -> Iterator[Row]:
    """Yield the rows of comma-separated values below a line of column names. An empty cell becomes None."""
    reader = csv.DictReader(text, strict=True)
    for record in reader:
        if None in record or None in record.values():
            raise UserError(f"{where}, line {reader.line_num}: has not as many values as the first line has names")
        yield {name: value or None for name, value in record.items()}


def lines_records(text: io.TextIOBase, where: str) -> Iterator[Row]:
    """Yield the objects of JSON lines. Skip blank lines."""
    for number, line in enumerate(text, 1):
        if line.strip():
            yield _object(line, f"{where}, line {number}")


def json_records(text: io.TextIOBase, where: str) -> Iterator[Row]:
    """Yield the objects of one JSON array. A text that does not begin with ``[`` is read as JSON lines.

    Memory holds only the object being read and one chunk of text.
    """
    buffer = text.read(CHUNK).lstrip()
    if not buffer.startswith("["):
        yield from lines_records(_Rest(buffer, text), where)
        return
    decoder, at, number = json.JSONDecoder(), 1, 0
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,":
            at += 1
        if at < len(buffer) and buffer[at] == "]":
            if (buffer[at + 1 :] + text.read(CHUNK)).strip():
                raise UserError(f"{where}: goes on behind the end of its array")
            return
        try:
            if at == len(buffer):
                raise ValueError("the array has no end")
            _, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            more = text.read(CHUNK) if len(buffer) - at <= JSON_BYTES else ""
            if not more:
                raise UserError(f"{where}, record {number}: {reason(error)}") from None
            buffer, at = buffer[at:] + more, 0
            continue
        yield _object(buffer[at:end], f"{where}, record {number}")
        at, number = end, number + 1


class _Rest(io.TextIOBase):
    """The lines of a text whose beginning has already been read."""

    def __init__(self, begun: str, text: io.TextIOBase):
        self._lines = (begun + text.readline()).splitlines(keepends=True)
        self._text = text

    def __iter__(self):
        yield from self._lines
        yield from self._text


def _object(data: str, where: str) -> Row:
    try:
        record = parse_json(data)
    except ValueError as error:
        raise UserError(f"{where}: no JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, found {data[:40]!r}")
    return record


READERS: dict[str, Callable[[str], Table]] = {
    ".parquet": ParquetTable,
    ".arrow": ArrowTable,
    ".feather": ArrowTable,
    ".csv": lambda file: TextTable(file, "CSV", csv_records),
    ".json": lambda file: TextTable(file, "JSON", json_records),
    ".jsonl": lambda file: TextTable(file, "JSON lines", lines_records),
}


def _wide(schema: Any) -> frozenset[str]:
    return frozenset(field.name for field in schema if "binary" in str(field.type))


def _records(batch: Any, columns: Sequence[str], where: str, first: int) -> Iterator[Row]:
    """Yield the rows of an Arrow batch or table as plain values. ``first`` is the number of the first row, for messages."""
    values = [captions_of(batch[name], f"input {where}", first, name) for name in columns]
    for cells in zip(*values, strict=True):
        yield dict(zip(columns, cells, strict=True))


def _wanted(batches: Iterator[Any], first: int, rows: np.ndarray, columns: Sequence[str], where: str) -> Iterator[tuple[int, Row]]:
    """Yield the number and the row for each of these row numbers, from consecutive batches. The first batch begins at row ``first``."""
    for batch in batches:
        inside = rows[(rows >= first) & (rows < first + len(batch))]
        for row in inside.tolist():
            yield row, next(_records(batch.slice(row - first, 1), columns, where, row))
        first += len(batch)
        if first > rows[-1]:
            return


def _refuse_url(file: str) -> None:
    if is_url(file):
        raise UserError(f"input {file}: only parquet, CSV and JSON are read from a URL; download it first")


def _unreadable(file: str, kind: str, error: Exception) -> UserError:
    return UserError(f"input {file}: not readable as {kind}: {' '.join(str(error).split())[:300] or type(error).__name__}")
