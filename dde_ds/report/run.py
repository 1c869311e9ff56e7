"""The report's part on a run folder: its curves, its credit and correction, its drawings and its settings."""

from __future__ import annotations

import math
import re
from html import escape
from pathlib import Path
from typing import Any

from dde_ds.config import RunConfig, load_config
from dde_ds.errors import UserError
from dde_ds.report.page import data_uri, table
from dde_ds.report.svg import Line, heatmap, line_chart
from dde_ds.rows import is_correction, is_metrics, read_rows
from dde_ds.text import without_passwords

# Each group is one chart of those of its keys that a run has. A key in no group gets a chart of its own.
GROUPS = (
    ("Loss", ("loss",)),
    ("Accuracy: share of pairs with z > 0, those with z = 0 as one half", ("rewards/accuracies",)),
    ("Rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("Drift of the errors, policy - reference", ("drift/chosen", "drift/rejected")),
    ("Path KL from the reference, in nats", ("drift/path_kl",)),
    (
        "Noise-prediction errors",
        ("error/policy_chosen", "error/policy_rejected", "error/reference_chosen", "error/reference_rejected"),
    ),
    ("Correction, mean over pairs", ("dde/correction_mean",)),
    ("Correction in units of z, mean over pairs", ("dde/offset_mean",)),
    (
        "Saturation: share of pairs with σ(-z) below 0.01, learnt, and above 0.99, wrong",
        ("dde/saturated_learnt", "dde/saturated_wrong"),
    ),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("learning_rate",)),
    ("Throughput, pairs a second", ("perf/pairs_per_s",)),
    ("Share of time waiting for data", ("perf/data_wait",)),
)
BY_TIMESTEP = (
    ("accuracy_by_t/", "Accuracy by timestep", 0.5),
    ("margin_by_t/", "Margin by timestep", 0.0),
    ("drift_by_t/", "Winners' drift by timestep", 0.0),
)
CLOCKS = ("step", "position")
MARGIN = 1e-3
SHOWN_ROWS, SHOWN_DRAWINGS = 6, 4


def run_sections(folder: Path) -> list[tuple[str, str]]:
    """Return the sections on everything that the folder holds, each (heading, HTML). Missing parts are left out.

    Raises:
        UserError: a file is there but cannot be read.
    """
    rows = read_rows(folder / "metrics.jsonl", is_metrics)
    run, config_text, problem = _read_config(folder / "config.yaml")
    sections = [("The run", _summary(folder, run, rows))]
    if rows:
        sections.append(("Training curves", _curves(rows)))
    if maps := _maps(rows):
        sections.append(("By timestep", maps))
    correction, numbers = _correction(read_rows(folder / "correction.jsonl", is_correction))
    if charts := _credit(folder, run) + correction:
        sections.append(("Credit and correction", f'<div class="grid">{charts}</div>{numbers}'))
    if drawings := _drawings(folder, run):
        sections.append(("Drawings", drawings))
    if config_text:
        said = f'<p class="note">{escape(problem)}</p>' if problem else ""
        sections.append(
            (
                "Settings",
                f"{said}<details><summary>config.yaml</summary><pre>{escape(without_passwords(config_text))}</pre></details>",
            )
        )
    return sections


def _summary(folder: Path, run: RunConfig | None, rows: list[dict]) -> str:
    last = rows[-1] if rows else {}
    facts = [("folder", str(folder)), ("state", "done" if (folder / "DONE").exists() else "not done")]
    if run:
        facts += [
            ("objective", f"{run.objective.name}, β = {run.objective.beta:g}"),
            ("model", run.model.path),
            ("batch", f"{run.batch.pairs} pairs a step"),
            ("learning rate", f"{run.optimizer.learning_rate:g}"),
            ("precision, seed", f"{run.precision}, {run.seed}"),
        ]
    if last:
        steps = f"{last['step']}" + (f" of {run.steps}" if run else "")
        facts.append(("steps", steps + (f", {last['position']} pairs" if "position" in last else "")))
        for key in ("loss", "rewards/accuracies", "drift/chosen", "drift/rejected", "dde/saturated_learnt", "dde/saturated_wrong"):
            if key in last:
                facts.append((f"{key}, last", f"{_finite(last[key]):.5g}"))
    else:
        facts.append(("steps", "no row in metrics.jsonl yet"))
    cells = "".join(f'<tr><th>{escape(name)}</th><td class="long">{escape(value)}</td></tr>' for name, value in facts)
    return f'<div class="scroll"><table class="facts"><tbody>{cells}</tbody></table></div>'


