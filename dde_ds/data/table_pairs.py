"""Read preference pairs from tables of any columns. Labels, votes and rankings become pairs, winner first.

A pair of a row of two pictures has the row's number. Pairs of rankings are numbered consecutively. ``file:3/0>2`` names the pair of row 3
in which picture 0 is better than picture 2. ``file:3>5`` names the pair in which the picture of row 3 is better than that of row 5.
"""

from __future__ import annotations

import itertools
import math
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dde_ds.data.columns import PAIRS, check_shape, choose_columns
from dde_ds.data.image_files import ImageFiles
from dde_ds.data.pairs import DECIDED, NO_LABEL, TIE, PairRow, Survey, SurveyBuilder, label_of
from dde_ds.data.pickapic import PROVENANCE
from dde_ds.data.tables import Row, Table
from dde_ds.errors import UserError, nearest
from dde_ds.untrusted import parse_json

NO_TEXT = "caption is no text"
BELOW_MARGIN = "below the margin"
AGAINST = "votes against the winner"
LENGTHS = "not as many {} as pictures"
OTHER_CAPTION = "caption differs in its group"
ALONE = "one picture alone"
RANKED = "pairs of rankings"


class Excluded(Exception):
    """The reason why a row gives no pair."""


class TablePairs:
    """The preference pairs of tables.

    Args:
        tables: tables with the same columns.
        columns: the column of each role, from :func:`~dde_ds.data.columns.choose_columns`.
        images: for each table, the pictures that its cells name by a path.
        pairs: the pairs to take from a ranking, one of :data:`~dde_ds.data.columns.PAIRS`.
        min_margin: the least difference, in [0, 1], between the winner's and the loser's share of the votes.

    Raises:
        UserError: an option has no meaning for these columns, or a value is out of range.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        columns: dict[str, str],
        images: Sequence[ImageFiles],
        pairs: str | None = None,
        min_margin: float | None = None,
    ):
        self.tables, self.columns, self.images = list(tables), columns, list(images)
        self._shape = check_shape(columns)
        self.is_ranking = self._shape in (("images",), ("image",))
        self.soft = any(role in columns for role in ("votes_0", "votes", "preference_0"))
        """True if every pair has a soft label."""
        _check_options(self.is_ranking, self.soft, pairs, min_margin)
        self.pairs, self.min_margin = pairs or "all", min_margin or 0.0
        self.identity = [table.identity for table in self.tables]
        self.reading = {"columns": dict(columns)}
        self.reading |= {"pairs": self.pairs} if self.is_ranking else {}
        self.reading |= {"min_margin": self.min_margin} if self.min_margin else {}
        self._first = np.cumsum([0, *(table.rows for table in self.tables)])
        self._places: _Places | None = None

    def name(self, row: int) -> str:
        places = self._known()
        first, second = places.rows[0][row], places.rows[1][row]
        number = int(np.searchsorted(self._first, first, side="right")) - 1
        where = f"{self.tables[number].name}:{first - int(self._first[number])}"
        if not self.is_ranking:
            return where
        if second < 0:
            return where
        if first != second:
            return f"{where}>{second - int(self._first[number])}"
        return f"{where}/{places.sides[0][row]}>{places.sides[1][row]}"

    def survey(self, keep_no_caption: bool = False, undecided: bool = False) -> Survey:
        builder, self._places = SurveyBuilder(keep_no_caption, undecided), _Places()
        made = 0
        for caption, pair in self._ranked() if self.is_ranking else self._plain():
            self._places.add(pair)
            builder.add_decision(caption, pair.decision)
            made += pair.loser[0] >= 0
        return builder.finish({RANKED: made} if self.is_ranking else None)

    def read(self, rows: np.ndarray) -> Iterator[PairRow]:
        places = self._known()
        caption = self.columns["caption"]
        cells = _Window(self._cells(np.unique([np.frombuffer(side, np.int64)[rows] for side in places.rows])))
        for row in rows.tolist():
            taken = [places.rows[side][row] for side in (0, 1)]
            pair_cells = [cells.get(number, places.first[row]) for number in taken]
            winner, loser = (self._image(taken[side], pair_cells[side], places.sides[side][row]) for side in (0, 1))
            kept = {name: str(pair_cells[0][name]) for name in PROVENANCE if pair_cells[0].get(name) is not None}
            share = float(places.share[row]) if self.soft else None
            # A row without a decision is read only to be labelled. Its first picture then stands first.
            yield PairRow(row, self.name(row), caption_of(pair_cells[0][caption]) or "", winner, loser, kept, share)

    def _known(self) -> _Places:
        if self._places is None:
            self.survey()
        assert self._places is not None
        return self._places

    def _scan(self) -> Iterator[tuple[int, Row]]:
        names = [name for role, name in self.columns.items() if role not in ("winner", "loser", "image_0", "image_1", "image")]
        scans = (table.scan([name for name in dict.fromkeys(names) if name not in table.wide]) for table in self.tables)
        yield from enumerate(itertools.chain.from_iterable(scans))

    def _cells(self, rows: np.ndarray) -> Iterator[tuple[int, Row]]:
        for table, first, end in zip(self.tables, self._first[:-1].tolist(), self._first[1:].tolist(), strict=True):
            table_rows = rows[(rows >= first) & (rows < end)]
            if len(table_rows):
                names = [self.columns[role] for role in ("caption", *self._shape)]
                names += [name for name in PROVENANCE if name in table.columns]
                for row, cells in table.take(table_rows - first, list(dict.fromkeys(names))):
                    yield first + row, cells

    def _image(self, row: int, cells: Row, side: int) -> bytes | None:
        """Return the bytes of a picture, or None if the picture is missing.

        Raises:
            UserError: :meth:`~dde_ds.data.image_files.ImageFiles.read` refuses the cell. The message also names the row.
        """
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        cell = cells[self.columns[self._shape[side if len(self._shape) == 2 else 0]]]
        if self._shape == ("images",):
            pictures = _list(cell, "picture")
            cell = pictures[side] if side < len(pictures) else None
        try:
            return self.images[number].read(cell)
        except UserError as error:
            where = f"{self.tables[number].name}:{row - int(self._first[number])}"
            raise UserError(re.sub("^input: ", f"input {where}: ", str(error))) from None

    def _plain(self) -> Iterator[tuple[str | None, _Pair]]:
        """Yield the caption and the pair of each row of two pictures."""
        for row, cells in self._scan():
            caption, share = None, 1.0
            try:
                caption = caption_of(cells[self.columns["caption"]])
                share = self._share(cells)
                decision = self._decide(share)
            except Excluded as why:
                decision = str(why)
            better = int(share is not None and share < 0.5)
            certainty = 0.5 if share is None else max(share, 1 - share)
            yield caption, _Pair(decision, (row, better), (row, 1 - better), certainty, row)

    def _share(self, cells: Row) -> float | None:
        """Return the first picture's share of the votes, in [0,1], or None if there is no vote."""
        cell = {role: cells.get(name) for role, name in self.columns.items()}
        if "votes" in cell:
            share = _share_of(_list(cell["votes"], "vote"))
        elif "votes_0" in cell:
            share = _share_of([cell["votes_0"], cell["votes_1"]])
        elif "preference_0" in cell:
            share = None if _is_missing(cell["preference_0"]) else _number(cell["preference_0"], "preference", 0, 1)
        elif "label_0" in cell:
            share = _label(cell["label_0"])
        else:
            share = 1.0 if self._shape == ("winner", "loser") else None
        if self._shape == ("winner", "loser") and share is not None and share < 0.5:
            raise Excluded(AGAINST)
        return share

    def _decide(self, share: float | None) -> str:
        if share is None:
            return NO_LABEL
        if share == 0.5:
            return TIE
        return BELOW_MARGIN if self.soft and abs(2 * share - 1) < self.min_margin else DECIDED

    def _ranked(self) -> Iterator[tuple[str | None, _Pair]]:
        """Yield the caption and each pair of every ranking. A ranking without pairs yields one excluded pair."""
        for caption, rows, places, ranks in self._lists() if self._shape == ("images",) else self._groups():
            if isinstance(ranks, str):
                yield caption, _Pair(ranks, (rows[0], 0), NOWHERE, 1.0, rows[0])
                continue
            if len(ranks) == 1:
                yield caption, _Pair(ALONE, (rows[0], 0), NOWHERE, 1.0, rows[0])
            order = sorted(range(len(ranks)), key=ranks.__getitem__)
            for better, worse in _pairs_of(order, self.pairs):
                decision = TIE if ranks[better] == ranks[worse] else DECIDED
                yield caption, _Pair(decision, (rows[better], places[better]), (rows[worse], places[worse]), 1.0, rows[0])

    def _lists(self) -> Iterator[tuple[str | None, list[int], list[int], list[float] | str]]:
        role = "ranks" if "ranks" in self.columns else "scores"
        for row, cells in self._scan():
            caption = None
            try:
                caption = caption_of(cells[self.columns["caption"]])
                ranks = [_number(rank, role[:-1]) for rank in _list(cells[self.columns[role]], role[:-1])]
                if not ranks:
                    raise Excluded(f"no {role}")
                # A scan does not read columns of bytes, so their pictures cannot be counted here. An absent picture is missing later.
                if self.columns["images"] in cells and len(ranks) != len(_list(cells[self.columns["images"]], "picture")):
                    raise Excluded(LENGTHS.format(role))
                ranks = ranks if role == "ranks" else [-rank for rank in ranks]
                yield caption, [row] * len(ranks), list(range(len(ranks))), ranks
            except Excluded as why:
                yield caption, [row], [0], str(why)

    def _groups(self) -> Iterator[tuple[str | None, list[int], list[int], list[float] | str]]:
        """Yield caption, rows, places and ranks of each group of neighbouring rows. For an excluded row, yield the reason as the ranks."""
        role = "rank" if "rank" in self.columns else "score"
        key = self.columns.get("group", self.columns["caption"])
        seen: set[int] = set()
        for group, members in itertools.groupby(self._scan(), key=lambda item: str(item[1][key])):
            rows: list[int] = []
            ranks: list[float] = []
            caption = None
            for row, cells in members:
                try:
                    row_caption = caption_of(cells[self.columns["caption"]])
                    rank = _number(cells[self.columns[role]], role)
                    if rows and row_caption != caption:
                        raise Excluded(OTHER_CAPTION)
                    caption = row_caption
                except Excluded as why:
                    yield caption, [row], [0], str(why)
                    continue
                rows.append(row)
                ranks.append(rank if role == "rank" else -rank)
            if hash(group) in seen:
                raise UserError(f"input: the pictures of {key} {group[:40]!r} are not together; sort the table by {key}")
            seen.add(hash(group))
            if rows:
                yield caption, rows, [0] * len(rows), ranks


