"""Run the demo, from image pairs to an aligned model and a measured win rate, by the commands that a large run uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dde_ds.config import RunConfig, load_config
from dde_ds.data.shards import ShardSet
from dde_ds.demo.judge import accuracy, read_vendors, train_judge
from dde_ds.demo.parts import BASE, PAIRS, TRAIN, launch, rank_count, say, shard
from dde_ds.demo.scoring import CaptionSet, Drawn, latent_spread
from dde_ds.errors import UserError
from dde_ds.evaluation.compare import frechet_distance, win_rate
from dde_ds.models.silence import silence_libraries
from dde_ds.models.unet import load_scheduler_config, load_unet
from dde_ds.objective.schedule import NoiseSchedule
from dde_ds.rows import read_rows
from dde_ds.training.heldout import error_drift


def run_demo(output: Path, zero: str, images: int, captions: int | None, judge_steps: int, overrides: Sequence[str]) -> None:
    """Shard the training pairs, align the base model, draw and judge both models, and print the result.

    Args:
        zero: DeepSpeed's ZeRO stage of the policy, ``2`` or ``3``.
        images: images for each held-out caption.
        captions: take only this many held-out captions, the first ones. None takes all.
        overrides: ``key.sub=value``, to replace values of the demo's ``train.yaml``.
    """
    silence_libraries()
    overrides = [
        f"output={output / 'train'}",
        f"data.path={output / 'shards'}",
        f"deepspeed=zero{zero}",
        f"model.path={BASE}",
        *overrides,
    ]
    run = load_config(TRAIN, overrides)
    for name, folder in (("train", "shards"), ("held_out", "shards_held_out")):
        shard(PAIRS[name], run.model.path, output / folder)
    align(run, overrides)
    result = evaluate(run, output, images, captions, judge_steps)
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report(result)
    print(f"pictures: {output / 'comparison.png'}, {output / 'curves.png'}; aligned model: {Path(run.output) / 'export'}")


def align(run: RunConfig, overrides: list[str]) -> None:
    """Train through the real launcher, unless the run is done: a rank for each GPU, or two ranks that share the CPU's cores.

    Raises:
        UserError: the folder holds a run with other settings, or the training failed.
    """
    run_folder = Path(run.output)
    if (run_folder / "DONE").exists():
        if (run_folder / "config.yaml").read_text(encoding="utf-8") != run.to_yaml():
            raise UserError(f"--output: {run_folder} holds a run with other settings; delete it or choose another folder")
        say(f"aligned model is there: {run_folder}")
        return
    say(f"alignment on {rank_count()} ranks")
    code = launch("--module", "dde_ds.cli", "train", TRAIN, "--resume", "auto", *overrides)
    if code:
        raise UserError(f"dde-ds train ended with exit code {code}; its own words are above")


def evaluate(run: RunConfig, output: Path, images_per_caption: int, limit: int | None, judge_steps: int) -> dict:
    """Score both models on the held-out captions, write the pictures, and return the numbers."""
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
    set_of_captions = CaptionSet(run.model.path, captions, judge, device)
    drawn: dict[str, Drawn] = {}
    for name, unet in unets.items():
        drawn[name] = one = set_of_captions.draw(unet, images_per_caption, 20, run.samples.guidance_scale, run.seed)
        result[name] = {
            "preferred_style": float((one.logits > 0).float().mean()),
            "frechet_distance": frechet_distance(one.features.flatten(0, 1), judge.features(preferred)),
            "latent_std": float(one.spread.mean()),
        }
    result["real_latent_std"] = latent_spread(set_of_captions.prompts.encode(preferred))
    result["win_rate"] = vars(win_rate(drawn["aligned"].logits, drawn["base"].logits))

    say("errors on the held-out pairs")
    schedule = NoiseSchedule.from_scheduler(load_scheduler_config(run.model.path))
    result["errors"] = error_drift(unets["aligned"], unets["base"], schedule, ShardSet(output / "shards_held_out"))

    from dde_ds.demo.figures import comparison, curves

    comparison(captions, {name: one.pixels for name, one in drawn.items()}, preferred, output / "comparison.png")
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
    table.add_row("path KL from the base, in nats", "", f"{errors['path_kl']:.1f}")
    console = Console()
    console.print(table)
    console.print(
        f"win rate of the aligned model: {win['rate']:.1%}, 95 % interval {win['low']:.1%} to {win['high']:.1%}", highlight=False
    )
