"""Print which DeepSpeed file, gradient checkpointing and micro-batch a recipe takes on which GPUs, and the memory that it needs.

    python tools/plan_table.py          # Markdown, as in ds_configs/README.md

The planner (``dde-ds plan``) counts the memory without weights; nothing is measured on these GPUs. The first file of the list that
fits is taken. With it goes the fastest gradient checkpointing that leaves a micro-batch large enough to fill the GPU. If there is
none, the largest micro-batch is taken.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import table

from dde_ds.config import RunConfig, load_config
from dde_ds.models.known import read_architecture
from dde_ds.models.silence import silence_libraries
from dde_ds.planning.cost import TOKENS
from dde_ds.planning.gpus import Device
from dde_ds.planning.plan import MODES, Workload, rank_memory, usable

ROOT = Path(__file__).resolve().parent.parent
# Recipe, architecture, side of its latents, and the fewest pairs of a micro-batch with which a GPU does not wait for launches.
MODELS = (("sd15_dde", "sd15", 64, 8), ("sdxl_dde", "sdxl", 128, 2))
FILES = ("zero2", "zero3", "zero2_offload", "zero3_offload")
MEMORIES, COUNTS, LARGEST = (24, 40, 80), (1, 8, 64), 16


def main() -> int:
    silence_libraries()
    rows = []
    for recipe, architecture, side, enough in MODELS:
        unet = read_architecture(architecture)
        task = Workload(unet, (unet["in_channels"], side, side), TOKENS, pair_bytes=0)
        for memory in MEMORIES:
            device = Device("", 0.0, memory)
            for count in COUNTS:
                rows.append([architecture, f"{memory} GB", str(count), *choose(recipe, task, count, device, enough)])
    print(
        table(
            [
                "model",
                "GPU",
                "GPUs",
                "file",
                "checkpointing",
                "micro-batch",
                "GiB of the GPU",
                "GiB of the host, all ranks of a node",
            ],
            rows,
        )
    )
    return 0


def choose(recipe: str, task: Workload, count: int, device: Device, enough: int) -> list[str]:
    node = min(count, 8)
    fitting = []
    for file in FILES:
        for mode in MODES:
            for micro in (2**power for power in range(LARGEST.bit_length())):
                run = configured(recipe, file, mode, micro)
                memory = rank_memory(run, task, count, node)
                if memory.peak <= usable(device):
                    fitting.append((file, mode, micro, memory))
        if fitting:
            break
    else:
        return ["none fits", "", "", "", ""]
    full = [each for each in fitting if each[2] >= enough]
    # Take the fastest mode with enough pairs, and its largest micro-batch. If no mode has enough, take the largest micro-batch.
    file, mode, micro, memory = (
        max(full, key=lambda each: (-MODES.index(each[1]), each[2]))
        if full
        else max(fitting, key=lambda each: (each[2], -MODES.index(each[1])))
    )
    host = memory.host * node / 2**30
    return [f"`{file}.json`", mode, str(micro), f"{memory.peak / 2**30:.1f}", f"{host:.0f}" if host else "–"]


def configured(recipe: str, file: str, mode: str, micro: int) -> RunConfig:
    overrides = [
        f"deepspeed={ROOT / 'ds_configs' / file}.json",
        f"model.gradient_checkpointing={mode}",
        f"batch.micro_batch_size={micro}",
    ]
    return load_config(ROOT / "launchers" / "recipes" / f"{recipe}.yaml", overrides)


if __name__ == "__main__":
    sys.exit(main())
