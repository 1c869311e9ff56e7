"""Measure a training step beside a plain PyTorch and diffusers loop of the same work, in turns.

    python tools/bench_train.py                                     # the demo's model
    python tools/bench_train.py --model sdxl-base --latent 128 --micro 2 --precision bf16 --checkpointing full --zero 2 --compile
    python tools/bench_train.py --unet-config unet.json …           # an architecture with random weights
    python tools/bench_train.py --precomputed                       # with and without a precomputed reference, no plain loop
    python tools/bench_train.py --apart …                           # where both do not fit the memory together

The plain loop is what public Diffusion-DPO scripts do. Policy and reference each make one pass over winners and losers, the loss is in
eager PyTorch, and AdamW follows gradient clipping. Nothing is compiled. Ours is the trainer's whole step: ZeRO, correction table,
agreement of the ranks, metrics, log and heartbeat. Both read made-up pairs from memory, so no disk is measured. Further steps, which
wait for the device after each part, give the split of the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks import machine, ratio, record, table, take_turns
from diffusers import UNet2DConditionModel

from dde_ds.config import load_config
from dde_ds.data.order import Order
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset, RankSlices, micro_batches
from dde_ds.distributed.collectives import any_rank
from dde_ds.distributed.group import start
from dde_ds.distributed.process import end_process
from dde_ds.engine.update import apply_if_finite, gradient_accumulation
from dde_ds.engine.zero import complete_config, initialize
from dde_ds.errors import UserError
from dde_ds.models.checkpointing import set_checkpointing
from dde_ds.models.compute_options import compile_blocks, use_channels_last, use_float32_output
from dde_ds.models.silence import silence_libraries
from dde_ds.models.unet import load_unet, predict
from dde_ds.objective.objective import build_objective
from dde_ds.objective.schedule import NoiseSchedule
from dde_ds.planning.cost import pair_flops
from dde_ds.training.batches import Batch
from dde_ds.training.guards import Guards
from dde_ds.training.heartbeat import Heartbeat
from dde_ds.training.metrics import Averages, RunLog
from dde_ds.training.reference import frozen_model
from dde_ds.training.step import micro_step

ROOT = Path(__file__).resolve().parent.parent
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETA, RATE = 500.0, 1e-6
PAIRS_HELD = 64


class MadeUpShards:
    """Random pairs of a model's shapes, with the methods that :class:`PairDataset` calls on a set of shards."""

    def __init__(self, unet: UNet2DConditionModel, latent: int):
        generator = torch.Generator().manual_seed(0)
        config = unet.config
        self.counters, self.counts = Counter(), [PAIRS_HELD]
        self._latents = torch.randn(PAIRS_HELD, 2, config["in_channels"], latent, latent, generator=generator).half()
        self._text = torch.randn(77, config["cross_attention_dim"], generator=generator).half()
        self._xl = config["addition_embed_type"] == "text_time"
        self._time_ids = torch.tensor([8.0 * latent, 8.0 * latent, 0, 0, 8.0 * latent, 8.0 * latent]).expand(2, 6)
        self._pooled = (
            torch.randn(config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"])
            if self._xl
            else None
        )

    def read(self, shard: int, row: int) -> dict:
        sample = {"latents": self._latents[row], "prompt": torch.tensor(0)}
        return sample | ({"time_ids": self._time_ids} if self._xl else {})

    def prefetch(self, shard: int, row: int) -> None:
        """Do nothing: there is nothing to read ahead."""

    def next_sample(self, shard: int, row: int) -> tuple[int, int]:
        """Return the place of the next pair, round and round. No pair is ever damaged."""
        return shard, (row + 1) % PAIRS_HELD

    def prompt(self, row: int) -> dict:
        return {"prompt_embeds": self._text} | ({} if self._pooled is None else {"pooled": self._pooled.half()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", default=str(ROOT / "launchers" / "demo" / "base"), help="diffusers folder or hub id")
    parser.add_argument(
        "--unet-config", type=Path, help="config.json of a UNet, to be given random weights, in the place of --model"
    )
    parser.add_argument("--latent", type=int, default=16, help="side of the latents")
    parser.add_argument("--micro", type=int, default=8, help="pairs of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=12, help="steps of each that are timed, after three that are not")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--checkpointing", default="none", help="none, selective, every_2, every_3, … or full")
    parser.add_argument("--compile", action="store_true", help="compile our UNets' repeated blocks; the plain loop's never")
    parser.add_argument(
        "--channels-last", action="store_true", help="convolutions of our UNets in (N,H,W,C); the plain loop's never"
    )
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=2, help="ds_configs/zero….json")
    parser.add_argument(
        "--precomputed",
        action="store_true",
        help="beside ours the same with a precomputed reference, without a reference, and no plain loop",
    )
    parser.add_argument("--only", choices=("ours", "precomputed", "plain"), help="one loop alone")
    parser.add_argument(
        "--apart",
        action="store_true",
        help="each loop alone in two processes, in turns, in the place of both in one: it tells their peaks",
    )
    parser.add_argument("--numbers", type=Path, help=argparse.SUPPRESS)  # where a process of --apart writes its measurements
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the utilisation; default: a large product, measured")
    parser.add_argument("--write", action="store_true", help="put the result into BENCHMARKS.md")
    args = parser.parse_args()
    silence_libraries()
    try:
        measured = apart(args) if args.apart else measure(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.numbers:
        args.numbers.write_text(json.dumps(measured))
        return 0
    text = report(args, measured)
    print(text)
    if args.write:
        name = args.unet_config.stem if args.unet_config else Path(args.model).name
        how = f"{args.precision}, latents {args.latent}, micro-batch {args.micro}, checkpointing {args.checkpointing}, ZeRO-{args.zero}"
        what = (
            "Training step with and without a precomputed reference"
            if args.precomputed or args.only == "precomputed"
            else "Training step"
        )
        treated = f"{', channels last' if args.channels_last else ''}{', compiled' if args.compile else ''}"
        treated += f", {args.only} alone" if args.only else ""
        record(f"{what}, {name}, {how}{treated}, {measured['machine']}", text)
    return 0


class Split:
    """Measure the seconds of a step's parts. A call with the name of a part ends this part and begins the next one."""

    def __init__(self, device: torch.device):
        self._wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
        self.steps: list[Counter] = []

    def begin(self) -> None:
        self._wait()
        self.steps.append(Counter())
        self._since = time.perf_counter()

    def __call__(self, part: str) -> None:
        self._wait()
        now = time.perf_counter()
        self.steps[-1][part] += now - self._since  # pyright: ignore[reportArgumentType]  # a Counter of seconds
        self._since = now

    def medians(self) -> list[float]:
        return [statistics.median(step[part] for step in self.steps) for part in PARTS]


PARTS = ("data", "reference", "forward", "backward", "step")
"""Reading and noise; the reference's pass; the policy's pass and the loss; the gradients; optimizer, table, metrics and the rest."""
Step = Callable[[Callable[[str], None]], None]
"""A training step. It calls its argument with the name of each part at the part's end."""


def names(args: argparse.Namespace) -> list[str]:
    return [args.only] if args.only else ["ours", "precomputed" if args.precomputed else "plain"]


def measure(args: argparse.Namespace) -> dict:
    """Measure the loops.

    Return for each loop the seconds of its steps, the medians of their parts, the peak memory and the FLOPs of a pair. Return also
    the machine, its peak FLOP/s and its number of threads.
    """
    _, device = start()
    makers = {"ours": ours, "precomputed": partial(ours, precomputed=True), "plain": plain}
    loops: dict[str, Step] = {}
    flops: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names(args):
            (Path(folder) / name).mkdir()
            loops[name], flops[name] = makers[name](args, device, Path(folder) / name)
        turns = take_turns(
            {name: lambda step=step: step(lambda part: None) for name, step in loops.items()}, args.steps, device.type
        )
        parts = {}
        for name, step in loops.items():
            split = Split(device)
            for _ in range(max(3, args.steps // 2)):
                split.begin()
                step(split)
            parts[name] = split.medians()
    peak = "see --apart"
    if len(loops) == 1 and device.type == "cuda":
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    elif len(loops) == 1:
        peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of the process"
    return {
        "seconds": turns,
        "parts": parts,
        "memory": dict.fromkeys(loops, peak),
        "flops": flops,
        "peak_flops": args.peak_tflops * 1e12 if args.peak_tflops else measured_peak(device, torch_type(args)),
        "machine": machine(device.type),
        "threads": torch.get_num_threads(),
    }


def apart(args: argparse.Namespace) -> dict:
    """Measure the same in processes that each hold one loop, in the order A, B, A, B."""
    asked = [argument for argument in sys.argv[1:] if argument not in ("--apart", "--write")]
    merged: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn, name in itertools.product(range(2), names(args)):
            path = Path(folder) / f"{turn}.json"
            command = [sys.executable, __file__, *asked, "--only", name, "--numbers", str(path)]
            if subprocess.run(command).returncode:
                raise UserError(f"--apart: the process of {name} failed; its message is above")
            measured = json.loads(path.read_text())
            for key, value in measured.items():
                if key == "seconds":
                    merged.setdefault(key, {}).setdefault(name, []).extend(value[name])
                elif isinstance(value, dict):
                    merged.setdefault(key, {}).update(value)
                else:
                    merged[key] = value
    return merged


def report(args: argparse.Namespace, found: dict) -> str:
    pairs = args.micro * args.accumulate
    rows = []
    for name, values in found["seconds"].items():
        seconds, parts = statistics.median(values), found["parts"][name]
        row = [
            name,
            f"{seconds * 1e3:.0f} ms",
            f"{pairs / seconds:.2f}",
            f"{found['flops'][name] * pairs / seconds / found['peak_flops']:.1%}",
            found["memory"][name],
        ]
        rows.append(row + [f"{part * 1e3:.1f} ms" for part in parts] + [f"{parts[0] / sum(parts):.1%}"])
    text = (
        f"{pairs} pairs a step in {args.accumulate} micro-batches of {args.micro}, latents {args.latent}x{args.latent}, "
        f"gradient checkpointing {args.checkpointing}, ours ZeRO-{args.zero}"
        f"{', channels last' if args.channels_last else ''}{' and compiled' if args.compile else ''}, one rank, "
        f"{found['threads']} threads, medians of {args.steps} steps{', of two processes each' if args.apart else ''}; "
        f"{max(found['flops'].values()) / 1e12:.3f} TFLOP a pair without recomputation, peak {found['peak_flops'] / 1e12:.3g} TFLOP/s"
        f"{'' if args.peak_tflops else ' (measured)'}.\n\n"
        + table(["loop", "step", "pairs/s", "utilisation", "peak memory", *PARTS, "waiting for data"], rows)
    )
    if len(rows) == 2:
        over, under = ("ours", "precomputed") if args.precomputed else ("ours", "plain")
        middle, low, high = ratio(found["seconds"][over], found["seconds"][under])
        kind = "steps of the same number" if args.apart else "the ratios within a turn"
        text += f"\n\n{over} / {under}, median of {kind}: {middle:.3f} (half of them {low:.3f} to {high:.3f})"
    if args.precomputed:
        reference_bytes = sum(parameter.numel() for parameter in load(args).parameters()) * torch_type(args).itemsize
        text += f"; weights of the reference, which the loop with a precomputed reference does without: {reference_bytes / 2**20:.0f} MiB"
    return text


def torch_type(args: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if args.precision == "bf16" else torch.float32


def load(args: argparse.Namespace) -> Any:
    if args.unet_config:
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # the random numbers would take minutes on a CPU
            unet = UNet2DConditionModel.from_config(json.loads(args.unet_config.read_text()))
    else:
        unet = load_unet(args.model)
    assert isinstance(unet, UNet2DConditionModel)
    set_checkpointing(unet, args.checkpointing)
    return unet


def ours(args: argparse.Namespace, device: torch.device, folder: Path, precomputed: bool = False) -> tuple[Step, float]:
    """Return a step as the trainer takes it, with a logged row, and the FLOPs of a pair.

    With ``precomputed``, no reference is loaded: its errors are made up and come with the batch.
    """
    unet, reference = load(args), None if precomputed else load(args)
    for model in (unet, reference) if reference else (unet,):
        if args.precision == "bf16":
            use_float32_output(model)
        if args.channels_last:
            use_channels_last(model)
        if args.compile:
            compile_blocks(model)
    path = folder / "run.yaml"
    path.write_text(json.dumps({
        "output": str(folder), "steps": 1, "model": {"path": "-", "compile": args.compile}, "data": {"path": "-"}, "optimizer": {"learning_rate": RATE},
        "batch": {"pairs": args.micro * args.accumulate, "micro_batch_size": args.micro},
        "precision": args.precision, "deepspeed": str(ROOT / "ds_configs" / f"zero{args.zero}.json"),
    }))  # fmt: skip
    config = complete_config(load_config(path), 1)
    policy, reference = initialize(unet, reference, config)
    objective = build_objective("dde", NoiseSchedule.from_scheduler(STABLE_DIFFUSION), beta=BETA).to(device)
    shards = MadeUpShards(unet, args.latent)
    dataset = PairDataset(shards, Order(shards.counts, 0, 1), PairRng(0, objective.timestep_probabilities))
    slices = RankSlices(args.micro * args.accumulate, args.micro, 0, 1, 0, 10**6)
    guards, averages, log, heartbeat, numbers = Guards(1), Averages(), RunLog(folder, 0), Heartbeat(folder), itertools.count(1)
    batches = micro_batches(dataset, slices, workers=0, pin_memory=device.type == "cuda")
    predict_reference = None if precomputed else frozen_model(reference)

    def step(ended: Callable[[str], None]) -> None:
        def timed_reference(*inputs):
            ended("data")
            assert predict_reference is not None
            prediction = predict_reference(*inputs)
            ended("reference")
            return prediction

        number = next(numbers)
        with gradient_accumulation(policy):
            for _ in range(args.accumulate):
                batch = Batch(**next(batches))
                if precomputed:
                    batch = dataclasses.replace(batch, reference_errors=torch.ones(2 * args.micro))
                out = micro_step(policy, None if precomputed else timed_reference, objective, batch, device)
                ended("forward")
                policy.backward(guards.watch(out.loss, batch))
                ended("backward")
                averages.add(out)
                if not policy.is_gradient_accumulation_boundary():
                    policy.step()
                ended("step")
        norm = apply_if_finite(policy)
        heartbeat.beat(number)
        if not math.isfinite(norm):
            guards.skipped(number)  # raises, because a skipped step is no measurement
        guards.passed()
        objective.commit()
        averages.commit()
        log.write(number, number, {**averages.read(1000), "grad_norm": norm}, objective)
        any_rank(False, device)  # as the trainer asks whether to stop
        ended("step")

    flops = pair_flops(unet.config, (unet.config["in_channels"], args.latent, args.latent))
    return step, 0.75 * flops if precomputed else flops  # three passes instead of four


def plain(args: argparse.Namespace, device: torch.device, folder: Path) -> tuple[Step, float]:
    dtype = torch_type(args)
    policy, reference = load(args).to(device).train(), load(args).to(device, dtype).eval().requires_grad_(False)
    schedule = NoiseSchedule.from_scheduler(STABLE_DIFFUSION)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE)
    shards = MadeUpShards(policy, args.latent)
    dataset = PairDataset(shards, Order(shards.counts, 0, 1), PairRng(0, torch.ones(1000)))
    positions = iter(range(10**9))

    def step(ended: Callable[[str], None]) -> None:
        for _ in range(args.accumulate):
            batch = dataset.collate([dataset.pair(next(positions)) for _ in range(args.micro)])
            batch = Batch(**batch).to(device)
            both, target = batch.timesteps.repeat(2), batch.noise.repeat(2, 1, 1, 1)
            noisy = schedule.add_noise(batch.latents.float(), target, both)
            ended("data")
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                reference_prediction = predict(reference, noisy.to(dtype), both, batch.conditioning)
            ended("reference")
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                prediction = predict(policy, noisy, both, batch.conditioning)
            winner, loser = (prediction.float() - target).pow(2).mean((1, 2, 3)).chunk(2)
            reference_winner, reference_loser = (reference_prediction.float() - target).pow(2).mean((1, 2, 3)).chunk(2)
            loss = -F.logsigmoid(-0.5 * BETA * ((winner - loser) - (reference_winner - reference_loser))).mean()
            loss.item()  # as such scripts do for their progress bar
            ended("forward")
            (loss / args.accumulate).backward()
            ended("backward")
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ended("step")

    return step, pair_flops(policy.config, (policy.config["in_channels"], args.latent, args.latent))


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = statistics.median(take_turns({"product": lambda: a @ b}, 10, device.type)["product"])
    return 2.0 * side**3 / seconds


if __name__ == "__main__":
    end_process(main())
