"""Suggest β by its effect. The same β has a different effect for each objective, because their gains g_t differ by orders of magnitude."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from dde_ds.config import load_config
from dde_ds.errors import UserError
from dde_ds.objective.specs import OBJECTIVES
from dde_ds.rows import is_metrics, read_rows

MARGIN = "rewards/margins"
"""The column of ``metrics.jsonl`` with the mean of -(β/2) g_t m, which is z without the correction."""


class BetaEffect(NamedTuple):
    """The effect of a run's β in its first steps."""

    objective: str
    """The objective's name, with its link and credit where these are not the defaults."""
    beta: float
    mean_z: float
    """The mean of -(β/2) g_t m over the pairs of the rows, which is z without the correction. It is above 0."""
    rows: int
    first: int
    last: int
    """``first`` and ``last`` are the first and the last step of the rows."""
    rate_share: float
    """The mean learning rate of these steps, as a fraction of the rate that the run reaches after its warm-up."""

    def beta_for(self, mean_z: float) -> float:
        """Return the β at which the mean would have been ``mean_z``."""
        return self.beta * mean_z / self.mean_z


def measure_beta(folder: Path, steps: int = 40) -> BetaEffect:
    """Measure the effect of β in the second half of a run's first ``steps`` steps, or of all its steps if the run has made fewer.

    The measure assumes that the margins m do not change with β. The mean of z without the correction is then linear in β. The assumption
    holds while |z| is small: σ(-z) is then near one half, β only scales the gradient, and AdamW's step does not depend on this scale. The
    assumption fails where pairs are saturated, so take few steps. It also fails where β is so low that gradients vanish beside AdamW's ε.
    The learning rate and the warm-up must stay the same.

    The correction is left out. It is the same offset for all pairs of a timestep, it begins at 0, and not every objective has one.

    Raises:
        UserError: ``folder`` is no run folder, ``steps`` is below 1, the objective has no reference, no row lies in these steps, or the mean
            is not above 0.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run {folder}: no config.yaml there; name the output folder of a run")
    if steps < 1:
        raise UserError(f"steps {steps}: must be 1 or more")
    run = load_config(folder / "config.yaml")
    objective = run.objective
    if objective.name in OBJECTIVES and not OBJECTIVES[objective.name].needs_reference:
        raise UserError(f"run {folder}: {objective.name} compares with no reference and has no z")
    if objective.name in OBJECTIVES and OBJECTIVES[objective.name].own_loss:
        raise UserError(f"run {folder}: {objective.name} has a loss of its own, which does not follow from z")
    if objective.link == "ipo":
        raise UserError(f"run {folder}: the link ipo pulls every z to 1/2, whatever β is; β sets the margin 1/(2β) itself")
    rows = read_rows(folder / "metrics.jsonl", is_metrics)
    steps = min(steps, max((row["step"] for row in rows), default=steps))
    begin = steps // 2
    # A row is the mean over the steps since the row before.
    spans, before = [], 0
    for row in rows:
        if begin < row["step"] <= steps and math.isfinite(row.get(MARGIN, math.nan)):
            spans.append((row["step"], row["step"] - before, row[MARGIN]))
        before = row["step"]
    if not spans:
        there = [row["step"] for row in rows if MARGIN in row]
        known = f"the first row with one is of step {there[0]}" if there else "the run has none yet"
        raise UserError(f"run {folder}: no row of metrics.jsonl for steps {begin + 1} to {steps} holds {MARGIN}; {known}")
    mean = sum(length * value for _, length, value in spans) / sum(length for _, length, _ in spans)
    if mean <= 0:
        raise UserError(
            f"run {folder}: the mean z is {mean:.4g} in steps {spans[0][0]} to {spans[-1][0]}, not above 0: its pairs are not ahead, and no β "
            "changes that; take more steps, or larger batches"
        )
    begin = spans[0][0] - spans[0][1]
    rates = [run.optimizer.rate(step) for step in range(begin, spans[-1][0])]
    share = sum(rates) / len(rates) / run.optimizer.learning_rate
    name = " ".join(
        [
            objective.name,
            *(
                f"{key} {value}"
                for key, value, plain in (("link", objective.link, "logistic"), ("credit", objective.credit, "pair"))
                if value != plain
            ),
        ]
    )
    return BetaEffect(name, objective.beta, mean, len(spans), spans[0][0], spans[-1][0], share)
