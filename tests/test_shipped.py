from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest

import dde_ds.shipped
from dde_ds import UserError, load_config
from dde_ds.engine.zero import complete_config, read_config
from dde_ds.shipped import deepspeed_file, demo_file, recipe_file, recipe_names
from tests.conftest import ROOT

ZERO2 = ROOT / "ds_configs/zero2.json"


@pytest.mark.parametrize("name", ["zero2", "zero2.json", "ds_configs/zero2.json", "ds_configs/zero2"])
def test_by_name_from_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert deepspeed_file(name) == ZERO2
    assert read_config(name)["zero_optimization"]["stage"] == 2


def test_recipes_and_the_default_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = load_config(ROOT / "launchers/recipes/sdxl_dde.yaml")
    assert complete_config(run, 8)["zero_optimization"]["stage"] == 2
    default = next(field.default for field in dataclasses.fields(run) if field.name == "deepspeed")
    assert complete_config(dataclasses.replace(run, deepspeed=default), 8) == complete_config(run, 8)


def test_a_path_that_is_there_is_that_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3_offload").mkdir()
    (tmp_path / "ds_configs").mkdir()
    for name in ("zero2", "ds_configs/zero3.json"):
        (tmp_path / name).write_text(json.dumps({"zero_optimization": {"stage": 1}}))
        assert read_config(name)["zero_optimization"]["stage"] == 1
    assert read_config("zero3_offload")["zero_optimization"]["stage"] == 3  # not the folder
    with pytest.raises(UserError, match=r"^deepspeed zero9: no such file; shipped are zero0, zero1, zero2, .*zero3_hierarchical"):
        read_config("zero9")
    with pytest.raises(UserError, match=r"^deepspeed mine/zero2\.json: no such file"):
        read_config("mine/zero2.json")


def test_recipes_and_the_demos_files_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_names() == sorted(path.stem for path in ROOT.glob("launchers/recipes/*.yaml"))
    for name in ("sdxl_dde", "sdxl_dde.yaml"):
        assert recipe_file(name) == ROOT / "launchers/recipes/sdxl_dde.yaml"
    with pytest.raises(UserError, match=r"^recipe sdxl_dd: not known; did you mean 'sdxl_dde'\?"):
        recipe_file("sdxl_dd")
    with pytest.raises(UserError, match=r"^recipe ../train: not known; known: sd15_24gb, "):
        recipe_file("../train")
    assert demo_file("pairs/train.parquet") == ROOT / "launchers/demo/pairs/train.parquet"


def test_of_an_installed_package(tmp_path):
    """Find the shipped files inside an installed package, without a checkout beside it."""
    shutil.copytree(ROOT / "dde_ds", tmp_path / "dde_ds", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "ds_configs", tmp_path / "dde_ds/ds_configs")
    code = "from dde_ds.shipped import *; print(deepspeed_file('zero3'), *deepspeed_names())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    path, *names = found.stdout.split()
    assert path == str(tmp_path / "dde_ds/ds_configs/zero3.json")
    assert names == dde_ds.shipped.deepspeed_names() == sorted(path.stem for path in ROOT.glob("ds_configs/*.json"))
