"""Known ways in which preference training goes wrong, told from the metrics while it runs."""

from __future__ import annotations

# Share of the reference's error by which the winners' may grow, over all timesteps and in a tenth of them. A healthy run moves it by a
# few percent. Where the noise is strong errors are small, and the mean over all hides what happens there.
DRIFT, DRIFT_IN_A_TENTH = 0.1, 0.25
# Path KL in parts of the same sum of the reference's errors: 0.1 is what would raise every error by 10 % if the policy moved in no particular
# direction. It also shows a policy that moved far along its errors, which these alone do not.
PATH = 0.25
# Shares of pairs that are learnt, and far on the wrong side.
LEARNT, WRONG = 0.5, 0.25
BROKEN = "the model is being broken, not aligned; lower optimizer.learning_rate, raise objective.beta, or stop earlier"
# Weight of the newest row in what is judged: single rows of small batches are noisy.
NEWEST = 0.2


def find_problems(row: dict[str, float]) -> dict[str, str]:
    """What is wrong with a row of ``metrics.jsonl``, by a short name. Empty where all is well, and for ``sft``."""
    found = {}
    if "drift/chosen" not in row:
        return found
    chosen, rejected = (row[f"drift/{side}"] / max(row[f"error/reference_{side}"], 1e-12) for side in ("chosen", "rejected"))
    if chosen > DRIFT:
        found["drift"] = (
            f"winners' error is {chosen:.0%} above the reference's (losers' {rejected:.0%}) at accuracy {row['rewards/accuracies']:.2f}: {BROKEN}"
        )
    tenths = {name: value for name, value in row.items() if name.startswith("drift_by_t/")}
    worst = max(tenths, key=lambda name: tenths[name], default=None)
    if worst and tenths[worst] > DRIFT_IN_A_TENTH and "drift" not in found:
        span = worst.removeprefix("drift_by_t/")
        found["drift by timestep"] = f"winners' error is {tenths[worst]:.0%} above the reference's at timesteps {span}: {BROKEN}"
    path = row.get("drift/path_kl", 0.0) / max(row.get("error/reference_path", 0.0), 1e-12)
    if path > PATH:
        found["path"] = (
            f"the path KL from the reference is {row['drift/path_kl']:.0f} nats, {path:.0%} of what the reference's own errors come to, at "
            f"accuracy {row['rewards/accuracies']:.2f}: {BROKEN}"
        )
    if row.get("dde/saturated_learnt", 0.0) > LEARNT:
        found["learnt"] = (
            f"{row['dde/saturated_learnt']:.0%} of the pairs are learnt (σ(-z) below 0.01) and teach nothing more: "
            "lower objective.beta, or stop the run"
        )
    if row.get("dde/saturated_wrong", 0.0) > WRONG:
        found["wrong"] = (
            f"{row['dde/saturated_wrong']:.0%} of the pairs are far on the wrong side (σ(-z) above 0.99) and push with full weight: "
            "lower objective.beta or optimizer.learning_rate, or leave out the noisiest timesteps with objective.timestep_range"
        )
    return found


class HealthMonitor:
    """Says each concern when it arises, and again only after it had gone."""

    def __init__(self):
        self._smooth: dict[str, float] = {}
        self._active: set[str] = set()

    def __call__(self, row: dict[str, float]) -> list[str]:
        for name, value in row.items():
            before = self._smooth.get(name, value)
            self._smooth[name] = before + NEWEST * (value - before)
        found = find_problems(self._smooth)
        fresh = [message for name, message in found.items() if name not in self._active]
        self._active = set(found)
        return fresh
