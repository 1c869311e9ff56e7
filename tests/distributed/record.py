"""Record anew the trajectories that every setting must follow. Only this command does, and only where they are meant to change:

    python -m tests.distributed.record

What is recorded is the plain loop's in float64, so that a setting's distance from it is that setting's rounding alone. A change
shows in the diff of ``trajectories/``: say in the commit why the order, the draws or the numbers are others now.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from dde_ds import load_config
from tests.conftest import first_pairs, shard
from tests.distributed.grid import KINDS, TRAJECTORIES, write_grid_config
from tests.support.pipelines import save_sd, save_sdxl
from tests.support.reference_loop import plain_steps


def main() -> int:
    TRAJECTORIES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = first_pairs(folder / "pairs.parquet")
        for kind, save in zip(KINDS, (save_sd, save_sdxl), strict=True):
            model = save(folder / kind)
            config = write_grid_config(folder / f"{kind}.yaml", model, shard(pairs, model, folder / f"{kind}-shards"))
            steps = plain_steps(load_config(config), torch.float64)
            rows = ",\n".join(f'  {{"loss": {loss:.9f}, "grad_norm": {norm:.7f}}}' for loss, norm in steps)
            (TRAJECTORIES / f"{kind}.json").write_text(f'{{"torch": "{torch.__version__}", "steps": [\n{rows}\n]}}\n')
            print(json.dumps({kind: steps}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
