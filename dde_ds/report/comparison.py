"""The report's part on a comparison: scores with intervals, and images side by side, none of them picked by hand."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dde_ds.evaluation.comparison import COLUMNS, SET_COLUMNS, cells, set_cells, title
from dde_ds.report.page import data_uri, table
from dde_ds.report.svg import intervals

SIDE = 384


def comparison_sections(data: dict[str, Any], folder: Path, pictures: int) -> list[tuple[str, str]]:
    """Return the sections on a comparison, each (heading, HTML).

    Args:
        data: the content of ``comparison.json``.
        folder: the folder that the paths in ``data`` are relative to.
        pictures: images in each group of a model; 0 shows none.
    """
    sections = [("Scores", _scores(data))]
    if pictures and data["results"]:
        sections += [(f"{name} beside {data['base']}", _side_by_side(data, folder, name, pictures)) for name in _models(data)]
    sections.append(("How the images were made", _settings(data)))
    return sections


def _models(data: dict[str, Any]) -> list[str]:
    return [name for name in data["folders"] if name != data["base"]]


def _scores(data: dict[str, Any]) -> str:
    per_prompt = data["settings"][data["base"]]["images_per_prompt"]
    charts = []
    for scorer in dict.fromkeys(row["scorer"] for row in data["results"]):
        rows = [row for row in data["results"] if row["scorer"] == scorer]
        estimates = [(row["model"], *(row["difference"][key] for key in ("low", "mean", "high"))) for row in rows]
        charts.append(intervals(f"{scorer}: difference to {data['base']}, 95 %", estimates, 0.0, "higher is better"))
        estimates = [(row["model"], *(100 * row["beats"][key] for key in ("low", "rate", "high"))) for row in rows]
        charts.append(intervals(f"{scorer}: beats {data['base']}, 95 %", estimates, 50.0, "per cent of images, ties half"))
    tables = [(COLUMNS, [cells(row) for row in data["results"]]), (SET_COLUMNS, [set_cells(row) for row in data["sets"]])]
    notes = "".join(f"<li>{escape(note)}</li>" for note in data["notes"])
    return (
        f"<p>{escape(title(len(data['prompts']), per_prompt, data['base']))}. Pairs share prompt and initial noise; intervals are "
        "bootstraps over prompts; the sign test counts prompts, not images.</p>"
        + "".join(table(columns, rows) for columns, rows in tables if rows)
        + (f'<ul class="note">{notes}</ul>' if notes else "")
        + f'<div class="grid">{"".join(charts)}</div>'
    )


def _side_by_side(data: dict[str, Any], folder: Path, model: str, count: int) -> str:
    scorer = data["results"][0]["scorer"]
    gain = torch.tensor(data["scores"][model][scorer]) - torch.tensor(data["scores"][data["base"]][scorer])
    groups = zip((f"Largest gains by {scorer}", f"Largest losses by {scorer}", "At random"), choose(gain, count), strict=True)
    parts = [
        f'<p class="note">Left {escape(data["base"])}, right {escape(model)}, from the same noise. At most one image a prompt in a group.</p>'
    ]
    for heading, chosen in groups:
        figures = "".join(_pair(data, folder, model, *item) for item in chosen)
        parts.append(f'<h3>{escape(heading)}</h3><div class="grid">{figures}</div>')
    return "".join(parts)


def choose(gain: Tensor, count: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """Choose images in three ways: those of the largest gains, those of the largest losses, and at random.

    Args:
        gain: the gain of each image, (prompts, images a prompt).
        count: the most images of each way.

    Returns:
        Three lists of (prompt, image), each with at most one image of a prompt. The random images are drawn from all images with a
        fixed seed, so that nobody chooses them.
    """
    best = sorted(range(len(gain)), key=lambda prompt: -float(gain[prompt].max()))[:count]
    worst = sorted(range(len(gain)), key=lambda prompt: float(gain[prompt].min()))[:count]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(gain), generator=generator)[:count].tolist()
    images = torch.randint(gain.shape[1], (len(drawn),), generator=generator).tolist()
    return (
        [(prompt, int(gain[prompt].argmax())) for prompt in best],
        [(prompt, int(gain[prompt].argmin())) for prompt in worst],
        list(zip(drawn, images, strict=True)),
    )


def _pair(data: dict[str, Any], folder: Path, model: str, prompt: int, index: int) -> str:
    sides = []
    for name in (data["base"], model):
        path = folder / data["folders"][name] / "images" / f"{prompt:05d}-{index:02d}.png"
        scores = ", ".join(f"{scorer} {values[prompt][index]:.3f}" for scorer, values in data["scores"][name].items())
        try:
            uri, small = data_uri(path, SIDE)
            style = ' class="pixels"' if small else ""
            picture = f'<img{style} alt="{escape(name)}: {escape(data["prompts"][prompt])}" src="{uri}">'
        except OSError:
            picture = f'<p class="note">{escape(str(path))} is not there.</p>'
        sides.append(f"<div>{picture}{escape(name)}: {escape(scores)}</div>")
    return f'<figure><div class="pair">{"".join(sides)}</div><p>{escape(data["prompts"][prompt])} (image {index})</p></figure>'


def _settings(data: dict[str, Any]) -> str:
    keys = list(dict.fromkeys(key for settings in data["settings"].values() for key in settings))
    rows = [(key, *(str(settings.get(key, ""))[:64] for settings in data["settings"].values())) for key in keys]
    digests = table(("scorer", "digest of its weights, processor and formula"), list(data["scorers"].items()))
    return table(("", *data["settings"]), rows) + digests
