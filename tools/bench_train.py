"""A training step of ours beside a plain PyTorch + diffusers loop of the same work, in one process and in turns.

    python tools/bench_train.py                                     # the demo's model
    python tools/bench_train.py --model sdxl-base --latent 128 --micro 2 --precision bf16 --checkpointing full
    python tools/bench_train.py --unet-config unet.json …           # an architecture with random weights
    python tools/bench_train.py --ledger                            # with and without the reference's ledger, no plain loop

The plain loop is what public Diffusion-DPO scripts do: one pass of the policy and one of the reference over winners and losers, the
loss in eager PyTorch, gradient clipping, AdamW, no compilation. Both read made-up pairs from memory, so that no disk is measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks import machine, record, table
from diffusers import UNet2DConditionModel

from dde_ds.config import load_config
from dde_ds.data.draws import Draws
from dde_ds.data.order import Order
from dde_ds.data.reader import PairDataset, RankSlices, micro_batches
from dde_ds.distributed import start
from dde_ds.engine.zero import complete_config, initialize
from dde_ds.errors import UserError
from dde_ds.models.checkpointing import set_checkpointing
from dde_ds.models.cost import pair_flops
from dde_ds.models.quiet import quiet_libraries
from dde_ds.models.unet import load_unet, predict
from dde_ds.objective.objective import build_objective
from dde_ds.objective.schedule import NoiseSchedule
from dde_ds.training.metrics import Averages
from dde_ds.training.reference import frozen_model
from dde_ds.training.step import micro_step

ROOT = Path(__file__).resolve().parent.parent
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETA, RATE = 500.0, 1e-6
PAIRS_HELD = 64


class MadeUpShards:
    """Random pairs of a model's shapes, with what :class:`PairDataset` asks of a set of shards."""

    def __init__(self, unet: UNet2DConditionModel, latent: int):
        generator = torch.Generator().manual_seed(0)
        config, self.counters, self.counts = unet.config, Counter(), [PAIRS_HELD]
        self._latents = torch.randn(PAIRS_HELD, 2, config.in_channels, latent, latent, generator=generator).half()
        self._text = torch.randn(77, config.cross_attention_dim, generator=generator).half()
        self._xl = config.addition_embed_type == "text_time"
        self._time_ids = torch.tensor([8.0 * latent, 8.0 * latent, 0, 0, 8.0 * latent, 8.0 * latent]).expand(2, 6)
        self._pooled = (
            torch.randn(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim) if self._xl else None
        )

    def read(self, shard: int, number: int) -> dict:
        sample = {"latents": self._latents[number], "prompt": torch.tensor(0)}
        return sample | ({"time_ids": self._time_ids} if self._xl else {})

    def announce(self, shard: int, number: int) -> None:
        """Nothing to read ahead."""

    def prompt(self, row: int) -> dict:
        return {"prompt_embeds": self._text} | ({"pooled": self._pooled.half()} if self._xl else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "launchers" / "demo" / "base"), help="diffusers folder or hub id")
    parser.add_argument(
        "--unet-config", type=Path, help="config.json of a UNet, to be given random weights, in the place of --model"
    )
    parser.add_argument("--latent", type=int, default=16, help="side of the latents")
    parser.add_argument("--micro", type=int, default=8, help="pairs of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=12, help="steps of each that are timed, after two that are not")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--checkpointing", default="none", help="none, selective, every_2, every_3, … or full")
    parser.add_argument("--deepspeed", default=str(ROOT / "ds_configs" / "zero2.json"))
    parser.add_argument(
        "--ledger", action="store_true", help="beside ours the same with a ledger, without a reference, and no plain loop"
    )
    parser.add_argument("--only", choices=("ours", "ledger", "plain"), help="where both do not fit the memory together")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the utilisation; default: a large product, measured")
    parser.add_argument("--write", action="store_true", help="put the result into BENCHMARKS.md")
    args = parser.parse_args()
    quiet_libraries()
    try:
        text, device = bench(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    if args.write:
        name = args.unet_config.stem if args.unet_config else Path(args.model).name
        what = "Training step with and without a ledger" if args.ledger or args.only == "ledger" else "Training step"
        record(f"{what}, {name}, {args.precision}, {machine(device)}", text)
    return 0


def bench(args: argparse.Namespace) -> tuple[str, str]:
    _, device = start()
    loops = {"ours": ours, "ledger": lambda *given: ours(*given, ledger=True), "plain": plain}
    steps, flops = {}, {}
    for name in [args.only] if args.only else ["ours", "ledger" if args.ledger else "plain"]:
        steps[name], flops[name] = loops[name](args, device)
    seconds, peaks = measure(steps, args.steps, device)
    pairs = args.micro * args.accumulate
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    peak = args.peak_tflops * 1e12 if args.peak_tflops else measured_peak(device, dtype)
    rows = [
        [name, f"{value * 1e3:.0f} ms", f"{pairs / value:.2f}", f"{flops[name] * pairs / value / peak:.1%}", peaks[name]]
        for name, value in seconds.items()
    ]
    text = (
        f"{pairs} pairs a step in {args.accumulate} micro-batches of {args.micro}, latents {args.latent}x{args.latent}, "
        f"gradient checkpointing {args.checkpointing}, {Path(args.deepspeed).name}, one rank, medians of {args.steps} "
        f"steps; {max(flops.values()) / 1e12:.3f} TFLOP a pair without recomputation, peak {peak / 1e12:.1f} TFLOP/s"
        f"{'' if args.peak_tflops else ' (measured)'}.\n\n" + table(["loop", "step", "pairs/s", "utilisation", "peak memory"], rows)
    )
    if len(seconds) == 2:
        ratio = ("ours", "ledger") if args.ledger else ("plain", "ours")
        text += f"\n\n{' / '.join(ratio)}: {seconds[ratio[0]] / seconds[ratio[1]]:.3f}"
    if args.ledger:
        held = sum(parameter.numel() for parameter in load(args).parameters()) * dtype.itemsize
        text += f"; weights of the reference, which the loop with a ledger does without: {held / 2**20:.0f} MiB"
    return text, device.type


def load(args: argparse.Namespace) -> UNet2DConditionModel:
    if args.unet_config:
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(json.loads(args.unet_config.read_text()))
    else:
        unet = load_unet(args.model)
    set_checkpointing(unet, args.checkpointing)
    return unet


def ours(args: argparse.Namespace, device: torch.device, ledger: bool = False) -> tuple[Callable[[], None], float]:
    """A step as the trainer takes it, logged row included; and the FLOPs of a pair. With a ``ledger`` no reference is loaded: its errors,
    made up, come with the batch."""
    unet = load(args)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(json.dumps({
            "output": folder, "steps": 1, "model": {"path": "-"}, "data": {"path": "-"}, "optimizer": {"learning_rate": RATE},
            "batch": {"pairs": args.micro * args.accumulate, "micro": args.micro},
            "precision": args.precision, "deepspeed": args.deepspeed,
        }))  # fmt: skip
        ds_config = complete_config(load_config(path), 1)
    policy, reference = initialize(policy=unet, reference=None if ledger else load(args), config=ds_config)
    objective = build_objective("dde", NoiseSchedule.from_scheduler(STABLE_DIFFUSION), beta=BETA).to(device)
    shards = MadeUpShards(unet, args.latent)
    dataset = PairDataset(shards, Order(shards.counts, 0, 1), Draws(0, objective.timestep_probabilities))
    slices = RankSlices(args.micro * args.accumulate, args.micro, 0, 1, 0, 10**6)
    batches = micro_batches(dataset, slices, workers=0, pin_memory=device.type == "cuda")
    averages = Averages()

    def step() -> None:
        for _ in range(args.accumulate):
            batch = next(batches)
            if ledger:
                batch["reference_errors"] = torch.ones(2 * args.micro)
            out = micro_step(policy, None if ledger else frozen_model(reference), objective, batch, device)
            policy.backward(out.loss)
            averages.add(out)
            policy.step()
        objective.commit()
        averages.read(1000)

    flops = pair_flops(unet.config, (unet.config.in_channels, args.latent, args.latent))
    return step, 0.75 * flops if ledger else flops  # three passes of four


def plain(args: argparse.Namespace, device: torch.device) -> tuple[Callable[[], None], float]:
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    policy, reference = load(args).to(device).train(), load(args).to(device, dtype).eval().requires_grad_(False)
    schedule = NoiseSchedule.from_scheduler(STABLE_DIFFUSION)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE)
    shards = MadeUpShards(policy, args.latent)
    dataset = PairDataset(shards, Order(shards.counts, 0, 1), Draws(0, torch.ones(1000)))
    positions = iter(range(10**9))

    def step() -> None:
        for _ in range(args.accumulate):
            batch = dataset.collate([dataset.pair(next(positions)) for _ in range(args.micro)])
            batch = {key: value.to(device) for key, value in batch.items()}
            both, target = batch["timesteps"].repeat(2), batch["noise"].repeat(2, 1, 1, 1)
            noisy = schedule.add_noise(batch["latents"].float(), target, both)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                prediction = predict(policy, noisy, both, batch)
                with torch.no_grad():
                    reference_prediction = predict(reference, noisy.to(dtype), both, batch)
            winner, loser = (prediction.float() - target).pow(2).mean((1, 2, 3)).chunk(2)
            reference_winner, reference_loser = (reference_prediction.float() - target).pow(2).mean((1, 2, 3)).chunk(2)
            loss = -F.logsigmoid(-0.5 * BETA * ((winner - loser) - (reference_winner - reference_loser))).mean()
            (loss / args.accumulate).backward()
            loss.item()  # as such scripts do for their progress bar
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, pair_flops(policy.config, (policy.config.in_channels, args.latent, args.latent))


def measure(steps: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of each, in turns, and the most memory that one of its steps held: on a CPU, that this process ever had, and only
    where there is no other loop in it."""
    cuda = device.type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, "see --only")
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
                peaks[name] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" + (
                    " (both loops' models)" if len(steps) > 1 else ""
                )
            if repeat >= 2:
                times[name].append(time.perf_counter() - started)
    if not cuda and len(steps) == 1:
        peaks = dict.fromkeys(steps, f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of the process")
    return {name: statistics.median(values) for name, values in times.items()}, peaks


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds, _ = measure({"product": lambda: a @ b}, 10, device)
    return 2.0 * side**3 / seconds["product"]


if __name__ == "__main__":
    sys.exit(main())
