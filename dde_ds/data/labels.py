"""Read the labels that scorers gave to the pairs of an input, and read the pairs with these labels.

    {"format": "dde_ds labels 1", "input": [...], "reading": {}, "scorers": {"pickscore": "<sha256>"}, "rows": 2}
    {"row": 0, "source": "train.parquet:0", "scores": {"pickscore": [21.3, 20.1]}}
    {"row": 1, "source": "train.parquet:1", "reason": "missing image"}

The two scores of a row belong to its pictures in the input's order, the input's winner first. ``input`` is the identity of the input.
Labels of another input are refused.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dde_ds.data.pairs import TIE, PairRow, PairSource, Survey, has_soft_labels, reading_of
from dde_ds.data.table_pairs import BELOW_MARGIN
from dde_ds.errors import UserError, nearest
from dde_ds.untrusted import JSON_BYTES, open_regular, parse_json
from dde_ds.warn import reason

FORMAT = "dde_ds labels 1"
HOW = ("winner", "agree", "soft")
"""How to use the labels: take the scorers' winner, keep only pairs where scorers and people agree, or take the winner with a soft label."""
DISAGREE, AGAINST_PEOPLE, NO_SCORE = "scorers disagree", "scorers and people disagree", "no score"
TURNED = "winner by the scorers alone"


def header_of(source: PairSource, scorers: dict[str, str], rows: int) -> dict:
    """Return the first line of the labels of a source.

    Args:
        source: the labelled input.
        scorers: the digest of each scorer by its name.
        rows: the number of labelled pairs.
    """
    # The margin is left out, because it only excludes pairs and changes none.
    reading = {key: value for key, value in reading_of(source).items() if key != "min_margin"}
    return {"format": FORMAT, "input": source.identity, "reading": reading, "scorers": scorers, "rows": rows}


def read_lines(file: io.BufferedReader, where: str) -> Iterator[dict]:
    """Yield the rows after the first line of an opened file of labels. Skip a last line that a kill cut short.

    Raises:
        UserError: a line is damaged.
    """
    for number, line in enumerate(file, 2):
        if not line.endswith(b"\n"):
            return
        try:
            row = parse_json(line)
            scores = row.get("scores", {})
            pairs = [score for pair in scores.values() for score in pair]
            if (
                type(row["row"]) is not int
                or not all(isinstance(score, float | int) for score in pairs)
                or len(pairs) != 2 * len(scores)
            ):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{where}, line {number}: no row of labels: {line[:80]!r}") from None
        yield row


def read_header(file: io.BufferedReader, where: str) -> dict:
    """Return the first line of an opened file of labels.

    Raises:
        UserError: the file is not a file of labels.
    """
    try:
        header = parse_json(file.readline(JSON_BYTES))
        if header["format"] != FORMAT or not isinstance(header["input"], list) or not isinstance(header["scorers"], dict):
            raise ValueError
        if type(header["rows"]) is not int or not isinstance(header["reading"], dict):
            raise ValueError
        return header
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: is no file of labels, or one of another version; relabel writes them") from None


