"""The wheel, installed outside the tree: the whole job from an empty folder, with nothing else checked out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.launching import PATIENCE, environment, rows

# What setup.py reads.
INPUTS = ("dde_ds", "ds_configs", "launchers", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves a folder ``build`` in the tree, and takes along what lies there from earlier."""
    copy, output = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in INPUTS:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", output, copy], check=True, timeout=PATIENCE)
    (file,) = output.iterdir()
    return file


def test_what_it_holds(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside, pattern in (
        ("ds_configs", "ds_configs", "*.json"),
        ("launchers/recipes", "recipes", "*.yaml"),
        ("launchers/demo", "demo_files", "base/**/*.*"),
        ("launchers/demo", "demo_files", "pairs/*.parquet"),
    ):
        files = {f"dde_ds/{inside}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).glob(pattern)}
        assert files and files <= names
    assert {"dde_ds/demo_files/train.yaml", "dde_ds/demo_files/README.md", "dde_ds/py.typed"} < names  # README: the images' credits
    assert {path.partition("/")[0] for path in names} == {"dde_ds", f"dde_ds-{wheel.name.split('-')[1]}.dist-info"}
    assert wheel.stat().st_size < 20e6


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The programs of a fresh environment that holds the wheel, and sees the packages that it needs in this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=PATIENCE)
    programs = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True, timeout=PATIENCE)
    # Afterwards: pip must not take this environment's own dde_ds for the one that is to be replaced. The path of a .pth file is searched,
    # but its own .pth files, such as that of an editable installation, are not read.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) + "\n")
    launcher = programs / "deepspeed"
    launcher.write_text(f"#!{programs / 'python'}\nfrom deepspeed.launcher.runner import main\n\nmain()\n")
    launcher.chmod(0o755)
    return programs


@pytest.mark.slow
def test_the_whole_job_from_an_empty_folder(installed, tmp_path):
    def run(*arguments: str, code: int = 0) -> str:
        variables = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
        variables["PATH"] = f"{installed}{os.pathsep}{variables['PATH']}"
        process = subprocess.run(arguments, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=PATIENCE)
        assert process.returncode == code, process.stdout[-3000:] + process.stderr[-3000:]
        return process.stdout

    assert run("python", "-c", "import dde_ds; print(dde_ds.__file__)").startswith(str(installed.parent))
    recipe = run("dde-ds", "recipe", "sdxl_dde")
    assert recipe == (ROOT / "launchers/recipes/sdxl_dde.yaml").read_text(encoding="utf-8")
    (tmp_path / "run.yaml").write_text(recipe, encoding="utf-8")
    assert "shipped copy" in run("dde-ds", "plan", "run.yaml", "--gpus", "8")

    # Shards, two ranks by the deepspeed launcher, pictures and their judgement.
    short = ["--captions", "6", "--images", "1", "--judge-steps", "30"]
    overrides = ["steps=2", "batch.pairs=4", "batch.micro_batch_size=2", "samples.prompts=[fire]", "samples.inference_steps=2"]
    assert "win rate of the aligned model" in run("dde-ds", "demo", *short, "--", *overrides)
    result = json.loads((tmp_path / "demo_run/result.json").read_text())
    assert result["win_rate"]["prompts"] == 6
    assert 0 < abs(result["errors"]["policy_chosen"] - result["errors"]["reference_chosen"]) < 0.1
    assert "are whole: 138 pairs" in run("dde-ds", "verify", "demo_run/shards_held_out", "--quick")

    # The same run again, started alone on a machine with two GPUs, or told that it has: one rank each, the same numbers.
    again = ["demo_run/train/config.yaml", "output=again"]
    assert "4 pairs a step = 2 ranks x 1 micro-batches of 2" in run("dde-ds", "validate", *again, "--ranks", "2")
    run("dde-ds", "train", *again, "--ranks", "2", "--resume", "auto", "samples.prompts=[]")
    first, second = (rows(tmp_path / folder) for folder in ("demo_run/train", "again"))
    assert [row["loss"] for row in second] == pytest.approx([row["loss"] for row in first], rel=1e-6)
    assert len(second) == 2
