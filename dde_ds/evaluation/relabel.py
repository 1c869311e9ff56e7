"""Score both pictures of every pair of an input, on any number of ranks, and write the scores to one file of labels.

Each rank appends its rows to ``labels.jsonl.parts/RANK.jsonl`` batch by batch. A second run, on any number of ranks, scores only the rows
that are missing there. Once all rows are scored, the first rank writes ``labels.jsonl`` in the order of the rows and deletes the parts.
:mod:`dde_ds.data.labels` describes the file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dde_ds.data.labels import header_of, read_header, read_lines
from dde_ds.data.pairs import PairRow, PairSource
from dde_ds.distributed.collectives import barrier
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.errors import RankError, UserError
from dde_ds.evaluation.inception import InceptionScorer
from dde_ds.evaluation.scorers import Scorer
from dde_ds.evaluation.scoring import full_float32
from dde_ds.files import put_in_place, staged_path, write_atomically
from dde_ds.models.encode import decode_image
from dde_ds.untrusted import open_regular


@full_float32()
def relabel(
    source: PairSource,
    output: Path,
    scorers: Sequence[Scorer | InceptionScorer],
    ranks: DistributedEnv,
    device: torch.device,
    batch: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict | None:
    """Score the pairs that have no scores yet. Collective.

    Ties and rows without a label are scored too. Rows without a caption are not.

    Args:
        source: the input.
        output: the file of labels.
        scorers: the scorers, each of which scores single pictures.
        ranks: this rank and the number of ranks.
        device: the device for the barriers.
        batch: number of pairs that are scored at a time.
        on_progress: called with the number of pairs done and the number of all pairs of this rank.

    Returns:
        On the first rank, a summary; on other ranks, None. ``rows`` counts the rows by reason. ``decided`` counts the scored pairs that
        people decided. ``agree`` counts, by scorer, the decided pairs on which the scorer agrees with people.

    Raises:
        UserError: the output belongs to another input or to other scorers, no pair can be scored, or a scorer scores only sets of pictures.
        RankError: a score is not a finite number. The message names the picture.
    """
    judges = [scorer for scorer in scorers if not isinstance(scorer, InceptionScorer)]
    if len(judges) < len(scorers):
        raise UserError("scorer inception: scores a set of pictures, not one; leave it out")
    survey = source.survey(undecided=True)
    if not len(survey.rows):
        raise UserError(f"input: no pair to score ({dict(survey.counts)})")
    header = header_of(source, {scorer.name: scorer.digest for scorer in judges}, len(survey.rows))
    parts = output.with_name(f"{output.name}.parts")
    whole = output.exists()
    if whole:
        _require_same(output, header)
    else:
        missing = np.setdiff1d(survey.rows, _known(parts, header))
        barrier(ranks, device)  # All ranks read the existing parts before any rank writes.
        rank_rows = missing[len(missing) * ranks.rank // ranks.world_size : len(missing) * (ranks.rank + 1) // ranks.world_size]
        _score(source, rank_rows, judges, parts / f"{ranks.rank:05d}.jsonl", header, batch, on_progress)
    barrier(ranks, device)
    if not ranks.is_main:
        return None
    if not whole:
        _merge(parts, output, header)
    return _summary(output, source)


def _require_same(path: Path, header: dict) -> None:
    with open_regular(path) as file:
        before = read_header(file, f"output {path}")
    differing = [key for key in header if before.get(key) != header[key]]
    if differing:
        what = {"input": "another input", "reading": "other columns or pairs", "scorers": "other scorers"}.get(
            differing[0], "other rows"
        )
        raise UserError(f"output {path}: was begun with {what}; choose another file or delete this one")


def _known(parts: Path, header: dict) -> np.ndarray:
    """Return the numbers of the rows that earlier runs have scored or excluded."""
    known = [np.empty(0, np.int64)]
    for path in sorted(parts.glob("*.jsonl")):
        _require_same(path, header)
        known.append(np.fromiter((row["row"] for row, _ in _rows(path)), np.int64))
    return np.concatenate(known)


def _rows(path: Path) -> Iterator[tuple[dict, int]]:
    """Yield each row of a part, and the offset in the file at which the row begins."""
    with open_regular(path) as file:
        read_header(file, str(path))
        places = _Counting(file)
        for row in read_lines(places, str(path)):  # pyright: ignore[reportArgumentType]  # read_lines only iterates over the lines.
            yield row, places.start


class _Counting:
    """The lines of a file, and the offset at which the last line began."""

    def __init__(self, file):
        self._file, self.start, self._next = file, 0, file.tell()

    def __iter__(self) -> Iterator[bytes]:
        for line in self._file:
            self.start, self._next = self._next, self._next + len(line)
            yield line


def _score(source, rows: np.ndarray, scorers, path: Path, header: dict, batch: int, on_progress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = list(_rows(path)) if path.exists() else []
    # Write the file anew, to drop a last line that was cut short.
    write_atomically(path, b"".join(map(_line, [header, *(row for row, _ in kept)])))
    del kept
    with path.open("ab") as file, ThreadPoolExecutor(max_workers=8) as decoders:
        done = 0
        for pairs in _chunks(source.read(rows), batch):
            both = list(decoders.map(_decoded, (data for pair in pairs for data in (pair.winner, pair.loser))))
            decoded = [(pair, both[2 * number : 2 * number + 2]) for number, pair in enumerate(pairs)]
            scored = [(pair, whole) for pair, images in decoded if len(whole := [i for i in images if not isinstance(i, str)]) == 2]
            scores = {pair.row: row for (pair, _), row in zip(scored, _scores(scored, scorers), strict=True)}
            for pair, images in decoded:
                row = {"row": pair.row, "source": pair.source}
                if pair.row in scores:
                    row["scores"] = scores[pair.row]
                else:
                    row["reason"] = next(image for image in images if isinstance(image, str))
                file.write(_line(row))
            file.flush()
            done += len(pairs)
            on_progress(done, len(rows))


def _scores(pairs: list[tuple[PairRow, list[Image.Image]]], scorers: Sequence[Scorer]) -> list[dict[str, list[float]]]:
    """Return, for each pair, the scores of both pictures by scorer."""
    images = [image for _, both in pairs for image in both]
    prompts = [pair.caption for pair, _ in pairs for _ in range(2)]
    pair_scores: list[dict[str, list[float]]] = [{} for _ in pairs]
    for scorer in scorers if pairs else ():
        scores = scorer.score(images, prompts).tolist()
        for number, (pair, _) in enumerate(pairs):
            pair_scores[number][scorer.name] = scores[2 * number : 2 * number + 2]
            for picture, score in zip(("winner", "loser"), pair_scores[number][scorer.name], strict=True):
                if not math.isfinite(score):
                    raise RankError(
                        f"scorer {scorer.name}: gives {score} for the {picture} of {pair.source} ({pair.caption[:60]!r})"
                    )
    return pair_scores


def _chunks(pairs: Iterator[PairRow], size: int) -> Iterator[list[PairRow]]:
    chunk = []
    for pair in pairs:
        chunk.append(pair)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _decoded(data: bytes | None) -> Image.Image | str:
    """Return the picture, or the reason why it is unusable."""
    if data is None:
        return "missing image"
    try:
        return decode_image(data)
    except ValueError as error:
        return str(error)


def _merge(parts: Path, output: Path, header: dict) -> None:
    """Write the rows of all parts in order. Memory holds the place of each row, in 24 bytes a row."""
    paths = sorted(parts.glob("*.jsonl"))
    places = [(row["row"], number, start) for number, path in enumerate(paths) for row, start in _rows(path)]
    table = np.array(places, np.int64).reshape(-1, 3)
    table = table[np.unique(table[:, 0], return_index=True)[1]]
    staged = staged_path(output)
    files = [open_regular(path) for path in paths]
    try:
        with staged.open("wb") as merged:
            merged.write(_line(header))
            for _, number, start in table.tolist():
                files[number].seek(start)
                merged.write(files[number].readline())
    finally:
        for file in files:
            file.close()
    if len(table) != header["rows"]:
        raise UserError(f"output {output}: {len(table)} of {header['rows']} rows are scored; start again, nothing is scored twice")
    put_in_place(staged, output)
    shutil.rmtree(parts, ignore_errors=True)


def _summary(output: Path, source: PairSource) -> dict:
    decided = source.survey().rows
    reasons, agree, common = Counter(), Counter(), 0
    with open_regular(output) as file:
        names = list(read_header(file, str(output))["scorers"])
        for row in read_lines(file, str(output)):
            reasons[row["reason"].partition(":")[0] if "reason" in row else "scored"] += 1
            place = int(np.searchsorted(decided, row["row"]))
            if "scores" in row and place < len(decided) and decided[place] == row["row"]:
                common += 1
                agree.update(name for name in names if row["scores"][name][0] > row["scores"][name][1])
    return {"rows": dict(reasons), "decided": common, "agree": {name: agree[name] for name in names}}


def _line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
