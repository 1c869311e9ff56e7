"""The README's promises that code can hold it to."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.launching import PATIENCE, environment

README = (ROOT / "README.md").read_text(encoding="utf-8")

PREAMBLE = """
import sys
import torch
path = sys.argv[1]
ds_config = {
    "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, "zero_optimization": {"stage": 2},
}
generator = torch.Generator().manual_seed(0)
batches = [
    (torch.randn(4, 4, 8, 8, generator=generator), torch.randn(2, 4, 8, 8, generator=generator),
     torch.tensor([100, 700]), torch.randn(4, 12, 16, generator=generator))
    for _ in range(4)
]
"""


@pytest.mark.slow
def test_own_deepspeed_loop(sd_model, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = tmp_path / "own_loop.py"
    script.write_text(PREAMBLE + code + "\nprint('seen', int(objective.table.count.sum()), 'loss', out.loss.item())")
    process = subprocess.run(
        [sys.executable, script, sd_model], env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "seen 8 " in process.stdout


def test_every_path_it_names_exists():
    named = set(re.findall(r"(?:launchers|tools|ds_configs|tests|dde_ds)/[\w./-]*\w", README))
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]