def _curves(rows: list[dict]) -> str:
    buckets = tuple(prefix for prefix, _, _ in BY_TIMESTEP)
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value))
    left = {key for key in keys if key not in CLOCKS and not key.startswith(buckets)}
    charts = []
    for title, wanted in GROUPS:
        present = [key for key in wanted if key in left]
        left -= set(present)
        charts.append(line_chart(title, [_line(rows, key) for key in present], "step"))
    charts += [line_chart(key, [_line(rows, key)], "step") for key in keys if key in left]
    return f'<div class="grid">{"".join(charts)}</div>'


def _maps(rows: list[dict]) -> str:
    charts = []
    for prefix, title, centre in BY_TIMESTEP:
        spans = sorted({key for row in rows for key in row if key.startswith(prefix)})
        if spans:
            table_rows = [(key.removeprefix(prefix), [_finite(row.get(key)) for row in rows]) for key in spans]
            charts.append(heatmap(title, table_rows, [row["step"] for row in rows], centre, "step"))
    if not any(charts):
        return ""
    return f'<div class="grid">{"".join(charts)}</div><p class="note">A row for each stretch of timesteps; at its end the last value.</p>'


def _credit(folder: Path, run: RunConfig | None) -> str:
    """Chart the objective's credit profile beside that of Diffusion-DPO, from the run's noise schedule."""
    if run is None:
        return ""
    source = next((path for path in (folder / "export", Path(run.model.path)) if (path / "scheduler").is_dir()), None)
    if source is None:
        return '<p class="note">No credit profile: the model, whose noise schedule it needs, is not on this machine.</p>'
    from dde_ds.models.unet import load_scheduler_config
    from dde_ds.objective.objective import build_objective, configured_objective
    from dde_ds.report.explain import profiles

    try:
        trained = configured_objective(run.objective, load_scheduler_config(str(source)))
    except UserError as error:
        return f'<p class="note">No credit profile: {escape(str(error))}</p>'
    if not trained.needs_reference:
        return ""
    uniform = build_objective("uniform", trained.schedule, beta=run.objective.beta, correction_buckets=1)
    others = [] if trained.name == "uniform" else [uniform]
    timesteps = list(range(trained.schedule.num_train_timesteps))
    # A run also teaches a timestep more if it draws the timestep more often.
    lines = []
    for objective, (name, profile) in zip([trained, *others], profiles([trained, *others], MARGIN).items(), strict=True):
        credit = profile.credit * objective.timestep_probabilities
        lines.append(Line(name, timesteps, (credit / credit.max().clamp_min(1e-300)).tolist()))
    return line_chart(
        f"Credit of a timestep, every pair {MARGIN:g} ahead, in parts of its peak", lines, "timestep t: clean → noise"
    )


def _correction(history: list[dict]) -> tuple[str, str]:
    """Return the chart of the correction, and the last row in numbers."""
    if not history:
        return "", ""
    shown = _spread(history, SHOWN_ROWS)
    lines = [Line(f"step {row['step']}", row["timesteps"], row["correction"]) for row in shown]
    chart = line_chart("Correction K as the run went on", lines, "timestep t: clean → noise")
    last = history[-1]
    cells = [(str(t), f"{value:.5g}") for t, value in zip(last["timesteps"], last["correction"], strict=True)]
    numbers = table(("timestep", f"K after step {last['step']}"), cells)
    return chart, f"<details><summary>The correction table in numbers</summary>{numbers}</details>"


def _drawings(folder: Path, run: RunConfig | None) -> str:
    paths = sorted((folder / "samples").glob("step-*.png"))
    if not paths:
        return ""
    figures = []
    for path in _spread(paths, SHOWN_DRAWINGS):
        try:
            uri, small = data_uri(path, 1200)
        except OSError:
            figures.append(f'<p class="note">{escape(path.name)} is no readable image.</p>')
            continue
        name = f"step {int(path.stem.removeprefix('step-'))}" if re.fullmatch("step-[0-9]{8,}", path.stem) else path.stem
        style = ' class="pixels"' if small else ""
        figures.append(
            f'<figure class="wide"><figcaption>{escape(name)}</figcaption><img{style} alt="{escape(name)}" src="{uri}"></figure>'
        )
    prompts = (
        f'<p class="note">From left to right: {escape("; ".join(run.samples.prompts))}</p>' if run and run.samples.prompts else ""
    )
    return f'{prompts}<div class="grid">{"".join(figures)}</div>'


def _line(rows: list[dict], key: str) -> Line:
    """Return the line through the rows that have the key. Some numbers are measured only every few steps."""
    having = [row for row in rows if key in row]
    return Line(key, [row["step"] for row in having], [_finite(row[key]) for row in having])


def _finite(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _spread(items: list, count: int) -> list:
    """Return at most ``count`` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _read_config(path: Path) -> tuple[RunConfig | None, str, str]:
    """Return the configuration, its text, and the problem. The problem is empty unless this version cannot read the text."""
    if not path.is_file():
        return None, "", ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return load_config(path), text, ""
    except UserError as error:
        return None, text, f"Not readable by this version: {error}"
