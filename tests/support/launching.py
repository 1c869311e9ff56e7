"""Real launches of launchers/train.py: the deepspeed launcher, gloo, two ranks on the CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.multiprocessing as mp
import yaml

from dde_ds.distributed.process import end_process
from dde_ds.rows import read_rows
from tests.conftest import ROOT

LAUNCHER = Path(sys.executable).with_name("deepspeed")

# Seconds until something is held to hang. No statement about speed: the machine may be doing other things.
PATIENCE = 600

# What a process of one rank exports for DeepSpeed, as this one may have: a launch must not inherit it.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    # The CPU, also on a machine with a GPU: the numbers are compared with those of a loop on the CPU.
    return inherited | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn(function: Callable, world: int, *arguments) -> None:
    """``function(rank, *arguments)`` in a process for each rank, with the variables that a launcher would set: a function of a module,
    since it goes to another process. What it raises is raised here."""
    mp.spawn(_one_rank, (world, free_port(), function, arguments), nprocs=world)


def _one_rank(rank: int, world: int, port: int, function: Callable, arguments: tuple) -> None:
    for name, value in zip(RANK_VARIABLES, (rank, world, rank, "127.0.0.1", port), strict=True):
        os.environ[name] = str(value)
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    function(rank, *arguments)
    end_process(0)


def launcher(ranks: int) -> list[str]:
    return [str(LAUNCHER), "--num_gpus", str(ranks), "--master_port", str(free_port()), "--quiet"]


def command(config: Path, *arguments: str, ranks: int = 2) -> list[str]:
    return [*launcher(ranks), str(ROOT / "launchers" / "train.py"), "--config", str(config), *arguments]


def launch(config: Path, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(config, *arguments, ranks=ranks), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )


def alone(config: Path, *arguments: str) -> subprocess.CompletedProcess:
    """One rank, started without a launcher."""
    started = [sys.executable, ROOT / "launchers" / "train.py", "--config", config, *arguments]
    return subprocess.run(started, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)


@dataclass(frozen=True)
class Run:
    """A run for :func:`launch_many`. It needs an output folder of its own."""

    config: Path
    overrides: Sequence[str] = ()
    resume: str | None = None
    """None, ``required`` or ``auto``, as in :func:`dde_ds.training.loop.train`."""


@dataclass(frozen=True)
class Outcome:
    code: int
    """0, 75, or 1 after an error."""
    errors: list[str | None]
    """The line of each rank."""
    stdout: str


def launch_many(runs: Sequence[Run], ranks: int = 2, timeout: float = 2 * PATIENCE) -> list[Outcome]:
    """The runs one after another in one launch; a single rank is started without the launcher. Much faster than a launch each.

    A run that ends in a ``UserError`` of all ranks is an outcome as any other; whatever else goes wrong fails the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan, outcomes = Path(folder) / "runs.json", Path(folder) / "outcomes.json"
        plan.write_text(json.dumps([asdict(run) for run in runs], default=str))
        started = [*(launcher(ranks) if ranks > 1 else [sys.executable]), str(ROOT / "tests" / "support" / "many_runs.py")]
        process = subprocess.run(
            [*started, "--runs", str(plan), "--outcomes", str(outcomes)],
            **{"cwd": ROOT, "env": environment(), "capture_output": True, "text": True, "timeout": timeout},
        )
        assert process.returncode == 0, process.stderr[-5000:]
        return [Outcome(**outcome) for outcome in json.loads(outcomes.read_text())]


def write_config(path: Path, model: Path, shards: Path, **changes) -> Path:
    """A run of eight pairs a step, made to repeat to 1e-5 in float32.

    An untrained model's errors are near 1, so that float32 leaves 1e-7 in a margin, which β/2 and w_t multiply: at β = 2000 a
    plain loop differs from itself by 1e-4, and at β = 50 still by 1e-5 where w_t is 200. Hence β = 50, and timesteps
    below 600, where w_t is 5. η = 100, so that the correction moves a loss by a thousandth and cannot go missing unseen. The trained model of the demo is compared over all timesteps.
    """
    config = {
        "output": str(path.parent / "run"),
        "steps": 4,
        "model": {"path": str(model), "gradient_checkpointing": "none"},
        "data": {"path": str(shards), "caption_dropout": 0.25, "workers": 0, "block_shards": 2},
        "batch": {"pairs": 8, "micro_batch_size": 2},
        "objective": {"name": "dde", "beta": 50, "correction_weight": 100, "timestep_range": [0, 600]},
        "optimizer": {"learning_rate": 2e-4, "warmup_steps": 2, "weight_decay": 0.01, "max_grad_norm": 1.0},
        "precision": "fp32",
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def shipped(folder: Path, name: str, **changes) -> str:
    """An override that names a file of ds_configs. By default ZeRO-3 leaves parameters below 100,000 elements whole, which all of a
    tiny model's are: here none."""
    found = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    if found["zero_optimization"]["stage"] == 3:
        changes["stage3_param_persistence_threshold"] = 0
    found["zero_optimization"] |= changes
    path = folder / f"{name}{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(found))
    return f"deepspeed={path}"


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_rows(run: Path, count: int, *processes: subprocess.Popen) -> None:
    """Until ``metrics.jsonl`` holds ``count`` rows. Fails when one of the processes ends before."""
    deadline = time.monotonic() + PATIENCE
    while len(read_rows(run / "metrics.jsonl")) < count:  # without a last line that is being written
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        assert time.monotonic() < deadline
        time.sleep(0.05)
