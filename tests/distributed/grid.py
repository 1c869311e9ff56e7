"""Settings that must not change what a run computes: all of them, and a few that cover every pair of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tests.conftest import ROOT
from tests.support.launching import Run, rows, write_config

KINDS = ("sd", "sdxl")
RANKS = (1, 2)
STAGES = (0, 1, 2, 3)
ACCUMULATIONS = (1, 4)
CHECKPOINTINGS = ("none", "full")
REFERENCES = ("replicated", "sharded")
PAIRS = 8
TRAJECTORIES = Path(__file__).with_name("trajectories")


@dataclass(frozen=True)
class Setting:
    kind: str
    """The kind of the UNet."""
    ranks: int
    stage: int
    accumulation: int
    checkpointing: str
    reference: str

    def __str__(self) -> str:
        return f"{self.kind}-ranks{self.ranks}-zero{self.stage}-accumulate{self.accumulation}-{self.checkpointing}-{self.reference}"


EVERY = [Setting(*values) for values in product(KINDS, RANKS, STAGES, ACCUMULATIONS, CHECKPOINTINGS, REFERENCES)]


def covering() -> list[Setting]:
    """Eight settings in which any two columns meet in every combination of their values.

    Each stage comes twice, the second time with the other value in every other column, so it meets both of each. Two of the other
    columns meet in all four ways, since their bits below agree at one stage and differ at another.
    """
    found = []
    for stage, bits in enumerate(((0, 0, 0, 0, 0), (0, 0, 0, 1, 1), (0, 0, 1, 0, 1), (0, 1, 1, 1, 0))):
        for other in (0, 1):
            kind, ranks, accumulation, checkpointing, reference = (
                values[bit ^ other]
                for bit, values in zip(bits, (KINDS, RANKS, ACCUMULATIONS, CHECKPOINTINGS, REFERENCES), strict=True)
            )
            found.append(Setting(kind, ranks, stage, accumulation, checkpointing, reference))
    return found


def write_grid_config(path: Path, model: Path, shards: Path) -> Path:
    """Gradients are clipped from the first step on, which Adam alone would hide: it does not see a gradient's scale."""
    optimizer = {"learning_rate": 2e-4, "warmup_steps": 2, "weight_decay": 0.01, "max_grad_norm": 0.4}
    return write_config(path, model, shards, optimizer=optimizer)


def run(setting: Setting, config: Path, output: Path, *overrides: str) -> Run:
    """The run of a setting. Parameters of a tiny model would all stay whole under ZeRO-3 by the threshold that a large one needs."""
    output.parent.mkdir(parents=True, exist_ok=True)
    deepspeed = json.loads((ROOT / "ds_configs" / f"zero{setting.stage}.json").read_text())
    if setting.stage == 3:
        deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (output.parent / f"{output.name}.json").write_text(json.dumps(deepspeed))
    own = {
        "output": output,
        "deepspeed": output.parent / f"{output.name}.json",
        "batch.pairs": PAIRS,
        "batch.micro_batch_size": PAIRS // setting.ranks // setting.accumulation,
        "model.gradient_checkpointing": setting.checkpointing,
        "reference.placement": setting.reference,
    }
    return Run(config, [*(f"{key}={value}" for key, value in own.items()), *overrides])


def trajectory(output: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [(row["loss"], row["grad_norm"]) for row in rows(output)]