NOWHERE = (-1, 0)


class _Pair(NamedTuple):
    decision: str
    winner: tuple[int, int]
    """The winner's row, and its place among the pictures of the row. For an undecided pair this is the first picture."""
    loser: tuple[int, int]
    """The loser's row and place. :data:`NOWHERE` where the row gives no pair."""
    share: float
    """The winner's share of the votes, in [0.5, 1]."""
    first: int
    """The first row of the pair's ranking. Rows before this row are not needed again."""


class _Places:
    """The places of the two pictures of each pair. They take 36 bytes a pair."""

    def __init__(self):
        self.rows = (array("q"), array("q"))
        self.sides = (array("i"), array("i"))
        self.share = array("f")
        self.first = array("q")

    def add(self, pair: _Pair) -> None:
        for side, (row, place) in enumerate((pair.winner, pair.loser)):
            self.rows[side].append(row)
            self.sides[side].append(place)
        self.share.append(pair.share)
        self.first.append(pair.first)


class _Window:
    """The cells of rows. They are read once, in order, and kept as long as a pair may need them."""

    def __init__(self, cells: Iterator[tuple[int, Row]]):
        self._cells = cells
        self._kept: dict[int, Row] = {}

    def get(self, row: int, first: int) -> Row:
        for number in [number for number in self._kept if number < first]:
            del self._kept[number]
        while row not in self._kept:
            number, cells = next(self._cells)
            self._kept[number] = cells
        return self._kept[row]


