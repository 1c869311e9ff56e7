"""Read prompts from a text file, from JSON lines, or from parquet in Pick-a-Pic's columns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from dde_ds.data.pickapic import captions_of
from dde_ds.errors import UserError
from dde_ds.untrusted import parse_json, read_regular
from dde_ds.warn import reason

# Names of the prompt's column in a parquet file, or of its key in JSON lines. The first name that is there is taken.
COLUMNS = ("caption", "prompt", "text")


def read_prompts(path: str | Path, limit: int | None = None) -> tuple[list[str], int]:
    """Return the distinct prompts of a file in the order of their first places, and the number of repetitions left out.

    A repeated prompt would give the same images again, since an image is a function of (seed, prompt, image index).

    Args:
        path: ``.txt``: one prompt a line, blank lines skipped. ``.jsonl``: one object (or string) a line. ``.parquet``: Pick-a-Pic.
        limit: keep only this many distinct prompts, the first ones.

    Raises:
        UserError: the file is missing, unreadable or without such a column; a prompt is empty or holds half a surrogate pair; or
            there is no prompt at all.
    """
    path = Path(path)
    readers = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UserError(f"prompts {path}: unknown kind of file {path.suffix!r}; expected {', '.join(readers)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: must be 1 or more")
    if not path.is_file():
        raise UserError(f"prompts {path}: {'is not a regular file' if path.exists() else 'no such file'}")
    prompts: dict[str, None] = {}
    repeated = 0
    for place, prompt in readers[path.suffix](path):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"prompts {path}, {place}: the prompt is {prompt!r}, expected text")
        if prompt in prompts:
            repeated += 1
        elif limit is None or len(prompts) < limit:
            prompts[prompt] = None
    if not prompts:
        raise UserError(f"prompts {path}: holds no prompt")
    return list(prompts), repeated


def _text(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield f"line {number}", line.strip()


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError:
            raise UserError(f"prompts {path}, line {number}: not valid JSON: {line[:80]!r}") from None
        except ValueError as error:
            raise UserError(f"prompts {path}, line {number}: {error}") from None
        if isinstance(row, dict):
            column = next((name for name in COLUMNS if name in row), None)
            if column is None:
                raise UserError(f"prompts {path}, line {number}: no key {' or '.join(COLUMNS)}; found {', '.join(map(str, row))}")
            row = row[column]
        yield f"line {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"prompts {path}: pyarrow is not installed, which reads parquet: pip install -e '.[shard]'") from None
    try:
        file = pq.ParquetFile(path.absolute())  # pyarrow would take `~/` for a home and `v2:final/` for a URL
        names = file.schema_arrow.names
        column = next((name for name in COLUMNS if name in names), None)
        if column is None:
            raise UserError(f"prompts {path}: no column {' or '.join(COLUMNS)}; found {', '.join(names)}")
        row = 0
        for batch in file.iter_batches(columns=[column]):
            for prompt in captions_of(batch[column], f"prompts {path}", row):
                yield f"row {row}", prompt
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"prompts {path}: not readable as parquet: {' '.join(str(error).split())[:300]}") from None


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines(): a prompt may hold a form feed or U+2028, and neither ends a line in these formats.
        return read_regular(path).decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise UserError(f"prompts {path}: not readable: {reason(error).lower()}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"prompts {path}, line {line}: not UTF-8 at byte {error.start}") from None
