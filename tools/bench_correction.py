"""Measure how near the correction's table comes to the true correction, and what stratified timesteps do, on the demo's pairs.

    python tools/bench_correction.py --shards demo_run/shards            # trains as launchers/demo/train.yaml does, then measures

One process trains the demo in plain PyTorch and keeps every timestep and margin that training sees. Each estimator gets exactly these
timesteps and margins. The true K_t = Σ_{j>t} λ_j E[m_j] is that of the final policy, evaluated on the same number of pairs at every
timestep. Batches drawn from these evaluations show the variance that remains with stratified timesteps.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from benchmarks import machine, record, table
from torch import Tensor

from dde_ds.config import RunConfig, load_config
from dde_ds.data.order import Order
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset
from dde_ds.data.shards import ShardSet
from dde_ds.demo.parts import BASE, TRAIN
from dde_ds.errors import UserError
from dde_ds.models.silence import silence_libraries
from dde_ds.models.unet import load_unet
from dde_ds.objective.correction import CorrectionTable
from dde_ds.objective.losses import logistic_loss
from dde_ds.objective.objective import Objective
from dde_ds.training.batches import Batch
from dde_ds.training.prepare import build_run_objective
from dde_ds.training.reference import frozen_model
from dde_ds.training.step import errors_of, micro_step

BUCKETS = (1, 20, 50, 1000)
SHOWN = (100, 300, 500, 700)
BELOW = 900  # Above, K is the sum of a few last terms and passes through 0.
REPEATS, REMEMBERED = 1000, 50  # The number of drawn runs, and the steps of each: at ρ = 0.9, older steps weigh half a percent.
Seen = list[tuple[Tensor, Tensor]]
"""Timesteps and margins, (B,) each, of every optimizer step."""


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    arguments.add_argument(
        "--shards", type=Path, required=True, help="of the demo's training pairs: make demo writes demo_run/shards"
    )
    arguments.add_argument("--pairs", type=int, default=8, help="evaluated at each timestep; default: 8")
    arguments.add_argument("--write", action="store_true", help="put the tables into BENCHMARKS.md")
    arguments.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of launchers/demo/train.yaml")
    args = arguments.parse_args()
    try:
        text = measure(load_config(TRAIN, [f"model.path={BASE}", f"data.path={args.shards}", *args.overrides]), args.pairs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    if args.write:
        record(f"The correction's table, {machine(str(device()))}", text)
    return 0


def measure(run: RunConfig, pairs: int) -> str:
    """Train, evaluate, and return both tables as Markdown."""
    silence_libraries()
    objective = build_run_objective(run).to(device())
    dataset = open_pairs(run, objective)
    policy, reference = (load_unet(run.model.path).to(device()) for _ in range(2))
    reference.requires_grad_(False).eval()
    seen = train(run, objective, dataset, policy, reference)
    margins = evaluate(objective, dataset, policy.eval(), reference, pairs, run.batch.micro_batch_size)
    true, error = true_correction(objective, margins)
    return (
        f"{run.steps} steps of {run.batch.pairs} pairs as in launchers/demo/train.yaml, β = {run.objective.beta:g}. True K: "
        f"{pairs} pairs at each of {len(margins)} timesteps, standard error {error[SHOWN[0]] / abs(true[SHOWN[0]]):.1%} at t = {SHOWN[0]}.\n\n"
        + estimators(objective, seen, true, run.objective.correction_ema)
        + "\n\n"
        + variances(run, objective, margins)
    )


def open_pairs(run: RunConfig, objective: Objective) -> PairDataset:
    assert run.data.path  # The command line gives this path.
    shards = ShardSet(run.data.path)
    draws = PairRng(run.seed, objective.timestep_probabilities, caption_dropout=run.data.caption_dropout)
    return PairDataset(shards, Order(shards.counts, run.seed, run.data.block_shards), draws)


def train(run: RunConfig, objective: Objective, dataset: PairDataset, policy, reference) -> Seen:
    """Train the run in one process, and return the timesteps and margins that its correction table received."""
    seen, step_seen = [], []
    add = objective.table.add

    def add_and_keep(timesteps: Tensor, margin: Tensor, errors: Tensor) -> None:
        step_seen.append((timesteps, margin.double()))
        add(timesteps, margin, errors)

    objective.table.add = add_and_keep
    options, micro = run.optimizer, run.batch.micro_batch_size
    optimizer = torch.optim.AdamW(policy.parameters(), betas=options.betas, eps=options.eps, weight_decay=options.weight_decay)
    started = time.perf_counter()
    for step in range(run.steps):
        for low in range(step * run.batch.pairs, (step + 1) * run.batch.pairs, micro):
            batch = batch_of(dataset, range(low, low + micro))
            out = micro_step(policy, frozen_model(reference), objective, batch, device())
            (out.loss * micro / run.batch.pairs).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), options.max_grad_norm)
        optimizer.param_groups[0]["lr"] = options.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        objective.commit()
        seen.append(tuple(torch.cat(parts).cpu() for parts in zip(*step_seen, strict=True)))
        step_seen.clear()
        if (step + 1) % 20 == 0:
            say(f"step {step + 1} of {run.steps}", started)
    return seen


def evaluate(objective: Objective, dataset: PairDataset, policy, reference, pairs: int, micro: int) -> Tensor:
    """Return the policy's margins, (T,pairs) float64, on ``pairs`` pairs at every timestep, each with its own noise."""
    steps = objective.schedule.num_train_timesteps
    timesteps = torch.arange(steps).repeat(pairs)
    margins, started = [], time.perf_counter()
    for low in range(0, len(timesteps), 4 * micro):
        chosen = timesteps[low : low + 4 * micro]
        # Use positions far beyond training's, to get other noise. A prime stride pairs each timestep with different images every time.
        batch = batch_of(dataset, [10**7 + 7919 * (low + i) for i in range(len(chosen))], timesteps=chosen)
        errors = [
            errors_of(frozen_model(model), objective.schedule, batch, device(), torch.float32).double().cpu().view(2, -1)
            for model in (policy, reference)
        ]
        moved = errors[0] - errors[1]
        margins.append(moved[0] - moved[1])
        if low // (4 * micro) % 50 == 49:
            say(f"{low} of {len(timesteps)} evaluations", started)
    return torch.cat(margins).view(pairs, steps).T