def _pairs_of(order: list[int], which: str) -> Iterator[tuple[int, int]]:
    """Return the pairs of a ranking, better picture first."""
    if which == "all":
        return itertools.combinations(order, 2)
    if which == "adjacent":
        return itertools.pairwise(order)
    return iter([(order[0], order[-1])] if len(order) > 1 else [])


def caption_of(cell: Any) -> str | None:
    """Return a cell's text, or the user's text if the cell holds the messages of a conversation.

    Raises:
        Excluded: the cell holds something else.
    """
    if isinstance(cell, list):
        said = [part.get("content") for part in cell if isinstance(part, dict) and part.get("role", "user") == "user"]
        if len(said) == 1 and isinstance(said[0], list):  # The message has parts, such as a picture and a text.
            said = [part.get("text") for part in said[0] if isinstance(part, dict) and part.get("text")]
        texts = [text for text in said if isinstance(text, str)]
        cell = "\n".join(texts) if texts and len(texts) == len(said) else cell
    if cell is not None and not isinstance(cell, str):
        raise Excluded(NO_TEXT)
    return cell


def _share_of(votes: list) -> float | None:
    if not votes or all(_is_missing(vote) for vote in votes):
        return None
    numbers = [_number(vote, "vote", 0) for vote in votes]
    if len(numbers) != 2:
        raise Excluded("vote out of range")
    return numbers[0] / sum(numbers) if sum(numbers) else None


