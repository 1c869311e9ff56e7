"""Turn the results of ``compare_objectives.py`` into one table and one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks import table

from dde_ds.evaluation.compare import bootstrap_interval, paired_difference, win_rate
from dde_ds.objective.specs import OBJECTIVES

WITHOUT_BETA = {name for name, spec in OBJECTIVES.items() if not spec.needs_reference}


def summarise(results: Sequence[dict], base: dict, dde: Sequence[dict | None] = ()) -> dict:
    """Summarise one model's results over its seeds, against the base and, if they are given, DDE's results of the same seeds.

    Intervals are 95 % bootstraps of the mean over seeds. They resample captions, or pairs for the errors. They do not cover that
    another seed ends elsewhere; ``by_seed`` shows that.
    """
    base_logits = torch.tensor(base["logits"])
    wins = [_wins(result, base_logits) for result in results]
    logits = torch.cat([torch.tensor(result["logits"]) for result in results], 1)
    spread = torch.cat([torch.tensor(result["spread"]) for result in results], 1)
    summary = {
        "win_rate": vars(win_rate(logits, base_logits.repeat(1, len(results)))) | {"by_seed": [float(one.mean()) for one in wins]},
        "preferred_style": float((logits > 0).double().mean()),
        "frechet_distance": _over_seeds([result["frechet_distance"] for result in results]),
        "latent_spread": _mean(spread.double().mean(1)),
    }
    for side in ("chosen", "rejected"):
        error = torch.tensor(base[side], dtype=torch.float64)
        drifts = [torch.tensor(result[side], dtype=torch.float64) - error for result in results]
        # The drift is in parts of the base's mean error.
        drift = _mean(torch.stack(drifts).mean(0) / error.mean())
        summary[f"{side}_drift"] = drift | {"by_seed": [float(one.mean() / error.mean()) for one in drifts]}
    compared = [result for result in dde if result]
    if compared and len(compared) == len(dde):
        other = torch.cat([_wins(result, base_logits) for result in compared], 1)
        difference = paired_difference(torch.cat(wins, 1), other)
        summary["win_rate_minus_dde"] = {key: getattr(difference, key) for key in ("mean", "low", "high")}
    return summary


def markdown(summary: dict) -> str:
    shown, base = summary["settings"], summary["base"]
    seeds = f"{len(summary['seeds'])} seeds" if len(summary["seeds"]) != 1 else "1 seed"
    if len(summary["seeds"]) < summary["seeds_asked_for"]:
        seeds += f" of {summary['seeds_asked_for']}: **not finished**, the same command goes on"
    header = ["", "β, learning rate", "win rate over the base", "by seed", "minus `dde`", "Fréchet distance", "latent spread"]
    header += ["winners' error", "losers' error"]
    plain = ["base", "", "", "", "", f"{base['frechet_distance']['mean']:.2f}", f"{base['latent_spread']['mean']:.3f}", "", ""]
    strayed = {one["objective"] for one in summary["tuning"] if one["chosen"] and not one["as_near_as_base"]}
    rows = [plain, *(_row(name, one, name.split()[0] in strayed) for name, one in summary["variants"].items())]
    note = "\\*: no setting tried was as near to the preferred images as the base; the one that won most was taken.\n\n"
    cpu = summary["cpu_minutes"]
    minutes = f"{'' if cpu['whole'] else 'at least '}{cpu['training']:.0f} + {cpu['scoring']:.0f} minutes"
    return (
        f"{shown['captions']} held-out captions, {shown['images']} image{'s' * (shown['images'] > 1)} each in "
        f"{shown['inference_steps']} DDIM steps; {seeds}; "
        f"{shown['steps']} steps of {shown['pairs']} pairs a run; {summary['runs']} trainings and base drawings, "
        f"{minutes} of processor time for training and scoring.\n\n"
        f"{table(header, rows)}\n\n{note if strayed else ''}"
        f"Chosen among, on {shown['tuning_captions']} training captions (win rate, Fréchet distance; in bold what was taken):\n\n"
        f"{_tuning_table(summary['tuning'])}\n"
    )


def figure(summary: dict, path: Path) -> None:
    """Draw win rate, Fréchet distance and winners' drift, one line for each variant: what is won, and what it costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(summary["variants"])
    lines = range(len(names))
    panels = {
        "win rate over the base, %": ("win_rate", "rate", 100, 50),
        "Fréchet distance to preferred images": ("frechet_distance", "mean", 1, summary["base"]["frechet_distance"]["mean"]),
        "winners' error against the base's, %": ("chosen_drift", "mean", 100, 0),
    }
    drawn, axes = plt.subplots(1, 3, figsize=(11, 0.34 * len(names) + 1.2), dpi=100, sharey=True)
    for axis, (title, (key, mean, scale, base)) in zip(axes, panels.items(), strict=True):
        entries = [summary["variants"][name][key] for name in names]
        axis.axvline(base, color="0.6", linewidth=1, linestyle="--")
        for line, one in zip(lines, entries, strict=True):
            if "low" in one:
                axis.plot([scale * one["low"], scale * one["high"]], [line, line], color="C0", linewidth=2)
            axis.plot([scale * value for value in one["by_seed"]], [line] * len(one["by_seed"]), "o", color="0.5", markersize=3)
        axis.plot([scale * one[mean] for one in entries], lines, "D", color="C0", markersize=5)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="y", color="0.92")
    axes[0].set_yticks(lines, names)
    axes[0].invert_yaxis()
    drawn.tight_layout()
    drawn.savefig(path)
    plt.close(drawn)


