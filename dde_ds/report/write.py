"""Write one self-contained HTML page on a run folder, on a comparison, or on both. It needs no network and no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dde_ds.errors import UserError
from dde_ds.evaluation.comparison import read_comparison
from dde_ds.files import write_atomically
from dde_ds.report.comparison import comparison_sections
from dde_ds.report.page import page
from dde_ds.report.run import run_sections
from dde_ds.warn import reason


def report(sources: Sequence[Path], output: Path | None = None, pictures: int = 6) -> Path:
    """Write the page and return its path.

    Args:
        sources: run folders, folders of comparisons, or their ``comparison.json``.
        output: the path of the page. None takes ``report.html`` in the folder of the first source.
        pictures: how many images of each model are shown in each of three groups: largest gains, largest losses, and at random.

    Raises:
        UserError: a source is neither a run nor a comparison, a source cannot be read, or the page cannot be written.
    """
    sections, titles = [], []
    for source in sources:
        try:
            title, source_sections = _of_source(source, pictures)
        except OSError as error:
            raise UserError(f"report {source}: {' '.join(str(error).split())}") from None
        titles.append(title)
        sections += source_sections
    first = sources[0] if sources[0].is_dir() else sources[0].parent
    output = output or first / "report.html"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # The name of a folder may hold bytes that are no text.
        write_atomically(output, page(" and ".join(dict.fromkeys(titles)), sections).encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"output {output}: not writable: {reason(error).lower()}") from None
    return output


def _of_source(source: Path, pictures: int) -> tuple[str, list[tuple[str, str]]]:
    """Return the title and the sections of one source.

    Raises:
        UserError: the source is missing, damaged, or neither a run nor a comparison.
        OSError: a file of the source cannot be read.
    """
    is_run = any((source / name).is_file() for name in ("metrics.jsonl", "config.yaml"))
    is_comparison = source.name == "comparison.json" or (source / "comparison.json").is_file()
    if not source.exists():
        raise UserError(f"report {source}: no such file or folder")
    if not (is_run or is_comparison):
        raise UserError(f"report {source}: neither a run folder (metrics.jsonl, config.yaml) nor a comparison (comparison.json)")
    sections = run_sections(source) if is_run else []
    if is_comparison:
        folder = source if source.is_dir() else source.parent
        sections += comparison_sections(read_comparison(source), folder, pictures)
    return source.resolve().name if source.is_dir() else source.resolve().parent.name, sections