def batch_of(dataset: PairDataset, positions, **changes) -> Batch:
    return Batch(**{**dataset.collate([dataset.pair(position) for position in positions]), **changes})


def true_correction(objective: Objective, margins: Tensor) -> tuple[Tensor, Tensor]:
    """Return K_t of the evaluated margins, (T,), and its standard error, (T,)."""
    weight = objective.table.weight.cpu()
    variance = margins.var(1) / margins.shape[1]
    return tail(weight * margins.mean(1)), tail(weight.square() * variance).sqrt()


def estimators(objective: Objective, seen: Seen, true: Tensor, ema: float) -> str:
    weight = objective.table.weight.cpu()
    rows = {
        f"one entry a timestep, ρ {rho:g} per observation (the old rule)": per_observation(weight, seen, rho)
        for rho in (0.9, 0.99, 0.0)
    }
    rows |= {f"{count} bucket{'s' * (count > 1)}, ρ {ema:g} per step": in_buckets(weight, seen, ema, count) for count in BUCKETS}
    cells = []
    for name, found in rows.items():
        error = ((found - true)[:BELOW].square().mean() / true[:BELOW].square().mean()).sqrt()
        cells.append([name, *(f"{found[t] / true[t]:.2f}" for t in SHOWN), f"{error:.2f}"])
    return table(["estimator", *(f"K / true, t = {t}" for t in SHOWN), f"RMSE / RMS of the true K, t < {BELOW}"], cells)


def in_buckets(weight: Tensor, seen: Seen, ema: float, count: int) -> Tensor:
    """Return the correction of the library's own table, (T,)."""
    correction_table = CorrectionTable(weight, ema, count)
    for timesteps, margins in seen:
        correction_table.add(timesteps, margins, margins.new_zeros(4, len(margins)))
        correction_table.commit()
    return correction_table.correction


def per_observation(weight: Tensor, seen: Seen, rho: float) -> Tensor:
    """Return the correction by the rule of earlier versions, (T,).

    By this rule, only steps that see a timestep move its entry. The first such step sets the entry.
    """
    average, known = torch.zeros_like(weight), torch.zeros(len(weight), dtype=torch.bool)
    for timesteps, margins in seen:
        count = torch.zeros_like(weight).index_add_(0, timesteps, torch.ones_like(margins))
        mean = torch.zeros_like(weight).index_add_(0, timesteps, margins) / count.clamp_min(1)
        moved = torch.where(known, rho * average + (1 - rho) * mean, mean)
        average = torch.where(count > 0, moved, average)
        known |= count > 0
    return tail(weight * average)


def variances(run: RunConfig, objective: Objective, margins: Tensor) -> str:
    """Return a table of variances over repetitions: with stratified timesteps, as a fraction of those with independent timesteps.

    Batches are drawn from ``margins`` by bootstrap.
    """
    weight, gain = objective.table.weight.cpu(), objective.schedule.single_shot_weight.cpu()
    correction, count = objective.table.correction.cpu(), run.objective.correction_buckets
    steps, rows = len(margins), []
    generator = torch.Generator().manual_seed(0)

    def independent(count: int) -> Tensor:
        return torch.randint(steps, (count,), generator=generator)

    def stratified(count: int) -> Tensor:
        """Draw timesteps like `PairRng` under uniform p(t): a permutation for each stratum, from a random start in the first."""
        strata = [torch.randperm(steps, generator=generator) for _ in range(count // steps + 2)]
        first = int(torch.randint(steps, (), generator=generator))
        return torch.cat(strata)[first : first + count]

    for size in (32, 256, 2048):
        spread = {}
        for kind in (independent, stratified):
            losses, found = [], []
            for _ in range(REPEATS):
                t = kind(size * REMEMBERED)
                m = margins[t, torch.randint(margins.shape[1], (len(t),), generator=generator)]
                seen = list(zip(t.split(size), m.split(size), strict=True))
                t, m = seen[-1]
                z = -(run.objective.beta / 2) * (gain[t] * m + run.objective.correction_weight * correction[t])
                losses.append(logistic_loss(z).mean())
                found.append(in_buckets(weight, seen, run.objective.correction_ema, count)[list(SHOWN)])
            spread[kind.__name__] = (torch.stack(losses).var(), torch.stack(found).var(0))
        (loss, k), (loss_before, k_before) = spread["stratified"], spread["independent"]
        rows.append([str(size), f"{loss / loss_before:.2f}", *(f"{ratio:.2f}" for ratio in (k / k_before).tolist())])
    header = ["pairs a step", "loss of a step", *(f"K, t = {t}" for t in SHOWN)]
    return (
        "Variance with stratified timesteps, in parts of that with independent ones; pairs and margins of the final policy, drawn anew "
        f"in each repetition, {count} buckets. {REPEATS:,} drawn runs each: a ratio of normal variables would have a standard error of {2 / REPEATS**0.5:.2f}, heavier tails have more:\n\n"
        + table(header, rows)
    )


def tail(values: Tensor) -> Tensor:
    """Return Σ_{j>t} of ``values``, (T,)."""
    return torch.cat([values[1:].flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def say(what: str, started: float) -> None:
    print(f"[{time.perf_counter() - started:5.0f} s] {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
