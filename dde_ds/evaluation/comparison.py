"""Compare N models with one base on the same prompts and noise, and write the numbers as a table, JSON and Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dde_ds.errors import UserError
from dde_ds.evaluation.compare import Difference, WinRate, paired_difference, win_rate
from dde_ds.evaluation.inception import NAME as INCEPTION
from dde_ds.evaluation.pictures import ImageFolder, open_pictures, require_whole
from dde_ds.evaluation.scoring import DIGITS, cached_digests, load_scores, load_set_score
from dde_ds.evaluation.user_scorer import UserScorer
from dde_ds.files import write_atomically
from dde_ds.shape import COUNT, NUMBER, require_shape
from dde_ds.text import verbatim
from dde_ds.untrusted import read_json
from dde_ds.user_file import split_name
from dde_ds.warn import reason

FORMAT = "dde_ds comparison 2"
MOST_BYTES = 512 * 2**20
"""The largest ``comparison.json`` that is read.

A score takes some 20 bytes, so the scores of 30,000 prompts of 8 images by 5 scorers and 10 models fit.
"""
SHAPE = {
    "base": str,
    "folders": (str,),
    "settings": ({"images_per_prompt": COUNT},),
    "scorers": (str,),
    "notes": [str],
    "results": [
        {
            **{"model": str, "scorer": str, "base_mean": NUMBER, "model_mean": NUMBER},
            "difference": {
                **dict.fromkeys(("mean", "low", "high", "sign_test_p"), NUMBER),
                **dict.fromkeys(("prompts_better", "prompts_worse", "prompts_equal"), COUNT),
            },
            "beats": dict.fromkeys(("rate", "low", "high"), NUMBER),
        }
    ],
    "sets": [{"scorer": str, "model": str, "mean": NUMBER, "deviation": NUMBER, "splits": COUNT, "count": COUNT}],
    "prompts": [str],
    "scores": (([[NUMBER]],),),
}
"""The shape of ``comparison.json``, for :func:`dde_ds.shape.require_shape`."""
# Two images are a pair only if these settings agree. If other settings differ (steps, guidance, …), a note says so.
PAIRED = ("images_per_prompt", "seed", "resolution")
# With fewer prompts than this, the intervals are too wide for the differences that alignment makes.
ENOUGH_PROMPTS = 500
# The Inception Score rises with the number of images, until each part holds some thousands. Its authors took 5,000.
ENOUGH_IMAGES = 5000


@dataclass(frozen=True)
class Row:
    model: str
    scorer: str
    base_mean: float
    model_mean: float
    difference: Difference
    beats: WinRate


@dataclass(frozen=True)
class Comparison:
    base: str
    folders: dict[str, Path]
    """The folders by model name, the base first."""
    prompts: list[str]
    settings: dict[str, dict]
    """The settings of the images, by model name."""
    scorers: dict[str, str]
    """The scorers' digests, by scorer name."""
    scores: dict[str, dict[str, Tensor]]
    """The scores by model name and scorer name, each (prompts, images a prompt) float64."""
    rows: list[Row]
    sets: list[dict[str, Any]]
    """The scores of whole sets, one row for each folder: ``scorer``, ``model``, ``mean``, ``deviation``, ``splits``, ``count``."""

    @property
    def models(self) -> list[str]:
        return [name for name in self.folders if name != self.base]

    def notes(self) -> list[str]:
        """Return the notes that a reader of the numbers needs."""
        notes = []
        if len(self.prompts) < ENOUGH_PROMPTS:
            notes.append(
                f"{len(self.prompts)} prompts: fewer than {ENOUGH_PROMPTS}, so small differences cannot be told from chance"
            )
        for name in self.models:
            keys = ("scheduler", "steps", "guidance", "precision", "family")
            base, other = self.settings[self.base], self.settings[name]
            if differing := [f"{key} {base.get(key)} and {other.get(key)}" for key in keys if base.get(key) != other.get(key)]:
                notes.append(f"{self.base} and {name} were drawn with different settings: {'; '.join(differing)}")
            if base.get("weights") == other.get("weights"):
                notes.append(f"{self.base} and {name} are the same weights")
        if any(row["count"] < ENOUGH_IMAGES for row in self.sets):
            notes.append(
                f"the Inception Score of fewer than {ENOUGH_IMAGES} images is too low, by as much for all of one size: "
                "compare it with nothing but the other rows"
            )
        if len(self.rows) > 1:
            notes.append(f"{len(self.rows)} comparisons are made here, each at 95 %: about one in twenty misses by chance")
        return notes


