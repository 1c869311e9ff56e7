"""The README's promises that code can hold it to."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.launching import PATIENCE, environment

ROOMS = ("dde_ds", "docker", "ds_configs", "launchers", "tests", "tools")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *(page for room in ROOMS for page in sorted((ROOT / room).rglob("README.md")))]

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
    script.write_text(PREAMBLE + code + "\nprint('seen', round(objective.table.count.sum().item(), 6), 'loss', out.loss.item())")
    process = subprocess.run(
        [sys.executable, script, sd_model], env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "seen 7.6 " in process.stdout  # four pairs in each of two steps, the first ones for 0.9


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_it_names_exists(page):
    """Find each named path from the repository's root, or from the page's own folder."""
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w./-])(?:launchers|tools|ds_configs|tests|dde_ds|docker)/[\w./*-]*[\w*]", text))
    assert not [path for path in named if not any(ROOT.glob(path)) and not any(page.parent.glob(path))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        to = page.parent / path if path else page
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), target


def anchors(page: Path) -> set[str]:
    """Return the anchors of the page's headings by GitHub's rules: lower case, hyphens for spaces, and only letters, digits, hyphens and underscores."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tree_of_the_package_names_every_file_and_nothing_else():
    """The line of a folder stands for its ``__init__.py``."""
    package = ROOT / "dde_ds"
    (tree,) = re.findall(r"```text\ndde_ds/\n(.*?)```", (package / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    named, folder = [], ""
    for name, is_folder in re.findall(r"^ +(\w+)(/|\.py) +\S", tree, re.MULTILINE):
        folder = f"{name}/" if is_folder == "/" else folder
        named.append(f"{folder}__init__.py" if is_folder == "/" else f"{folder}{name}.py")
    assert len(named) == len(tree.splitlines()), "a line that names no file"
    assert sorted(named) == sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))
