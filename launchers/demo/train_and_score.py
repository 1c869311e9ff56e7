"""Train and score a list of runs, one after another, in one launch of real DeepSpeed ranks.

    deepspeed launchers/demo/train_and_score.py --plan demo_compare/plan.json

``tools/compare_objectives.py`` writes the plan: ``{"settings": …, "jobs": [{"name", "captions", "overrides", "precomputed"}, …]}``. The
judge and the held-out shards lie beside it. Each job is a run of ``train.yaml`` with its overrides, or the base model if it has
none. Its pictures are drawn for training or held-out captions. Its result is ``results/NAME.json`` beside the plan, whole or absent.
Jobs that have a result are left out, so a launch that was killed continues where it was.

Exit code 0: all done. 75: stopped as asked. 1: an error, in one line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import safetensors.torch
import torch
from torch import Tensor

from dde_ds.config import load_config
from dde_ds.data.shards import ShardSet
from dde_ds.demo.judge import Judge, read_vendors
from dde_ds.demo.parts import BASE, PAIRS, TRAIN, say
from dde_ds.demo.scoring import CaptionSet
from dde_ds.distributed.collectives import barrier, gather_rows
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.distributed.group import start
from dde_ds.distributed.process import end_process
from dde_ds.errors import UserError
from dde_ds.evaluation.compare import frechet_distance
from dde_ds.files import discard, write_atomically
from dde_ds.models.silence import silence_libraries
from dde_ds.models.unet import load_scheduler_config, load_unet
from dde_ds.objective.schedule import NoiseSchedule
from dde_ds.training.heldout import HeldOut
from dde_ds.training.loop import DONE, STOPPED, train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    args = parser.parse_args()
    try:
        silence_libraries()
        ranks, device = start()
        plan, folder = json.loads(args.plan.read_text(encoding="utf-8")), args.plan.parent
        missing = [job for job in plan["jobs"] if not result_file(folder, job["name"]).exists()]
        barrier(ranks, device)  # no rank writes a result before all ranks have looked for results
        bench = Bench(folder, plan["settings"], ranks, device)
        for number, job in enumerate(missing, 1):
            if ranks.is_main:
                say(f"{number} of {len(missing)}: {job['name']}")
            if do(job, plan["settings"], folder, bench) == STOPPED:
                return STOPPED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # Python's own exit would wait for the other ranks
    return DONE


def result_file(folder: Path, name: str) -> Path:
    return folder / "results" / f"{name}.json"


class Bench:
    """Hold what all jobs share: the judge, and this rank's captions with their embeddings. Each is read once in a launch."""

    def __init__(self, folder: Path, settings: dict, ranks: DistributedEnv, device: torch.device):
        self.ranks, self.device, self._settings = ranks, device, settings
        self.judge = Judge().eval().requires_grad_(False)
        self.judge.load_state_dict(safetensors.torch.load_file(folder / "judge.safetensors"))
        self._captions: dict[str, CaptionSet] = {}
        self._preferred: dict[str, Tensor] = {}
        schedule = NoiseSchedule.from_scheduler(load_scheduler_config(BASE))
        shards = ShardSet(folder / "shards_held_out")
        self._held_out = HeldOut(shards, schedule, settings["captions"], rank=ranks.rank, world=ranks.world_size)

    def score(self, unet: torch.nn.Module, which: str) -> dict:
        """Draw and score the images of one model. Return its numbers, the same on all ranks. Collective."""
        settings = self._settings
        if which not in self._captions:
            self._load(which)
        drawn = self._captions[which].draw(unet, settings["images"], settings["inference_steps"], settings["guidance_scale"])
        rows = torch.cat([drawn.logits[..., None], drawn.spread[..., None], drawn.features], 2)
        rows = self._gather(rows.flatten(1), len(self._preferred[which])).unflatten(1, rows.shape[1:])
        numbers = {
            "logits": rows[..., 0].tolist(),
            "spread": rows[..., 1].tolist(),
            "frechet_distance": frechet_distance(rows[..., 2:].flatten(0, 1), self.judge.features(self._preferred[which])),
        }
        if which == "held_out":
            unet.to(self.device)
            errors = self._gather(self._held_out.errors(unet).T, self._held_out.pairs).T
            numbers |= {"chosen": errors[0].tolist(), "rejected": errors[1].tolist()}
        return numbers

    def _load(self, which: str) -> None:
        limit = self._settings["captions" if which == "held_out" else "tuning_captions"]
        captions = pq.read_table(PAIRS[which], columns=["caption"])["caption"].to_pylist()
        # Take the captions evenly from the file, which is in Unicode's order: faces first, flags last.
        chosen = torch.linspace(0, len(captions) - 1, min(limit, len(captions))).round().long()
        self._preferred[which] = read_vendors(PAIRS[which])[0][chosen]
        share = [captions[chosen[i]] for i in self._own(len(chosen))]
        self._captions[which] = CaptionSet(BASE, share, self.judge, self.device)

    def _own(self, count: int) -> list[int]:
        """Return the indices of this rank's share of ``count`` items, divided as :class:`HeldOut` divides its pairs.

        Every rank has the same number of items, so an item may be in two shares.
        """
        rank, world = self.ranks.rank, self.ranks.world_size
        return [i % count for i in range(rank, rank + world * -(-count // world), world)]

    def _gather(self, rows: Tensor, count: int) -> Tensor:
        """Gather the rows of all ranks, in the order of the ``count`` items, on the CPU. Collective."""
        together = gather_rows(rows.to(self.device).contiguous(), self.ranks).cpu()
        return together.unflatten(0, (self.ranks.world_size, -1)).transpose(0, 1).flatten(0, 1)[:count]


def do(job: dict, settings: dict, folder: Path, bench: Bench) -> int:
    """Train and score one job, and write its result. Return DONE or STOPPED. Collective."""
    spent = [_spent()]
    weights, run_folder, resumed = BASE, None, False
    if job["overrides"] is not None:
        run_folder = folder / "runs" / job["name"]
        resumed = run_folder.exists()  # if so, cpu_s lacks the time of an earlier launch
        run = load_config(TRAIN, [*job["overrides"], *_overrides(job, settings, folder, run_folder)])
        # A finished and scored run has neither export nor checkpoints left. If its result was deleted, it is trained once more.
        if bench.ranks.is_main and (run_folder / "DONE").exists() and not (run_folder / "export").exists():
            discard(run_folder)
        barrier(bench.ranks, bench.device)
        if not (run_folder / "export").exists() and train(run, "auto") == STOPPED:
            return STOPPED
        gc.collect()  # engines are in reference cycles: free them before the next run makes new ones
        weights = str(run_folder / "export")
    spent.append(_spent())
    result = {"job": job, "settings": settings, **bench.score(load_unet(weights), job["captions"])}
    spent.append(_spent())
    cpu, wall = (torch.tensor(values, dtype=torch.float64).diff() for values in zip(*spent, strict=True))
    cpu = gather_rows(cpu.to(bench.device)[None], bench.ranks).sum(0)
    result |= {"cpu_s": cpu.tolist(), "wall_s": wall.tolist(), "resumed": resumed}
    if bench.ranks.is_main:
        target = result_file(folder, job["name"])
        target.parent.mkdir(exist_ok=True)
        write_atomically(target, json.dumps(result).encode())
        if run_folder is not None:  # these take a hundred megabytes a run; metrics.jsonl stays
            discard(run_folder / "checkpoints")
            discard(run_folder / "export")
    barrier(bench.ranks, bench.device)
    return DONE


def _overrides(job: dict, settings: dict, folder: Path, run_folder: Path) -> list[str]:
    """Return the overrides that all runs share, and the paths on this machine."""
    steps, pairs = settings["steps"], settings["pairs"]
    overrides = [
        f"output={run_folder}",
        f"steps={steps}",
        f"model.path={BASE}",
        f"data.path={folder / 'shards'}",
        "deepspeed=zero2",
        f"batch.pairs={pairs}",
        f"batch.micro_batch_size={micro_batch(pairs)}",
        "samples.prompts=[]",
        f"checkpoint.every={steps}",
        "log.every=8",
    ]
    return overrides + (
        [f"reference.precomputed={folder / 'precomputed' / job['precomputed']}.safetensors"] if job["precomputed"] else []
    )


def micro_batch(pairs: int) -> int:
    """Return the largest micro-batch up to 8 that divides ``pairs`` (even) a step on one rank or on two."""
    return next(size for size in range(8, 0, -1) if pairs // 2 % size == 0)


def _spent() -> tuple[float, float]:
    """Return this rank's processor time so far, and the clock's time, in seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, time.perf_counter()


if __name__ == "__main__":
    end_process(main())
