"""Compare objectives, and segments of the trajectory, on the demo's emoji: with the same base, seeds, data order and noise.

    python tools/compare_objectives.py [--output demo_compare] [--seeds 3]
    python tools/compare_objectives.py --report      # table and figure of what is there, nothing trained

1. *Settings.* Every objective is trained at full length with every β and learning rate of a grid, and drawn on **training** captions.
   Its setting is the one with the highest win rate over the base, among those whose Fréchet distance to the real preferred images is
   not above the base's. Of equal settings the one with the smaller distance is taken. If no setting is as near as the base, the highest
   win rate of all is taken, and the table marks it. No held-out caption is used.
2. *Comparison.* Every objective at its setting, and segments of the trajectory at DDE's setting, are trained with each seed and drawn
   on the held-out captions. Seeds come one after another, so a run that is cut short has whole seeds.

Each finished run is kept, and the same command continues. It writes ``comparison.json``, ``comparison.md`` and ``comparison.png``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from dde_ds.errors import UserError
from dde_ds.evaluation.compare import win_rate
from dde_ds.files import write_atomically
from dde_ds.models.silence import silence_libraries
from dde_ds.objective import specs

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "launchers" / "demo"
TUNING_SEED = 1000
BASE_TUNING = {"name": "base-tuning", "captions": "train", "overrides": None, "precomputed": None}
BASE_HELD_OUT = {"name": "base-held_out", "captions": "held_out", "overrides": None, "precomputed": None}


@dataclass(frozen=True)
class Variant:
    name: str
    objective: str
    timesteps: tuple[int, int] | None = None


OBJECTIVES = [Variant(name, name) for name in specs.OBJECTIVES]
SEGMENTS = [
    Variant(f"dde {low}-{high}", "dde", (low, high))
    for low, high in ((0, 100), (300, 400), (500, 600), (700, 800), (900, 1000), (200, 700))
]
VARIANTS = {variant.name: variant for variant in OBJECTIVES + SEGMENTS}
# Objectives with a loss of their own need another grid: `--only dspo --betas 0.01 0.1 1`, say.
COMPARED = [name for name, variant in VARIANTS.items() if variant.objective in (*specs.LINKED, "sft")]


@dataclass(frozen=True)
class Setting:
    beta: float
    rate: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("demo_compare"))
    parser.add_argument("--only", nargs="+", metavar="NAME", default=COMPARED, help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--betas", type=float, nargs="+", default=[50.0, 500.0, 2000.0], help="of the grid")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-5, 2e-4], help="learning rates of the grid")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of every run")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of an optimizer step")
    parser.add_argument("--captions", type=int, default=138, help="held-out captions")
    parser.add_argument("--tuning-captions", type=int, default=64, help="training captions that settings are chosen on")
    parser.add_argument("--images", type=int, default=1, help="images a caption")
    parser.add_argument("--inference-steps", type=int, default=8)
    parser.add_argument("--judge-steps", type=int, default=600)
    parser.add_argument("--report", action="store_true", help="only write table and figure of the results that are there")
    args = parser.parse_args()
    args.output = args.output.resolve()
    silence_libraries()
    try:
        unknown = [name for name in args.only if name not in VARIANTS]
        if unknown:
            raise UserError(f"--only {unknown[0]}: must be one of {', '.join(VARIANTS)}")
        if args.pairs < 2 or args.pairs % 2:
            raise UserError(f"--pairs {args.pairs}: must be even and 2 or more, to be dealt to two ranks as to one")
        if not args.report:
            compare(args)
        report(args)
    except (UserError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def compare(args: argparse.Namespace) -> None:
    """Make everything that is missing, up to the last result."""
    import safetensors.torch

    from dde_ds.demo.judge import read_vendors, train_judge
    from dde_ds.demo.parts import PAIRS, say, shard

    for name, folder in (("train", "shards"), ("held_out", "shards_held_out")):
        if not (args.output / folder / "manifest.json").exists():
            shard(PAIRS[name], str(DEMO / "base"), args.output / folder)
    judge = args.output / "judge.safetensors"
    if not judge.exists():
        say("judge")
        trained = train_judge(*read_vendors(PAIRS["train"]), steps=args.judge_steps)
        write_atomically(judge, safetensors.torch.save(trained.state_dict()))
    do(args, tuning_jobs(args))
    do(args, final_jobs(args, choose(args)))


def do(args: argparse.Namespace, jobs: list[dict]) -> None:
    """Run the jobs that have no result yet, all in one launch."""
    from dde_ds.demo.parts import launch

    if all(read_result(args, job) for job in jobs):
        return
    plan = args.output / "plan.json"
    write_atomically(plan, json.dumps({"settings": settings(args), "jobs": jobs}, indent=1).encode())
    code = launch(DEMO / "train_and_score.py", "--plan", plan)
    if code:
        raise UserError(f"the ranks ended with exit code {code}; what is done is kept, the same command goes on")


def tuning_jobs(args: argparse.Namespace) -> list[dict]:
    """Return the jobs on training captions: the base first, then each objective at each setting of the grid."""
    grid = [(objective, setting) for objective in objectives(args) for setting in settings_of(args, objective)]
    return [BASE_TUNING, *(tuning_job(objective, setting) for objective, setting in grid)]


def tuning_job(objective: str, setting: Setting) -> dict:
    return job("tuning", VARIANTS[objective], setting, TUNING_SEED, "train")


def final_jobs(args: argparse.Namespace, chosen: dict[str, Setting]) -> list[dict]:
    """Return the jobs on held-out captions: the base first, then one seed after another, each with all variants."""
    return [BASE_HELD_OUT, *(final_job(one, chosen, seed) for seed in range(args.seeds) for one in variants(args))]


def final_job(variant: Variant, chosen: dict[str, Setting], seed: int) -> dict:
    return job("final", variant, chosen[variant.objective], seed, "held_out")


def job(name: str, variant: Variant, setting: Setting, seed: int, captions: str) -> dict:
    """Return the job of one run of the demo's train.yaml.

    Runs of one seed see the same pairs and noise. They also see the same timesteps, except for the segments.
    """
    overrides = [
        f"seed={seed}",
        f"objective.name={variant.objective}",
        f"objective.beta={setting.beta}",
        f"optimizer.learning_rate={setting.rate}",
    ]
    if variant.timesteps:
        overrides.append(f"objective.timestep_range={list(variant.timesteps)}")
    # The first run of a seed writes the reference's errors there, and the other runs of the seed read them.
    own = variant.timesteps or specs.OBJECTIVES[variant.objective].needs_prediction
    precomputed = None if own else f"seed-{seed}"
    name = f"{name}-{variant.name.replace(' ', '-')}-beta{setting.beta:g}-rate{setting.rate:g}-seed{seed}"
    return {"name": name, "captions": captions, "overrides": overrides, "precomputed": precomputed}


def settings(args: argparse.Namespace) -> dict:
    """Return the settings that all runs share."""
    keys = ("steps", "pairs", "captions", "tuning_captions", "images", "inference_steps", "judge_steps")
    return {key: getattr(args, key) for key in keys} | {"guidance_scale": 3.0}


def variants(args: argparse.Namespace) -> list[Variant]:
    return [VARIANTS[name] for name in args.only]


def objectives(args: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(variant.objective for variant in variants(args)))


def settings_of(args: argparse.Namespace, objective: str) -> list[Setting]:
    """Return the grid, which is the same for all. An objective without β (``sft``) needs one run for each learning rate."""
    betas = args.betas if specs.OBJECTIVES[objective].needs_reference else args.betas[:1]
    return [Setting(beta, rate) for beta, rate in itertools.product(betas, args.rates)]


def read_result(args: argparse.Namespace, job: dict) -> dict | None:
    """Return the result of a job, or None if there is none yet.

    Raises:
        UserError: the result is of other settings.
    """
    file = args.output / "results" / f"{job['name']}.json"
    if not file.exists():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    if result["job"] != job or result["settings"] != settings(args):
        raise UserError(f"--output {args.output}: {file.name} is of other settings; give the same again, or choose another folder")
    return result


def choose(args: argparse.Namespace) -> dict[str, Setting]:
    """Choose the setting of each objective by the rule at the top of this file, from results on training captions alone."""
    chosen = {}
    for objective in objectives(args):
        tried = {setting: tuning_rank(args, objective, setting) for setting in settings_of(args, objective)}
        chosen[objective] = max(tried, key=lambda setting: tried[setting])
    return chosen


def tuning_rank(args: argparse.Namespace, objective: str, setting: Setting) -> tuple[bool, float, float]:
    """Return the rank of a setting; higher is better.

    The rank is whether the setting is as near to the preferred images as the base, then its win rate, then minus its Fréchet
    distance.
    """
    base, result = read_result(args, BASE_TUNING), read_result(args, tuning_job(objective, setting))
    if base is None or result is None:
        raise UserError(f"--output {args.output}: the search for settings is not done there")
    won = win_rate(torch.tensor(result["logits"]), torch.tensor(base["logits"])).rate
    return result["frechet_distance"] <= base["frechet_distance"], won, -result["frechet_distance"]


def report(args: argparse.Namespace) -> None:
    """Write the table and the figure, from the seeds that have a result for every variant."""
    from objectives_report import figure, markdown, summarise

    chosen, base = choose(args), read_result(args, BASE_HELD_OUT)
    by_seed = [{one.name: read_result(args, final_job(one, chosen, seed)) for one in variants(args)} for seed in range(args.seeds)]
    whole = [seed for seed, results in enumerate(by_seed) if all(results.values())]
    if base is None or not whole:
        raise UserError(f"--output {args.output}: no seed is done there for all of them yet")
    tuning = [
        {"objective": objective, **vars(setting), "chosen": setting == chosen[objective]}
        | dict(zip(("as_near_as_base", "win_rate", "minus_frechet_distance"), tuning_rank(args, objective, setting), strict=True))
        for objective in objectives(args)
        for setting in settings_of(args, objective)
    ]
    done = [base, *(read_result(args, one) for one in tuning_jobs(args))]
    done += [result for results in by_seed for result in results.values() if result]
    training, scoring = (sum(seconds) / 60 for seconds in zip(*(result["cpu_s"] for result in done), strict=True))
    # A resumed job knows only the time of its last launch. Older results do not say whether they were resumed.
    whole_time = not any(result.get("resumed", True) for result in done)
    summary = {
        "settings": settings(args) | {"betas": args.betas, "rates": args.rates},
        "tuning": tuning,
        "seeds": whole,
        "seeds_asked_for": args.seeds,
        "cpu_minutes": {"training": training, "scoring": scoring, "whole": whole_time},
        "runs": len(done),
        "base": summarise([base], base),
        "variants": {
            variant.name: vars(chosen[variant.objective])
            | summarise(
                [one for seed in whole if (one := by_seed[seed][variant.name])], base, [by_seed[seed].get("dde") for seed in whole]
            )
            for variant in variants(args)
        },
    }
    write_atomically(args.output / "comparison.json", (json.dumps(summary, indent=1) + "\n").encode())
    write_atomically(args.output / "comparison.md", markdown(summary).encode())
    figure(summary, args.output / "comparison.png")
    print(markdown(summary))


if __name__ == "__main__":
    sys.exit(main())
