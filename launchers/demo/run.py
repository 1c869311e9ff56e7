"""The demo: from image pairs to an aligned model and a measured win rate, by the tools that a large run uses.

    python launchers/demo/run.py [--output demo_run] [--zero 3] [-- key.sub=value …]

Shards the training pairs, aligns the base model with two DeepSpeed ranks (or the GPU that is there), draws base and aligned
model on held-out captions from equal noise, and lets a judge that never saw the policy say which style each picture has.
Whatever stands after ``--`` overrides ``train.yaml``. Done parts are not done again; delete the output folder to start over.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from judge import accuracy, read_vendors, train_judge
from torch import Tensor

from dde_ds.config import RunConfig, load_config
from dde_ds.data.shards import ShardSet
from dde_ds.errors import UserError
from dde_ds.evaluation.compare import frechet_distance, win_rate
from dde_ds.evaluation.generate import PromptSet
from dde_ds.evaluation.heldout import error_drift, latent_spread
from dde_ds.models.quiet import quiet_libraries
from dde_ds.models.unet import load_scheduler_config, load_unet
from dde_ds.objective.schedule import NoiseSchedule
from dde_ds.training.metrics import read_rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PAIRS = {"train": HERE / "pairs" / "train.parquet", "held_out": HERE / "pairs" / "held_out.parquet"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_run"))
    parser.add_argument("--zero", choices=("2", "3"), default="2", help="DeepSpeed ZeRO stage of the policy")
    parser.add_argument("--images", type=int, default=2, help="images a held-out caption")
    parser.add_argument("--captions", type=int, help="only the first N held-out captions")
    parser.add_argument("--judge-steps", type=int, default=600)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_args()
    quiet_libraries()
    output = args.output
    overrides = [
        f"output={output / 'train'}",
        f"data.path={output / 'shards'}",
        f"deepspeed={ROOT}/ds_configs/zero{args.zero}.json",
    ]
    overrides += [f"model.path={HERE / 'base'}", *args.overrides]
    try:
        run = load_config(HERE / "train.yaml", overrides)
        for name, folder in (("train", "shards"), ("held_out", "shards_held_out")):
            shard(PAIRS[name], run.model.path, output / folder)
        align(run, overrides)
        result = evaluate(run, output, args.images, args.captions, args.judge_steps)
    except (UserError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report(result)
    print(f"pictures: {output / 'comparison.png'}, {output / 'curves.png'}; aligned model: {Path(run.output) / 'export'}")
    return 0


def shard(parquet: Path, model: str, folder: Path) -> None:
    say(f"shards of {parquet.name}")
    command = [sys.executable, ROOT / "tools" / "shard_pickapic.py", "--input", parquet, "--model", model, "--output", folder]
    subprocess.run([*command, "--pairs-per-shard", "128", "--batch", "32"], check=True)


def align(run: RunConfig, overrides: list[str]) -> None:
    """Train through the real launcher: a rank a GPU, or two ranks that share the CPU's cores."""
    run_folder = Path(run.output)
    if (run_folder / "DONE").exists():
        if (run_folder / "config.yaml").read_text(encoding="utf-8") != run.to_yaml():
            raise UserError(f"--output: {run_folder} holds a run with other settings; delete it or choose another folder")
        say(f"aligned model is there: {run_folder}")
        return
    gpus = torch.cuda.device_count()
    ranks = min(2, gpus) or 2
    environment = dict(os.environ)
    if not gpus:
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    say(f"alignment on {ranks} ranks")
    # The launcher that was installed beside this Python, whatever the PATH says.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", str(ranks), "--master_port", str(port), "--quiet"]
    command = [*launcher, ROOT / "launchers" / "train.py"]
    subprocess.run([*command, "--config", HERE / "train.yaml", "--resume", "auto", *overrides], check=True, env=environment)


def evaluate(run: RunConfig, output: Path, images_per_caption: int, limit: int | None, judge_steps: int) -> dict:
    """Score both models on the held-out captions and write the pictures."""
    import pyarrow.parquet as pq

    say("judge")
    held_out = read_vendors(PAIRS["held_out"])
    judge = train_judge(*read_vendors(PAIRS["train"]), steps=judge_steps)
    result: dict = {"judge_accuracy": accuracy(judge, *held_out)}

    say("pictures of the held-out captions")
    captions = pq.read_table(PAIRS["held_out"], columns=["caption"])["caption"].to_pylist()[:limit]
    preferred = held_out[0][: len(captions)]
    unets = {"base": load_unet(run.model.path).eval(), "aligned": load_unet(str(Path(run.output) / "export")).eval()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = PromptSet(run.model.path, None, captions, device, torch.float32)
    drawn: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    for name, unet in unets.items():
        unet.to(device)
        drawn[name] = torch.stack(
            [prompts.draw(unet, run.seed, 20, run.samples.guidance_scale, index=i) for i in range(images_per_caption)], 1
        )
        unet.cpu()
        pixels = drawn[name].flatten(0, 1).float() / 127.5 - 1
        with torch.no_grad():
            scores[name] = judge(pixels).view(len(captions), images_per_caption)
            result[name] = {
                "preferred_style": float((scores[name] > 0).float().mean()),
                "frechet_distance": frechet_distance(judge.features(pixels), judge.features(preferred)),
                "latent_std": latent_spread(prompts.encode(pixels)),
            }
    with torch.no_grad():
        result["real_latent_std"] = latent_spread(prompts.encode(preferred))
    result["win_rate"] = vars(win_rate(scores["aligned"], scores["base"]))

    say("errors on the held-out pairs")
    schedule = NoiseSchedule.from_scheduler(load_scheduler_config(run.model.path))
    result["errors"] = error_drift(unets["aligned"], unets["base"], schedule, ShardSet(output / "shards_held_out"))

    from figures import comparison, curves

    comparison(captions, drawn, preferred, output / "comparison.png")
    curves(read_rows(Path(run.output) / "metrics.jsonl"), output / "curves.png")
    return result


def report(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    win, errors = result["win_rate"], result["errors"]
    table = Table(
        title=f"held-out captions: {win['prompts']}; the judge is right on {result['judge_accuracy']:.1%} of their real images"
    )
    for column in ("", "base", "aligned"):
        table.add_column(column, justify="left" if not column else "right")
    both = [result["base"], result["aligned"]]
    table.add_row("drawn in the preferred style", *(f"{side['preferred_style']:.1%}" for side in both))
    table.add_row(
        "Fréchet distance to real preferred images (lower is better)", *(f"{side['frechet_distance']:.3f}" for side in both)
    )
    table.add_row(f"spread of the latents (real: {result['real_latent_std']:.3f})", *(f"{side['latent_std']:.3f}" for side in both))
    table.add_row("error on winners", f"{errors['reference_chosen']:.4f}", f"{errors['policy_chosen']:.4f}")
    table.add_row("error on losers", f"{errors['reference_rejected']:.4f}", f"{errors['policy_rejected']:.4f}")
    console = Console()
    console.print(table)
    console.print(
        f"win rate of the aligned model: {win['rate']:.1%}, 95 % interval {win['low']:.1%} to {win['high']:.1%}", highlight=False
    )


_STARTED = time.perf_counter()


def say(what: str) -> None:
    print(f"[{time.perf_counter() - _STARTED:5.0f} s] {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
