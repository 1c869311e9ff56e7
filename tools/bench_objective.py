"""Measure the fused objective beside the plain formulation, eager and compiled, in one run.

    python tools/bench_objective.py            # prints; --write puts the tables into BENCHMARKS.md

Each row times the loss forward and backward, from given predictions. The candidates take turns. A ratio is the median of the ratios
within a turn, with its quartiles. The floor divides the bytes that must be read and written once by the device's measured copy
bandwidth. On a GPU the calls use several copies of the inputs in turn, so that the cache never holds what a call reads.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmarks import machine, ratio, record, table, take_turns

from dde_ds.distributed.process import end_process
from dde_ds.objective.fused import noise_errors
from dde_ds.objective.losses import logistic_loss, margin
from dde_ds.objective.objective import Objective, build_objective
from dde_ds.objective.schedule import NoiseSchedule, NoiseTarget

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPES = {"SD1.5": (4, 64, 64), "SDXL": (4, 128, 128)}
BETA = 2000.0
# So many bytes of inputs fit into no GPU's cache (50 MB on Hopper). Smaller inputs are copied to reach them, at most so many times.
UNCACHED, MOST_COPIES = 256e6, 64
# The tolerance between two gradients, by the type of the predictions, in which the last bit may differ. It is in parts of each
# value; a thousandth of it, in parts of the largest value, is allowed too.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-3}
LEAST_SECONDS = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="pairs of a micro-batch")
    parser.add_argument("--repeats", type=int, default=31, help="at the least: short calls are repeated for a second")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the predictions")
    parser.add_argument("--device", choices=("cpu", "cuda"), action="append", help="repeatable; default: all that there are")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which needs a C++ compiler on a CPU")
    parser.add_argument("--write", action="store_true", help="put the result into BENCHMARKS.md")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    for device in args.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        print(f"# {machine(device)}", flush=True)
        text = "\n\n".join([losses(args, dtype, device), whole_calls(args, dtype, device)])
        if device == "cpu":
            seconds, size = commit_on_two_ranks(args.repeats)
            text += f"\n\n`commit()` on two gloo ranks: {micros(seconds)}, with an all-reduce of {size:,} bytes."
        print(text)
        if args.write:
            record(f"Objective, {args.dtype} predictions, on {machine(device)}", text)
    return 0


def losses(args: argparse.Namespace, dtype: torch.dtype, device: str) -> str:
    """Time the candidates, and return their table."""
    bandwidth = copy_bandwidth(device)
    candidates: dict[str, Callable] = {"fused": fused, "eager": eager}
    if not args.no_compile:
        candidates["compiled"] = torch.compile(eager, dynamic=True)
    profiled = ["fused", "eager"] if device == "cuda" else []
    header = ["model", "pairs", "MB moved", "floor", *candidates, "fused / floor"]
    header += [f"{name} / fused" for name in candidates if name != "fused"] + [f"peak {name}" for name in candidates]
    header += [column for name in profiled for column in (f"{name}, device time", f"{name}, device time / floor")]
    rows = []
    for model, pairs in itertools.product(SHAPES, list[int](args.micro)):
        shape = SHAPES[model]
        inputs = uncached(shape, pairs, dtype, device)
        compare(candidates, inputs[0])
        moved = moved_bytes(*inputs[0][:3])
        floor = moved / bandwidth
        turning = itertools.cycle(inputs)  # one cycle for all, so that no candidate finds in a cache what another has just read
        calls = {name: (lambda run=run, turning=turning: run(*next(turning))) for name, run in candidates.items()}
        turns = take_turns(calls, args.repeats, device, least_seconds=LEAST_SECONDS, warm_seconds=LEAST_SECONDS / 2)
        times = {name: statistics.median(values) for name, values in turns.items()}
        row = [
            model,
            str(pairs),
            f"{moved / 1e6:.1f}",
            micros(floor),
            *map(micros, times.values()),
            f"{times['fused'] / floor:.1f}",
        ]
        row += ["{:.2f} ({:.2f}–{:.2f})".format(*ratio(turns[name], turns["fused"])) for name in candidates if name != "fused"]
        row += [f"{peak_bytes(call, device) / 2**20:.1f} MiB" for call in calls.values()]
        for name in profiled:
            seconds = device_seconds(calls[name], device)
            row += [micros(seconds), f"{seconds / floor:.2f}"]
        rows.append(row)
        print(" ".join(row), flush=True)
    return (
        f"Forward and backward, {args.dtype} predictions, medians of {args.repeats} turns or a second of them, ratios with their quartiles; "
        f"copy bandwidth {bandwidth / 1e9:.1f} GB/s; floor: bytes ÷ bandwidth. Peak: memory beyond the inputs, the gradient included."
        + (f" Inputs: as many copies as exceed {UNCACHED / 1e6:.0f} MB, at most {MOST_COPIES}." if device == "cuda" else "")
        + f"\n\n{table(header, rows)}"
    )


def made_up(shape: tuple[int, int, int], pairs: int, dtype: torch.dtype, device: str):
    """Make up a micro-batch: predictions of policy and reference, noise, gain and correction."""
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(pairs, *shape, device=device, generator=generator)
    reference = (noise.repeat(2, 1, 1, 1) + 0.3 * torch.randn(2 * pairs, *shape, device=device, generator=generator)).to(dtype)
    policy = (reference + 0.01 * torch.randn(2 * pairs, *shape, device=device, generator=generator)).to(dtype).requires_grad_()
    gain, correction = torch.rand(2, pairs, device=device, generator=generator)
    return policy, reference, noise, gain, 1e-3 * correction


def uncached(shape: tuple[int, int, int], pairs: int, dtype: torch.dtype, device: str) -> list[tuple[Tensor, ...]]:
    """Make up inputs. On a GPU, make so many copies of them that its cache does not hold them all."""
    first = made_up(shape, pairs, dtype, device)
    size = sum(tensor.nbytes for tensor in first)
    copies = min(MOST_COPIES, int(UNCACHED // size) + 1) if device == "cuda" else 1
    return [first, *(made_up(shape, pairs, dtype, device) for _ in range(copies - 1))]


def fused(policy: Tensor, reference: Tensor, noise: Tensor, gain: Tensor, correction: Tensor) -> Tensor:
    error, reference_error = noise_errors(policy, reference, NoiseTarget(noise))
    assert reference_error is not None  # since a reference was given
    loss = logistic_loss(-(BETA / 2) * (gain * margin(error, reference_error) + correction)).mean()
    return torch.autograd.grad(loss, policy)[0]


def eager(policy: Tensor, reference: Tensor, noise: Tensor, gain: Tensor, correction: Tensor) -> Tensor:
    """Compute the gradient as trainers of this family write it: one float32 difference, square and mean for each model."""
    target = noise.repeat(2, 1, 1, 1)
    winner, loser = (policy.float() - target.float()).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    with torch.no_grad():
        reference_winner, reference_loser = (reference.float() - target.float()).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    inside = -0.5 * BETA * (gain * ((winner - loser) - (reference_winner - reference_loser)) + correction)
    loss = -F.logsigmoid(inside).mean()
    return torch.autograd.grad(loss, policy)[0]


def compare(candidates: dict[str, Callable], inputs: tuple[Tensor, ...]) -> None:
    """Refuse candidates that do not compute the same gradient, because then their times say nothing."""
    expected = eager(*inputs)
    tolerance = TOLERANCE[expected.dtype]
    for name, run in candidates.items():
        torch.testing.assert_close(
            run(*inputs),
            expected,
            rtol=tolerance,
            atol=1e-3 * tolerance * expected.abs().max().item(),
            msg=lambda told, name=name: f"{name}: {told}",
        )


def moved_bytes(policy: Tensor, reference: Tensor, noise: Tensor) -> int:
    """Return the bytes that must move.

    The forward pass reads both predictions and the noise. The backward pass reads the policy's prediction and the noise again, and
    writes the gradient.
    """
    return policy.nbytes + reference.nbytes + noise.nbytes + 2 * policy.nbytes + noise.nbytes


def copy_bandwidth(device: str) -> float:
    """Return the bytes a second, read and written, of a copy that is too large for any cache."""
    source = torch.empty(2**28 if device == "cuda" else 2**26, device=device).fill_(1.0)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), 10, device)


def measure(run: Callable, repeats: int, device: str) -> float:
    """Return the median seconds of a call, in a loop of its own."""
    return statistics.median(take_turns({"": run}, repeats, device, 0.3 * LEAST_SECONDS, 0.1 * LEAST_SECONDS)[""])


def peak_bytes(run: Callable, device: str) -> int:
    """Return the most bytes of memory that a call takes, beyond those allocated before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = highest = 0
    for event in profiler.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]  # it has run
        if event.name() == "[memory]":
            now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]  # PyTorch's stub is not complete
            highest = max(highest, now)
    return highest


