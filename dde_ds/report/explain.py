"""Plots of an objective: the credit of each timestep, the weights of the schedule, and the history of a run's correction."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dde_ds.errors import UserError
from dde_ds.objective.correction import ERROR_NAMES
from dde_ds.objective.objective import SATURATED, Objective
from dde_ds.objective.profile import Profile, assume_margin, credit_profile
from dde_ds.objective.schedule import NoiseSchedule

# The scheduler of SD1.5 and SDXL, for a plot without a model.
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BINS = 25


def profiles(objectives: Sequence[Objective], margin: float, spread: float = 0.0) -> dict[str, Profile]:
    """Return each objective's profile, by name, for pairs with the margin -``margin`` at every timestep.

    With a ``spread``, margins are normally distributed around -``margin`` with this standard deviation, and the profile is their mean.
    """
    credited = {}
    for objective in objectives:
        assume_margin(objective, -margin)
        credited[objective.name] = credit_profile(
            objective, torch.full((objective.schedule.num_train_timesteps,), -margin, dtype=torch.float64), spread
        )
    return credited


def draw_credit(found: dict[str, Profile], path: Path, title: str) -> None:
    """Plot the credit profiles alone, each as a fraction of its own peak."""
    plot = _pyplot()
    figure, axis = plot.subplots(figsize=(8, 3.6), dpi=110)
    _credit(axis, found)
    axis.set_title(title)
    _save(figure, path)


def draw_objectives(found: dict[str, Profile], schedule: NoiseSchedule, margin: float, path: Path) -> None:
    """Plot credit, weights, correction and saturation, from the schedule alone."""
    plot = _pyplot()
    figure, ((credit, weights), (correction, push)) = plot.subplots(2, 2, figsize=(13, 8), dpi=110)
    _credit(credit, found)
    credit.set_title(f"credit of a timestep: |∂loss/∂d|, margin -{margin:g} everywhere")
    tail = _tail(schedule.stepwise_weight)
    for values, label in (
        (schedule.single_shot_weight, "$w_t = 1/SNR$, single-shot"),
        (schedule.stepwise_weight[1:], "$λ_t$, stepwise"),
        (tail, "$Σ_{j>t} λ_j$, the correction's reach"),
    ):
        weights.plot(range(schedule.num_train_timesteps - len(values), schedule.num_train_timesteps), values, label=label)
    weights.set_yscale("log")
    weights.set_title("weights of the schedule")
    for factor in (0.1, 1.0, 10.0):
        correction.plot(margin * factor * tail[:-1], label=f"margin -{margin * factor:g}")
    correction.set_yscale("log")
    correction.set_title("size of the correction $K_t$ at a constant margin: falls with t")
    for name, profile in found.items():
        push.plot(profile.push, label=name)
    push.set_title("what the logistic leaves of the gradient, σ(-z): saturated near 0 and 1")
    _finish(figure, (credit, weights, correction, push), path)


def draw_run(
    objective: Objective, history: Sequence[dict], credited: Sequence[dict], path: Path, credit_only: bool = False
) -> list[tuple[str, list[float]]]:
    """Plot the records of a run.

    Args:
        objective: the run's objective with its saved table.
        history: the rows of ``correction.jsonl``.
        credited: the rows of ``credit.jsonl``.
        path: the file of the plot.
        credit_only: plot the credit alone.

    Returns:
        For each curve of credit, its name and the share of each tenth of the timesteps, the clean end first.

    Raises:
        UserError: the correction table holds no sample.
    """
    seen = objective.table.count > 0
    if not bool(seen.any()):
        raise UserError("run: its correction table holds no sample yet; explain the run after its first checkpoint")
    plot = _pyplot()
    steps = objective.schedule.num_train_timesteps
    centres, margins = _binned(objective.table.average[0], objective.table.count, steps)
    profile = credit_profile(objective, torch.from_numpy(_interpolated(centres, margins, steps)))
    # Scale the credit by how often a timestep is drawn: a timestep that is never drawn is never taught.
    drawn = objective.timestep_probabilities / objective.timestep_probabilities.max()
    mean = Profile(profile.credit * drawn, profile.push)
    shares = [("at the mean margin", _tenths(mean.credit))]
    over_pairs = credit_over_pairs(credited)
    if over_pairs:
        shares.append((over_pairs[0], _tenths(over_pairs[1])))

    def draw_credit_on(axis) -> None:
        _credit(axis, {f"{objective.name}, at the mean margin": mean})
        if over_pairs:
            name, sums = over_pairs
            axis.plot(
                (torch.arange(len(sums)) + 0.5) * steps / len(sums),
                sums / sums.max().clamp_min(1e-300),
                label=f"{objective.name}, {name}",
            )
            axis.legend(fontsize=8)
        axis.set_title("credit of a timestep in this run: |∂loss/∂d|, times how often it is drawn")

    if credit_only:
        figure, axis = plot.subplots(figsize=(8, 3.6), dpi=110)
        draw_credit_on(axis)
        _save(figure, path)
        return shares
    layout = [["credit", "history"], ["correction", "drift"], ["pace", "pace"]]
    figure, axes = plot.subplot_mosaic(layout, figsize=(13, 11), dpi=110)  # pyright: ignore[reportCallIssue, reportArgumentType]
    credit, history_axis, correction, drift = (axes[name] for name in ("credit", "history", "correction", "drift"))
    draw_credit_on(credit)

    shades = plot.get_cmap("viridis")
    shown = [*history[: -1 : max(1, len(history) // 8)], *history[-1:]]
    for row in shown:
        shade = shades(row["step"] / max(1, history[-1]["step"]))
        history_axis.plot(row["timesteps"], row["correction"], color=shade, label=f"step {row['step']}")
    history_axis.set_title("correction $K_t$ as the run went on")
    used = objective.correction_weight > 0
    correction.plot(objective.table.correction if used else torch.zeros(steps), label="last checkpoint")
    correction.set_title("correction $K_t$ at the last checkpoint" if used else "no correction in this objective")
    errors: dict[str, Tensor] = dict(zip(ERROR_NAMES, objective.table.average[1:], strict=True))
    for side in ("chosen", "rejected"):
        moved = errors[f"policy_{side}"] - errors[f"reference_{side}"]
        drift.plot(*_binned(moved, objective.table.count, steps), marker=".", label=side)
    drift.set_title("drift of the errors, policy - reference (moving averages)")
    axes["pace"].plot(*pace(history), marker=".")
    axes["pace"].set_ylim(bottom=0)
    axes["pace"].set_xlabel("step")
    axes["pace"].set_title("how far $K$ moves a step, in parts of its last size: near 0 once it has settled")
    _finish(figure, (credit, history_axis, correction, drift), path)
    return shares


def credit_over_pairs(rows: Sequence[dict]) -> tuple[str, Tensor] | None:
    """Sum the credit of the last quarter of a run's steps, from the rows of ``credit.jsonl``.

    Use a whole quarter, because few pairs hold most of the credit and single steps show little.

    Returns:
        A name for the curve, and the sum of the credit in each range of timesteps. None where there are no rows.
    """
    if not rows:
        return None
    last = rows[-1]["step"]
    chosen = [row for row in rows if row["step"] > 0.75 * last and len(row["credit"]) == len(rows[-1]["credit"])]
    sums = torch.tensor([row["credit"] for row in chosen], dtype=torch.float64).sum(0)
    pairs = sum(sum(row["pairs"]) for row in chosen)
    return f"over {pairs:,.0f} pairs, to step {last}", sums


def pace(history: Sequence[dict]) -> tuple[list[int], list[float]]:
    """Return the steps of all rows but the first, and how fast K moved on the way to each of them.

    The pace is the mean |ΔK| over t, per step, as a fraction of the last row's mean |K|. It is not a fraction of the K at the time: by
    that measure, even a correction that grows for ever would settle.
    """
    size = sum(map(abs, history[-1]["correction"])) if history else 0.0
    if not size:
        return [], []
    steps, moved = [], []
    for before, after in itertools.pairwise(history):
        distance = sum(abs(b - a) for a, b in zip(before["correction"], after["correction"], strict=True))
        steps.append(after["step"])
        moved.append(distance / size / (after["step"] - before["step"]))
    return steps, moved


def _tenths(credit: Tensor) -> list[float]:
    """Return each tenth's share of the credit, (10,)."""
    tenth = torch.arange(len(credit)) * 10 // len(credit)
    return (torch.zeros(10, dtype=torch.float64).index_add_(0, tenth, credit) / credit.sum().clamp_min(1e-300)).tolist()


