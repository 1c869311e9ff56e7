"""Launch launchers/train.py for real: with the deepspeed launcher, gloo, and two ranks on the CPU."""

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

# Seconds after which something counts as hanging. This says nothing about speed: the machine may be doing other things.
PATIENCE = 600

# Variables that a process of one rank exports for DeepSpeed. This process may have done so, and a launch must not inherit them.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    # Use the CPU also on a machine with a GPU, because the numbers are compared with those of a loop on the CPU.
    return inherited | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn(function: Callable, world: int, *arguments) -> None:
    """Call ``function(rank, *arguments)`` in a process for each rank, with the variables that a launcher would set.

    ``function`` must be a function of a module, because it goes to another process. If it raises an exception, this raises one too.
    """
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
    """Run one rank, started without a launcher."""
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
    """The exit code: 0, 75, or 1 after an error."""
    errors: list[str | None]
    """The line of each rank's error, or None."""
    stdout: str


def launch_many(runs: Sequence[Run], ranks: int = 2, timeout: float = 2 * PATIENCE) -> list[Outcome]:
    """Do the runs one after another in one launch, which is much faster than a launch for each run.

    A single rank is started without the launcher. A run that ends in a ``UserError`` of all ranks is an outcome like any other.
    Whatever else goes wrong fails the test.
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
    """Write the configuration of a run of eight pairs a step that repeats to 1e-5 in float32.

    An untrained model's errors are near 1, so float32 leaves an error of 1e-7 in a margin, and β/2 and w_t multiply this error. At
    β = 2000 a plain loop differs from itself by 1e-4. At β = 50 it still differs by 1e-5 where w_t is 200. Hence β = 50, and
    timesteps below 600, where w_t is 5. With η = 5, the correction moves a loss by a few parts in ten thousand, so that a test notices if it
    is missing. The trained model of the demo is compared over all timesteps.
    """
    config = {
        "output": str(path.parent / "run"),
        "steps": 4,
        "model": {"path": str(model), "gradient_checkpointing": "none"},
        "data": {"path": str(shards), "caption_dropout": 0.25, "workers": 0, "block_shards": 2},
        "batch": {"pairs": 8, "micro_batch_size": 2},
        "objective": {"name": "dde", "beta": 50, "correction_weight": 5, "timestep_range": [0, 600]},
        "optimizer": {"learning_rate": 2e-4, "warmup_steps": 2, "weight_decay": 0.01, "max_grad_norm": 1.0},
        "precision": "fp32",
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def shipped(folder: Path, name: str, **changes) -> str:
    """Return an override that names a changed copy of a file of ds_configs.

    By default ZeRO-3 leaves parameters below 100,000 elements whole, and all parameters of a tiny model are that small. The copy
    leaves no parameter whole.
    """
    settings = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    if settings["zero_optimization"]["stage"] == 3:
        changes["stage3_param_persistence_threshold"] = 0
    settings["zero_optimization"] |= changes
    path = folder / f"{name}{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(settings))
    return f"deepspeed={path}"


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_rows(run: Path, count: int, *processes: subprocess.Popen) -> None:
    """Wait until ``metrics.jsonl`` holds ``count`` rows. Fail if one of the processes ends before that."""
    deadline = time.monotonic() + PATIENCE
    while len(read_rows(run / "metrics.jsonl")) < count:  # read_rows leaves out a last line that is still being written
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        assert time.monotonic() < deadline
        time.sleep(0.05)