def _row(name: str, one: dict, strayed: bool) -> list[str]:
    win, distance, spread = one["win_rate"], one["frechet_distance"], one["latent_spread"]
    minus = one.get("win_rate_minus_dde")
    strength = f"{one['beta']:g}, " if name not in WITHOUT_BETA else ""
    return [
        f"`{name}`" + r" \*" * strayed,
        f"{strength}{one['rate']:g}",
        f"{win['rate']:.1%} [{win['low']:.1%}, {win['high']:.1%}]",
        ", ".join(f"{rate:.1%}" for rate in win["by_seed"]),
        ""
        if minus is None or name == "dde"
        else f"{100 * minus['mean']:+.1f} [{100 * minus['low']:+.1f}, {100 * minus['high']:+.1f}]",
        f"{distance['mean']:.2f} ({min(distance['by_seed']):.2f} to {max(distance['by_seed']):.2f})",
        f"{spread['mean']:.3f}",
        *(
            f"{one[key]['mean']:+.1%} [{one[key]['low']:+.1%}, {one[key]['high']:+.1%}]"
            for key in ("chosen_drift", "rejected_drift")
        ),
    ]


def _tuning_table(tuning: list[dict]) -> str:
    settings = list(dict.fromkeys((one["beta"], one["rate"]) for one in tuning))
    rows: dict[str, list[str]] = {one["objective"]: [""] * len(settings) for one in tuning}
    for one in tuning:
        cell = f"{one['win_rate']:.1%}, {-one['minus_frechet_distance']:.2f}"
        cell += "" if one["as_near_as_base"] else " (farther than the base)"
        rows[one["objective"]][settings.index((one["beta"], one["rate"]))] = f"**{cell}**" if one["chosen"] else cell
    header = ["", *(f"β {beta:g}, {rate:g}" for beta, rate in settings)]
    return table(header, [[f"`{name}`", *cells] for name, cells in rows.items()])


def _wins(result: dict, base: torch.Tensor) -> torch.Tensor:
    """Return (captions, images): 1 for a win, 0.5 for a tie, 0 for a loss."""
    logits = torch.tensor(result["logits"])
    return (logits > base).double() + 0.5 * (logits == base).double()


def _mean(values: torch.Tensor) -> dict:
    low, high = bootstrap_interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high}


def _over_seeds(values: list[float]) -> dict:
    return {"mean": sum(values) / len(values), "by_seed": values}
