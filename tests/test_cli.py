from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from dde_ds import __version__, load_config
from dde_ds.cli import main
from tests.conftest import ROOT
from tests.launching import RANK_VARIABLES, write_config


def test_validate(tmp_path, sd_model, sd_shards, capsys):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    assert main(["validate", str(config), "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert "dde, ZeRO-2, fp32, latents 4x8x8" in out
    assert "8 pairs a step = 2 ranks x 2 micro-batches of 2" in out
    assert "4 steps = 32 pairs = 1.60 epochs of 20" in out
    assert not (tmp_path / "run").exists()


def test_validate_finds_what_would_stop_a_run(tmp_path, sd_model, sd_shards, sdxl_shards, capsys):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    for override, named in (
        (f"data.path={sdxl_shards}", "was made for 'sdxl' models"),
        ("batch.micro=3", "not a multiple of 2 ranks"),
    ):
        assert main(["validate", str(config), override, "--ranks", "2"]) == 1
        assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},  # a batch script, without srun
        {"RANK": "3"},
        {"WORLD_SIZE": "many", "OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_commands_of_one_process_do_not_look_at_the_launchers_variables(
    tmp_path, sd_model, sd_shards, monkeypatch, capsys, variables
):
    for name in RANK_VARIABLES:  # an earlier test's process group may have left them in this process
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = str(write_config(tmp_path / "run.yaml", sd_model, sd_shards))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(load_config(config).to_yaml())
    assert main(["validate", config, "--ranks", "2"]) == 0
    assert main(["plan", config, "--gpus", "2"]) == 0
    assert main(["explain", "--credit-only", "--output", str(tmp_path / "credit.png")]) == 0
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")]) == 0
    capsys.readouterr()
    # These have nothing to work on, and say so.
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 1
    assert "neither a run folder with a finished checkpoint nor a checkpoint" in capsys.readouterr().err
    assert (
        main(["compare", "--base", str(tmp_path), "--model", str(tmp_path), "--scorers", "clip", "--out", str(tmp_path / "c")]) == 1
    )
    assert "environment" not in capsys.readouterr().err
    assert main(["doctor", config]) == 1
    assert "error: environment: " in capsys.readouterr().err


def test_version(capsys):
    for arguments in (["-m", "dde_ds.cli", "--version"], ["launchers/train.py", "--version"]):
        shown = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert (shown.returncode, shown.stdout) == (0, f"dde_ds {__version__}\n"), shown.stderr


def test_options_are_taken_by_their_whole_names_only(tmp_path, capsys):
    """A name cut short may mean another option in a later version, and hides a typing error."""
    for arguments in (
        ["validate", "run.yaml", "--rank", "2"],
        ["plan", "run.yaml", "--node=2"],
        ["report", "run", "--out", "x"],
        ["--vers"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "usage: dde-ds" in capsys.readouterr().err
    started = subprocess.run(
        [sys.executable, "launchers/train.py", "--config", "run.yaml", "--resum"], cwd=ROOT, capture_output=True, text=True
    )
    assert (started.returncode, "unrecognized arguments: --resum" in started.stderr) == (2, True)


def test_every_parser_takes_whole_names_only():
    files = [path for folder in ("dde_ds", "launchers", "tools") for path in (ROOT / folder).rglob("*.py")]
    calls = [
        (path.name, node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and any(ast.unparse(part).endswith("ArgumentParser") for part in (node.func, *node.args))
    ]
    assert len(calls) > 12
    for name, call in calls:
        assert "allow_abbrev=False" in ast.unparse(call), name


def test_absurd_numbers(capsys):
    for value in ("1e300", "nan", "0", "-1"):
        assert main(["doctor", "--timeout-minutes", value]) == 1
        assert capsys.readouterr().err.startswith("error: --timeout-minutes ")