class LabelledPairs:
    """The pairs of a source with the labels of scorers.

    Args:
        source: the scored input.
        path: the source's ``labels.jsonl``.
        how: one of :data:`HOW`. Several scorers have to agree on a winner. Their soft labels are averaged.
        min_margin: for soft labels, the least difference between the winner's and the loser's share.

    Raises:
        UserError: an option is invalid, the file of labels is incomplete, or the labels belong to another input.
    """

    def __init__(self, source: PairSource, path: Path, how: str = "winner", min_margin: float | None = None):
        if how not in HOW:
            raise UserError(f"labels_as {how!r}{nearest(how, HOW)}")
        if min_margin is not None and not 0 <= min_margin <= 1:
            raise UserError(f"min_margin {min_margin}: must be 0 to 1, the difference of the two shares")
        self.source, self._how, self._margin = source, how, min_margin or 0.0
        self.identity = source.identity
        self.soft = how == "soft" or (how == "agree" and has_soft_labels(source))
        self._rows, self._scores, self._failed, digest = _read(path, source)
        labels = {"name": path.name, "as": how, "sha256": digest}
        self.reading = {**reading_of(source), "labels": labels, **({"min_margin": self._margin} if self._margin else {})}

    def name(self, row: int) -> str:
        return self.source.name(row)

    def survey(self, keep_no_caption: bool = False, undecided: bool = False) -> Survey:
        people = self.source.survey(keep_no_caption)
        every = self.source.survey(keep_no_caption, undecided=True)
        decided = np.isin(every.rows, people.rows)
        excluded = dict(every.excluded)
        kept, turned = np.zeros(len(every.rows), bool), 0
        for place, row in enumerate(every.rows.tolist()):
            sign, why = self._verdict(row)
            if self._how == "agree" and why is None:
                why = people.excluded[row] if not decided[place] else AGAINST_PEOPLE if sign < 0 else None
            kept[place] = why is None
            turned += why is None and (sign < 0 or not decided[place])
            if why is not None:
                excluded[row] = why
        used, caption_of = np.unique(every.caption_of[kept], return_inverse=True)
        captions = [every.captions[number] for number in used]
        noted = {**every.noted, TURNED: turned}
        return Survey(captions, caption_of.astype(np.int32), every.rows[kept], excluded, noted)

    def read(self, rows: np.ndarray) -> Iterator[PairRow]:
        for pair in self.source.read(rows):
            sign, _ = self._verdict(pair.row)
            share = self._share(pair.row) if self._how == "soft" else None
            if self._how == "agree":
                share = pair.soft_label
            elif share is not None:
                share = max(share, 1 - share)
            if sign < 0:
                paths = {"winner": pair.provenance.get("loser"), "loser": pair.provenance.get("winner")}
                kept = {**pair.provenance, **{role: path for role, path in paths.items() if path is not None}}
                pair = replace(pair, winner=pair.loser, loser=pair.winner, provenance=kept)
            yield replace(pair, soft_label=share)

    def _verdict(self, row: int) -> tuple[int, str | None]:
        """Return 1 if the scorers prefer the first picture, or -1 for the second, and the reason to exclude the pair, or None."""
        gains = self._gains(row)
        if gains is None:
            return 1, self._failed.get(row, NO_SCORE)
        if self._how == "soft":
            share = self._share(row)
            why = TIE if share == 0.5 else BELOW_MARGIN if abs(2 * share - 1) < self._margin else None
            return 1 if share >= 0.5 else -1, why
        if (gains == 0).all():
            return 1, TIE
        if not ((gains > 0).all() or (gains < 0).all()):
            return 1, DISAGREE
        return 1 if gains[0] > 0 else -1, None

    def _share(self, row: int) -> float:
        """Return the probability that the first picture is preferred.

        This is the mean over the scorers of σ(first score − second score), by the model of Bradley and Terry.
        """
        gains = self._gains(row)
        assert gains is not None  # Only rows with scores are read.
        return float((0.5 * (1 + np.tanh(gains / 2))).mean())

    def _gains(self, row: int) -> np.ndarray | None:
        """Return each scorer's first score minus its second, (scorers,), or None for a row without scores."""
        place = int(np.searchsorted(self._rows, row))
        is_scored = place < len(self._rows) and self._rows[place] == row
        return self._scores[place, :, 0] - self._scores[place, :, 1] if is_scored else None


def _read(path: Path, source: PairSource) -> tuple[np.ndarray, np.ndarray, dict[int, str], str]:
    """Return the numbers of the scored rows, (N,), their scores, (N,scorers,2), the reasons of unscored rows, and the file's SHA-256."""
    where, digest = f"labels {path}", hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
            file.seek(0)
            header = read_header(file, where)
            _check_header(header, source, where)
            rows, failed = np.empty(header["rows"], np.int64), {}
            scores = np.empty((header["rows"], len(header["scorers"]), 2))
            count = 0
            for line in read_lines(file, where):
                if "scores" not in line:
                    failed[line["row"]] = str(line.get("reason", NO_SCORE)).partition(":")[0]
                elif (
                    count < len(rows)
                    and list(line["scores"]) == list(header["scorers"])
                    and np.isfinite(list(line["scores"].values())).all()
                ):
                    rows[count], scores[count] = line["row"], list(line["scores"].values())
                    count += 1
                else:
                    raise UserError(
                        f"{where}: row {line['row']} has not one finite pair of scores for each scorer of the first line"
                    )
    except OSError as error:
        raise UserError(f"{where}: not readable: {reason(error).lower()}") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: {error}") from None
    if count + len(failed) != header["rows"] or (np.diff(rows[:count]) <= 0).any():
        raise UserError(
            f"{where}: holds {count + len(failed)} of its {header['rows']} rows, each once and in order; relabel makes it whole"
        )
    return rows[:count], scores[:count], failed, digest.hexdigest()


def _check_header(header: dict[str, Any], source: PairSource, where: str) -> None:
    expected = header_of(source, {}, 0)
    if not header["scorers"]:
        raise UserError(f"{where}: names no scorer")
    if header["input"] != expected["input"]:
        names = ", ".join(str(file.get("name")) for file in header["input"][:3] if isinstance(file, dict))
        raise UserError(f"{where}: are of another input ({names}); relabel this one")
    if header["reading"] != expected["reading"]:
        raise UserError(
            f"{where}: were made with other columns or pairs ({header['reading']}, now {expected['reading']}); relabel again"
        )