def name_sources(sources: Sequence[str]) -> dict[str, str]:
    """Return the paths of sources, ``NAME=DIR`` or ``DIR``, by name and in order.

    A source without a name is named by the end of its path: the shortest end that makes all names different.

    Raises:
        UserError: a name or folder is empty, a name cannot be a folder's name, or two sources have the same name or folder.
    """
    # A path that exists is taken as it is, even if it holds an equals sign.
    given = [(source, "", "") if Path(source).exists() else source.partition("=") for source in sources]
    paths = [path if equals else name for name, equals, path in given]
    chosen = [name if equals else None for name, equals, _ in given]
    if any(not path for path in paths) or any(name == "" for name in chosen):
        raise UserError(f"base and model: {sources} holds an empty name or folder; expected DIR or NAME=DIR")
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [
            name or "-".join(part for part in components[-length:] if part != "/")
            for name, components in zip(chosen, parts, strict=True)
        ]
        if len(set(names)) == len(names):
            if bad := [name for name in names if "/" in name or name in (".", "..")]:
                raise UserError(f"base and model: {bad[0]!r} is no name; write NAME=DIR")
            return dict(zip(names, paths, strict=True))
    raise UserError(f"base and model: two of {', '.join(sources)} have the same name or folder; write NAME=DIR")


def compare_folders(folders: Mapping[str, Path], scorers: Sequence[str], digests: Mapping[str, str] | None = None) -> Comparison:
    """Compare folders of scored images. The first folder is the base.

    Args:
        folders: by model name.
        scorers: names of scorers. ``name@digest`` picks one version where the scores of several are cached.
        digests: the scorers' digests, by name. None takes the one version of which all folders have scores.

    Raises:
        UserError: images or scores are missing, or the folders are not of the same prompts and noise.
    """
    pictures = {name: open_pictures(folder) for name, folder in folders.items()}
    base = next(iter(pictures))
    for name in list(pictures)[1:]:
        _require_paired(pictures[base], pictures[name])
    for each in pictures.values():
        require_whole(each)
    chosen = dict(digests) if digests else dict(_cached_version(list(pictures.values()), name) for name in scorers)
    paired = {scorer: digest for scorer, digest in chosen.items() if scorer != INCEPTION}
    scores = {
        name: {scorer: load_scores(each, scorer, digest) for scorer, digest in paired.items()} for name, each in pictures.items()
    }
    rows = [
        Row(
            model,
            scorer,
            float(scores[base][scorer].mean()),
            float(scores[model][scorer].mean()),
            paired_difference(scores[model][scorer], scores[base][scorer]),
            win_rate(scores[model][scorer], scores[base][scorer]),
        )
        for scorer in paired
        for model in list(pictures)[1:]
    ]
    sets = [_set_row(name, each, chosen[INCEPTION]) for name, each in pictures.items()] if INCEPTION in chosen else []
    settings = {name: each.settings for name, each in pictures.items()}
    return Comparison(base, dict(folders), pictures[base].prompts, settings, chosen, scores, rows, sets)


def write_comparison(found: Comparison, out: Path) -> None:
    """Write ``comparison.json``, from which reports are made, and ``comparison.md`` into the folder ``out``.

    Raises:
        UserError: the folder is not writable.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out {out}: not writable: {reason(error).lower()}") from None
    # Relative paths, so that the folder can be moved as a whole.
    places = {name: os.path.relpath(folder.resolve(), out.resolve()) for name, folder in found.folders.items()}
    data = {
        "format": FORMAT,
        "base": found.base,
        "folders": places,
        "settings": found.settings,
        "scorers": found.scorers,
        "notes": found.notes(),
        "results": [asdict(row) for row in found.rows],
        "sets": found.sets,
        "prompts": found.prompts,
        "scores": {
            name: {scorer: values.tolist() for scorer, values in by_scorer.items()} for name, by_scorer in found.scores.items()
        },
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items())
    write_atomically(out / "comparison.json", f"{{\n{lines}\n}}\n".encode())
    write_atomically(out / "comparison.md", markdown(found).encode())


def read_comparison(path: Path) -> dict[str, Any]:
    """Read a ``comparison.json``, given the file or its folder.

    Raises:
        UserError: the file is not there, is no comparison, or is damaged. The message names the damaged place.
    """
    path = path / "comparison.json" if path.is_dir() else path
    try:
        data = read_json(path, MOST_BYTES)
    except OSError as error:
        raise UserError(f"{path}: {reason(error).lower()}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path}: is no comparison; expected the comparison.json of dde-ds evaluate or compare")
    try:
        _require_whole(data)
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; compare again") from None
    return data


def _require_whole(data: dict[str, Any]) -> None:
    """Refuse a ``comparison.json`` if its parts do not fit each other.

    Raises:
        ValueError: two parts do not fit. The message names them.
    """
    require_shape(data, SHAPE)
    names, scorers = data["folders"].keys(), {row["scorer"] for row in data["results"]}
    for key in ("settings", "scores"):
        if data[key].keys() != names:
            raise ValueError(f"{key} is of {', '.join(data[key]) or 'nothing'}, folders is of {', '.join(names) or 'nothing'}")
    if data["base"] not in names:
        raise ValueError(f"base is {data['base']!r}, which is none of folders")
    if unexpected := {row["model"] for row in [*data["results"], *data["sets"]]} - names:
        raise ValueError(f"results or sets name the model {min(unexpected)!r}, which is none of folders")
    shape = (len(data["prompts"]), data["settings"][data["base"]]["images_per_prompt"])
    if not all(shape):
        raise ValueError("it has no prompts, or no images of them")
    for name, by_scorer in data["scores"].items():
        if missing := scorers - by_scorer.keys():
            raise ValueError(f"scores has no {min(missing)} of {name}")
        for scorer, values in by_scorer.items():
            if len(values) != shape[0] or any(len(row) != shape[1] for row in values):
                raise ValueError(f"scores by {scorer} of {name} are not {shape[1]} of each of {shape[0]} prompts")


COLUMNS = ("scorer", "model", "base", "mean", "difference, 95 %", "beats the base, 95 %", "prompts +/-/=", "sign test")


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row of results as text, a cell for each of :data:`COLUMNS`."""
    difference, beats = row["difference"], row["beats"]
    return (
        row["scorer"],
        row["model"],
        f"{row['base_mean']:.3f}",
        f"{row['model_mean']:.3f}",
        f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]",
        f"{beats['rate']:.1%} [{beats['low']:.1%}, {beats['high']:.1%}]",
        f"{difference['prompts_better']}/{difference['prompts_worse']}/{difference['prompts_equal']}",
        f"p = {difference['sign_test_p']:.2g}",
    )