def _label(cell: Any) -> float | None:
    try:
        label = label_of(cell)
    except (TypeError, ValueError):
        raise Excluded("label out of range") from None
    if label is None or label != label:
        return None
    if not 0 <= label <= 1:
        raise Excluded("label out of range")
    return label if label in (0.0, 1.0) else 0.5


def _is_missing(cell: Any) -> bool:
    return cell is None or cell == "" or cell != cell


def _number(cell: Any, what: str, low: float = -math.inf, high: float = math.inf) -> float:
    try:
        number = float(cell)
    except (TypeError, ValueError):
        raise Excluded(f"{what} out of range") from None
    if not math.isfinite(number) or not low <= number <= high:
        raise Excluded(f"{what} out of range")
    return number


def _list(cell: Any, what: str) -> list:
    """Return the list in a cell, which may be JSON text."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = parse_json(cell)
        except ValueError:
            raise Excluded(f"{what} out of range") from None
    if cell is None:
        return []
    if not isinstance(cell, list):
        raise Excluded(f"{what} out of range")
    return cell


def _check_options(is_ranking: bool, soft: bool, pairs: str | None, min_margin: float | None) -> None:
    if pairs is not None and pairs not in PAIRS:
        raise UserError(f"pairs {pairs!r}{nearest(pairs, PAIRS)}")
    if pairs is not None and not is_ranking:
        raise UserError(f"pairs {pairs}: is for rankings, and these columns are no ranks or scores; leave it out")
    if min_margin is not None and not 0 <= min_margin <= 1:
        raise UserError(f"min_margin {min_margin}: must be 0 to 1, the difference of the two shares of the votes")
    if min_margin is not None and not soft:
        raise UserError(
            f"min_margin {min_margin}: is for votes_0 and votes_1, votes or preference_0, which are not among the columns"
        )


def open_table_pairs(
    tables: Sequence[Table],
    folders: Sequence[Path | None],
    columns: dict[str, str],
    preset: str | None = None,
    root: str | Path | None = None,
    follow_links: bool = False,
    pairs: str | None = None,
    min_margin: float | None = None,
) -> TablePairs:
    """Return the pairs of tables.

    Args:
        tables: the tables. Tables without rows may have other columns.
        folders: the folder of each table. Paths in a table are relative to its folder, unless ``root`` is given.
        columns, preset: the arguments of :func:`~dde_ds.data.columns.choose_columns`.
        root, follow_links: the arguments of :class:`~dde_ds.data.image_files.ImageFiles`.
        pairs, min_margin: the arguments of :class:`TablePairs`.

    Raises:
        UserError: no table has a row, tables differ in their columns, or one of these functions refuses its arguments.
    """
    chosen = [choose_columns(table.name, table.columns, columns, preset) for table in tables if table.rows]
    if not chosen:
        raise UserError(f"input {tables[0].name}: holds no row")
    if any(other != chosen[0] for other in chosen):
        raise UserError(f"input {tables[0].name}: its columns differ from those of the other files; shard them one after another")
    make: Callable[[Path | None], ImageFiles] = lambda folder: ImageFiles(root, folder, follow_links)  # noqa: E731
    shared = make(None) if root is not None else None
    return TablePairs(tables, chosen[0], [shared or make(folder) for folder in folders], pairs, min_margin)
