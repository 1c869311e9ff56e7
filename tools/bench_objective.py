"""The fused objective beside the plain formulation, eager and compiled, in one run.

    python tools/bench_objective.py            # prints; --write puts the table into BENCHMARKS.md

Each row times forward and backward of the loss from predictions that are already there. The candidates take turns, and a ratio is
the median of those within a turn. The floor is the bytes that must move, read once and written once, divided by the machine's measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmarks import machine, ratio, record, table, take_turns

from dde_ds.objective.fused import noise_errors
from dde_ds.objective.losses import margin, preference_loss
from dde_ds.objective.objective import build_objective
from dde_ds.objective.schedule import NoiseSchedule, NoiseTarget

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPES = {"SD1.5": (4, 64, 64), "SDXL": (4, 128, 128)}
BETA = 2000.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="pairs of a micro-batch")
    parser.add_argument("--repeats", type=int, default=31, help="at the least: short calls are repeated for a second")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the predictions")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which needs a C++ compiler on a CPU")
    parser.add_argument("--write", action="store_true", help="put the result into BENCHMARKS.md")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)

    bandwidth = copy_bandwidth(device)
    candidates: dict[str, Callable] = {"fused": fused, "eager": eager}
    if not args.no_compile:
        candidates["compiled"] = torch.compile(eager, dynamic=True)
    header = ["model", "pairs", "floor", *(f"{name}" for name in candidates), "fused / floor"]
    header += [f"{name} / fused" for name in candidates if name != "fused"] + [f"peak {name}" for name in candidates]
    rows = []
    for model, shape in SHAPES.items():
        for pairs in args.micro:
            inputs = made_up(shape, pairs, dtype, device)
            floor = moved_bytes(*inputs[:3]) / bandwidth
            calls = {name: (lambda run=run, inputs=inputs: run(*inputs)) for name, run in candidates.items()}
            turns = take_turns(calls, args.repeats, least_seconds=1.0, warm_seconds=0.5)
            times = {name: statistics.median(values) for name, values in turns.items()}
            peaks = [peak_bytes(lambda run=run, inputs=inputs: run(*inputs), device) for run in candidates.values()]
            row = [model, str(pairs), micros(floor), *(micros(value) for value in times.values()), f"{times['fused'] / floor:.1f}"]
            row += [f"{ratio(values, turns['fused'])[0]:.2f}" for name, values in turns.items() if name != "fused"]
            rows.append([*row, *(f"{peak / 2**20:.1f} MiB" for peak in peaks)])
            print(" ".join(rows[-1]), flush=True)
    commits, calls = step_costs(device, dtype, args.repeats)

    text = (
        f"Forward and backward, {args.dtype} predictions, medians of {args.repeats} turns or a second of them; copy bandwidth {bandwidth / 1e9:.1f} GB/s; "
        "floor: bytes ÷ bandwidth. Peak: memory beyond the inputs, the gradient included.\n\n"
        + table(header, rows)
        + "\n\nA whole call of the `dde` objective, with metrics and the correction table's sums, and `commit()`, which ends an optimizer "
        "step (without its all-reduce):\n\n"
        + table(["model", "pairs", "call, forward and backward", "commit()"], [
            [model, str(pairs), micros(call), micros(commit)] for (model, pairs, call), commit in zip(calls, commits, strict=True)
        ])
    )  # fmt: skip
    print(text)
    if args.write:
        record(f"Objective on {machine(device)}", text)
    return 0


def made_up(shape: tuple[int, int, int], pairs: int, dtype: torch.dtype, device: str):
    """Predictions of policy and reference, noise, gain and correction of a micro-batch."""
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(pairs, *shape, device=device, generator=generator)
    reference = (noise.repeat(2, 1, 1, 1) + 0.3 * torch.randn(2 * pairs, *shape, device=device, generator=generator)).to(dtype)
    policy = (reference + 0.01 * torch.randn(2 * pairs, *shape, device=device, generator=generator)).to(dtype).requires_grad_()
    gain, correction = torch.rand(2, pairs, device=device, generator=generator)
    return policy, reference, noise, gain, 1e-3 * correction


def fused(policy: Tensor, reference: Tensor, noise: Tensor, gain: Tensor, correction: Tensor) -> Tensor:
    errors = noise_errors(policy, reference, NoiseTarget(noise))
    loss = preference_loss(-(BETA / 2) * (gain * margin(*errors) + correction))
    return torch.autograd.grad(loss, policy)[0]


def eager(policy: Tensor, reference: Tensor, noise: Tensor, gain: Tensor, correction: Tensor) -> Tensor:
    """As trainers of this family write it: one float32 difference, square and mean per model."""
    target = noise.repeat(2, 1, 1, 1)
    winner, loser = (policy.float() - target.float()).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    with torch.no_grad():
        reference_winner, reference_loser = (reference.float() - target.float()).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    inside = -0.5 * BETA * (gain * ((winner - loser) - (reference_winner - reference_loser)) + correction)
    loss = -F.logsigmoid(inside).mean()
    return torch.autograd.grad(loss, policy)[0]


def moved_bytes(policy: Tensor, reference: Tensor, noise: Tensor) -> int:
    """Forward reads both predictions and the noise; backward reads the policy's and the noise again and writes the gradient."""
    size = {name: tensor.numel() * tensor.element_size() for name, tensor in (("p", policy), ("r", reference), ("n", noise))}
    return size["p"] + size["r"] + size["n"] + 2 * size["p"] + size["n"]


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.empty(2**28 if device == "cuda" else 2**26, device=device).fill_(1.0)
    target = torch.empty_like(source)
    seconds = measure({"copy": lambda: target.copy_(source)}, 10)["copy"]
    return 2 * source.numel() * source.element_size() / seconds


def measure(candidates: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each."""
    turns = take_turns(candidates, repeats, least_seconds=0.3, warm_seconds=0.1)
    return {name: statistics.median(values) for name, values in turns.items()}


def peak_bytes(run: Callable, device: str) -> int:
    """Memory that a call takes at its highest, beyond what was there."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def step_costs(device: str, dtype: torch.dtype, repeats: int) -> tuple[list[float], list[tuple[str, int, float]]]:
    """Seconds of ``commit()`` and of whole calls, by model and pairs: the first must depend on neither."""
    commits, calls = [], []
    for model, shape in SHAPES.items():
        for pairs in (1, 32):
            objective = build_objective("dde", NoiseSchedule.from_scheduler(STABLE_DIFFUSION), beta=BETA).to(device)
            policy, reference, noise, *_ = made_up(shape, pairs, dtype, device)
            timesteps = torch.randint(1000, (pairs,), device=device)

            def call(objective=objective, policy=policy, reference=reference, noise=noise, timesteps=timesteps):
                torch.autograd.grad(objective(policy, reference, noise, timesteps).loss, policy)

            times = measure({"call": call, "commit": objective.commit}, repeats)
            calls.append((model, pairs, times["call"]))
            commits.append(times["commit"])
    return commits, calls


def micros(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs"


if __name__ == "__main__":
    sys.exit(main())