SET_COLUMNS = ("scorer", "model", "mean ± deviation of the parts", "parts", "images")


def set_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row of whole sets' scores as text, a cell for each of :data:`SET_COLUMNS`."""
    return row["scorer"], row["model"], f"{row['mean']:.3f} ± {row['deviation']:.3f}", str(row["splits"]), str(row["count"])


def title(prompts: int, images_per_prompt: int, base: str) -> str:
    return f"{prompts} prompts, {images_per_prompt} images each, against {base}"


def markdown(found: Comparison) -> str:
    lines = [f"**{title(len(found.prompts), found.settings[found.base]['images_per_prompt'], found.base)}**", ""]
    for columns, rows in _tables(found):
        lines += ["| " + " | ".join(columns) + " |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in found.notes()), ""])


def print_table(found: Comparison) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    heading = verbatim(title(len(found.prompts), found.settings[found.base]["images_per_prompt"], found.base))
    for columns, rows in _tables(found):
        table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), title=heading)
        for number, column in enumerate(columns):
            # A narrow terminal folds names and headings, never a number.
            table.add_column(column, justify="left" if number < 2 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text("\n[").join(map(verbatim, cell.split(" ["))) for cell in row))
        console.print(table)
    for note in found.notes():
        console.print(verbatim(f"- {note}"))


def _tables(found: Comparison) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Return (columns, rows) of two tables: the paired scores, and the scores of whole sets. An empty table is left out."""
    both = [(COLUMNS, [cells(asdict(row)) for row in found.rows]), (SET_COLUMNS, [set_cells(row) for row in found.sets])]
    return [(columns, rows) for columns, rows in both if rows]


def _set_row(name: str, pictures: ImageFolder, digest: str) -> dict[str, Any]:
    score = load_set_score(pictures, INCEPTION, digest)
    if score is None:
        raise UserError(f"{pictures.folder}: these images have no {INCEPTION} score; score with dde-ds evaluate")
    kept = {key: score[key] for key in ("mean", "deviation", "splits", "count")}
    return {"scorer": INCEPTION, "model": name, **kept}


def _require_paired(base: ImageFolder, other: ImageFolder) -> None:
    for key in PAIRED:
        if base.settings.get(key) != other.settings.get(key):
            raise UserError(
                f"{other.folder}: its {key} is {other.settings.get(key)!r}, that of {base.folder} {base.settings.get(key)!r}: "
                "the images are no pairs; generate both with the same"
            )
    if base.prompts != other.prompts:
        absent = [prompt for prompt in base.prompts if prompt not in set(other.prompts)]
        what = f"lacks the prompt {absent[0]!r} ({len(absent)} in all)" if absent else "has other prompts, or another order of them"
        raise UserError(f"{other.folder}: {what}; generate both from the same file")


def name_version(specification: str) -> str:
    """Return ``name`` or ``name@digest`` for :func:`compare_folders`. The scores of a user's file are those of its present content."""
    if own := split_name(specification):
        return f"{own[1]}@{UserScorer(*own, torch.device('cpu')).digest[:DIGITS]}"
    return specification.partition("=")[0]


def _cached_version(pictures: Sequence[ImageFolder], name: str) -> tuple[str, str]:
    name, _, wanted = name.partition("@")
    common = set.intersection(*(cached_digests(each, name) for each in pictures))
    matching = sorted(digest for digest in common if digest.startswith(wanted[:DIGITS]))
    if len(matching) == 1:
        return name, matching[0]
    if matching:
        raise UserError(
            f"scorers {name}: scores of {len(matching)} versions are cached; pick one: {', '.join(f'{name}@{d}' for d in matching)}"
        )
    lacking = [str(each.folder) for each in pictures if not cached_digests(each, name)]
    where = f"{', '.join(lacking)} holds none" if lacking else "no version is in all folders"
    raise UserError(f"scorers {name}: no scores to compare: {where}; score with dde-ds evaluate")