def device_seconds(run: Callable, device: str, calls: int = 20) -> float:
    """Return the seconds that a call keeps the device busy, without the time in which the device waits for the host.

    This is the sum over the call's kernels, or on a CPU over its operators.
    """
    on_gpu = device == "cuda"
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    run()
    wait()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            run()
        wait()
    attribute, kind = ("self_device_time_total", DeviceType.CUDA) if on_gpu else ("self_cpu_time_total", DeviceType.CPU)
    return sum(getattr(event, attribute) for event in profiler.key_averages() if event.device_type == kind) * 1e-6 / calls


def whole_calls(args: argparse.Namespace, dtype: torch.dtype, device: str) -> str:
    """Time the objective as a training loop calls it, and return the table."""
    rows = []
    for (model, shape), pairs in itertools.product(SHAPES.items(), (1, 32)):
        objective = new_objective().to(device)
        policy, reference, noise, *_ = made_up(shape, pairs, dtype, device)
        timesteps = torch.randint(1000, (pairs,), device=device)

        def call(objective=objective, policy=policy, reference=reference, noise=noise, timesteps=timesteps):
            torch.autograd.grad(objective(policy, reference, noise, timesteps).loss, policy)

        times = [measure(run, args.repeats, device) for run in (call, objective.commit)]
        rows.append([model, str(pairs), *map(micros, times)])
    return (
        "A whole call of the `dde` objective, with metrics and the correction table's sums, and `commit()`, which ends an optimizer step "
        "(of one rank, which has nothing to all-reduce), each in a loop of its own:\n\n"
        + table(["model", "pairs", "call, forward and backward", "commit()"], rows)
    )


def commit_on_two_ranks(repeats: int) -> tuple[float, int]:
    """Return the median seconds of ``commit()`` on rank 0 of two on this machine, and the bytes that it all-reduces."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one_rank, (folder, 20 * repeats), nprocs=2)
        seconds, size = (Path(folder) / "result").read_text().split()
    return float(seconds), int(size)


def _one_rank(rank: int, folder: str, commits: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    objective = new_objective()
    # No least time is asked for, because the ranks might not reach it in the same turn.
    times = take_turns({"": objective.commit}, commits, "cpu")[""]
    if rank == 0:
        (Path(folder) / "result").write_text(f"{statistics.median(times)} {objective.table._pending.nbytes}")
    end_process(0)


def new_objective() -> Objective:
    return build_objective("dde", NoiseSchedule.from_scheduler(STABLE_DIFFUSION), beta=BETA)


def micros(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs"


if __name__ == "__main__":
    sys.exit(main())
