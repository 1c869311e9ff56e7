"""Detect known failures of preference training from the metrics of a run."""

from __future__ import annotations

# The largest growth of the winners' error, as a fraction of the reference's error: over all timesteps, and in one tenth of them. A healthy
# run changes this error by a few percent. Where the noise is strong, errors are small, and the mean over all timesteps hides their growth.
DRIFT, DRIFT_IN_A_TENTH = 0.1, 0.25
# The largest path KL, as a fraction of the same sum over the reference's errors. A fraction of 0.1 raises every error by 10 % if the policy
# moved in no particular direction. The path KL also shows a policy that moved far along its errors, which the errors alone do not show.
PATH = 0.25
# The largest shares of pairs that are learnt, and of pairs far on the wrong side.
LEARNT, WRONG = 0.5, 0.25
BROKEN = "the model is being broken, not aligned; lower optimizer.learning_rate, raise objective.beta, or stop earlier"
# The weight of the newest row in the moving average that is judged. Single rows of small batches are noisy.
NEWEST = 0.2


def find_problems(row: dict[str, float]) -> dict[str, str]:
    """Return the problems that a row of ``metrics.jsonl`` shows, as messages by a short name.

    The result is empty for a healthy run, and for objectives without a reference.
    """
    problems = {}
    if "drift/chosen" not in row:
        return problems
    chosen, rejected = (row[f"drift/{side}"] / max(row[f"error/reference_{side}"], 1e-12) for side in ("chosen", "rejected"))
    if chosen > DRIFT:
        problems["drift"] = (
            f"winners' error is {chosen:.0%} above the reference's (losers' {rejected:.0%}) at accuracy {row['rewards/accuracies']:.2f}: {BROKEN}"
        )
    tenths = {name: value for name, value in row.items() if name.startswith("drift_by_t/")}
    worst = max(tenths, key=lambda name: tenths[name], default=None)
    if worst and tenths[worst] > DRIFT_IN_A_TENTH and "drift" not in problems:
        span = worst.removeprefix("drift_by_t/")
        problems["drift by timestep"] = f"winners' error is {tenths[worst]:.0%} above the reference's at timesteps {span}: {BROKEN}"
    path = row.get("drift/path_kl", 0.0) / max(row.get("error/reference_path", 0.0), 1e-12)
    if path > PATH:
        problems["path"] = (
            f"the path KL from the reference is {row['drift/path_kl']:.0f} nats, {path:.0%} of what the reference's own errors come to, at "
            f"accuracy {row['rewards/accuracies']:.2f}: {BROKEN}"
        )
    if row.get("dde/saturated_learnt", 0.0) > LEARNT:
        problems["learnt"] = (
            f"{row['dde/saturated_learnt']:.0%} of the pairs are learnt (σ(-z) below 0.01) and teach nothing more: "
            "lower objective.beta, or stop the run"
        )
    if row.get("dde/saturated_wrong", 0.0) > WRONG:
        problems["wrong"] = (
            f"{row['dde/saturated_wrong']:.0%} of the pairs are far on the wrong side (σ(-z) above 0.99) and push with full weight: "
            "lower objective.beta or optimizer.learning_rate, or leave out the noisiest timesteps with objective.timestep_range"
        )
    return problems


class HealthMonitor:
    """Report each problem when it arises. Report it again only if it went away in between."""

    def __init__(self):
        self._smooth: dict[str, float] = {}
        self._active: set[str] = set()

    def __call__(self, row: dict[str, float]) -> list[str]:
        for name, value in row.items():
            before = self._smooth.get(name, value)
            self._smooth[name] = before + NEWEST * (value - before)
        problems = find_problems(self._smooth)
        fresh = [message for name, message in problems.items() if name not in self._active]
        self._active = set(problems)
        return fresh