def summary(found: dict[str, Profile]) -> list[tuple[str, str, str, str]]:
    """Return a table's rows: objective, timestep of the peak, range of the middle half of the credit, share of saturated timesteps."""
    rows = []
    for name, profile in found.items():
        low, high = profile.middle_half()
        saturated = ((profile.push < SATURATED) | (profile.push > 1 - SATURATED)).double().mean()
        flat = bool((profile.credit.max() - profile.credit.min()) < 1e-9 * profile.credit.max())
        rows.append(
            (
                name,
                "flat" if flat else str(profile.peak),
                f"{low} to {high}",
                "-" if profile.push.isnan().any() else f"{saturated:.0%}",
            )
        )
    return rows


def _credit(axis, found: dict[str, Profile]) -> None:
    for name, profile in found.items():
        (line,) = axis.plot(profile.credit / profile.credit.max().clamp_min(1e-300), label=name)
        if profile.credit.max() > profile.credit.min() * 1.001:
            axis.plot(profile.peak, 1.0, "o", color=line.get_color(), markersize=4)
    axis.set_ylabel("credit, in parts of its peak")
    axis.set_ylim(0, 1.08)
    axis.set_xlabel("timestep t: clean → noise")
    axis.legend(fontsize=8)


def _tail(weight: Tensor) -> Tensor:
    """Return Σ_{j>t} of ``weight``, (T,)."""
    return torch.cat([weight[1:].flip(0).cumsum(0).flip(0), weight.new_zeros(1)])


def _binned(values: Tensor, count: Tensor, steps: int):
    """Return the centres and the means of bins of buckets, without bins that hold no pair. A bucket weighs by its number of pairs.

    Where there are many buckets, single buckets are too noisy to plot.
    """
    width = -(-len(values) // BINS)
    sums, seen = (_sum_bins(each, width) for each in (values * count, count))
    kept = seen > 0
    centres = (torch.arange(len(seen)) + 0.5) * width * steps / len(values)
    return centres[kept].numpy(), (sums[kept] / seen[kept]).numpy()


def _sum_bins(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, -len(values) % width)).view(-1, width).sum(1)


def _interpolated(centres, values, steps: int):
    import numpy as np

    return np.interp(np.arange(steps), centres, values)


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed, which draws the pictures: pip install -e '.[eval]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _finish(figure, axes, path: Path) -> None:
    for axis in axes:
        axis.set_xlabel("timestep t: clean → noise")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    _pyplot().close(figure)
