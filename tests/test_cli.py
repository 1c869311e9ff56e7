from __future__ import annotations

import argparse
import ast
import shlex
import subprocess
import sys

import pytest

from dde_ds import __version__, load_config
from dde_ds.cli import main
from dde_ds.cli.commands import build_parser
from tests.conftest import ROOT, shard
from tests.support.bases import changed, copied, scaled, with_checker
from tests.support.launching import RANK_VARIABLES, write_config


def test_validate(tmp_path, sd_model, sd_shards, capsys):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    assert main(["validate", str(config), "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert "dde, ZeRO-2, fp32, latents 4x8x8" in out
    assert "8 pairs a step = 2 ranks x 2 micro-batches of 2" in out
    assert "4 steps = 32 pairs = 1.60 epochs of 20" in out
    assert not (tmp_path / "run").exists()


def test_validate_finds_what_would_stop_a_run(tmp_path, parquet, sd_model, sd_shards, sdxl_shards, capsys):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    other_vae = scaled(copied(sd_model, tmp_path / "other_vae"), "vae")
    other_text = scaled(copied(sd_model, tmp_path / "other_text"), "text_encoder")
    other_factor = copied(sd_model, tmp_path / "other_factor")
    changed(other_factor / "vae" / "config.json", scaling_factor=0.5)
    few_steps = copied(sd_model, tmp_path / "few_steps")
    changed(few_steps / "scheduler" / "scheduler_config.json", num_train_timesteps=20)
    other_shards = shard(parquet, other_vae, tmp_path / "other_shards")
    without_weights = copied(sd_model, tmp_path / "without")
    (without_weights / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "a file").write_text("")
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("")
    autocast = tmp_path / "autocast.json"
    autocast.write_text('{"zero_optimization": {"stage": 2}, "torch_autocast": {"enabled": true}}')
    encoders = "whose VAE or text encoders have other weights than those of model.path"
    for overrides, named in (
        (f"data.path={sdxl_shards}", "was made for 'sdxl' models"),
        ("batch.micro_batch_size=3", "not a multiple of 2 ranks"),
        (f"model.path={other_vae}", f"data.path {sd_shards}: was encoded by '{sd_model}', {encoders} {other_vae}; shard"),
        (f"model.path={other_text}", encoders),
        (f"model.path={other_factor}", "its latents are scaled by 0.18215, those of model.path"),
        (f"data.path={other_shards}", f"{encoders} {sd_model}; shard the pairs with this model; or set data.allow_other_encoders"),
        (f"evaluation.path={other_shards}", f"evaluation.path {other_shards}: was encoded by"),
        (f"evaluation.path={other_shards} data.allow_other_encoders=true", "with other weights than data.path"),
        (f"model.path={without_weights}", "unet holds no diffusion_pytorch_model.safetensors"),
        ("lora={rank: 2, targets: [to_k, to_z]}", "lora.targets names 'to_z': nothing in the UNet ends in it"),
        ("lora={rank: 2, targets: [norm1]}", "no linear layer or convolution in the UNet ends in it"),
        (f"'output={tmp_path / 'a file' / 'run'}'", "a file is no folder"),
        (f"output={used}", "is not empty and holds no run"),
        ("log.trackers=[nothing]", "log.trackers names 'nothing'"),
        (f"model.path={few_steps} objective.timestep_range=null", "objective.correction_buckets is 50: it must lie in 1 to 20"),
        (
            f"model.path={few_steps} objective.timestep_range=null objective.correction_buckets=20 samples.prompts=[a] samples.inference_steps=30",
            "samples.inference_steps is 30: the model has 20 timesteps",
        ),
        (f"deepspeed={autocast}", "torch_autocast"),
    ):
        arguments = shlex.split(overrides) if "{" not in overrides else [overrides]
        assert main(["validate", str(config), *arguments, "--ranks", "2"]) == 1, overrides
        error = capsys.readouterr().err
        assert named in error
        assert error.count("error: ") == 1
    # Those who know that both encode alike.
    for override in (f"model.path={other_vae}", f"data.path={other_shards}"):
        assert main(["validate", str(config), override, "data.allow_other_encoders=true", "--ranks", "2"]) == 0
    assert not (tmp_path / "run").exists()


def test_validate_says_what_the_export_leaves_out(tmp_path, sd_model, sd_shards, capsys):
    config = write_config(tmp_path / "run.yaml", with_checker(sd_model, tmp_path / "base", pickled=True), sd_shards)
    assert main(["validate", str(config)]) == 0
    assert "note: the export leaves out the base's safety checker: its weights are a pickle" in capsys.readouterr().out


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
    assert main(["validate", config, f"output={tmp_path / 'another'}", "--ranks", "2"]) == 0
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


def test_arguments_are_shown_as_escapes(capsys):
    for arguments in (["recipe", "--x\x1b[31m"], ["recipe", "a", "b\x1b[31m"], ["plan", "x.yaml", "--gpus", "\x1b[31m"]):
        with pytest.raises(SystemExit):
            main(arguments)
        shown = capsys.readouterr().err
        assert "\x1b" not in shown
        assert r"\x1b[31m" in shown


def test_every_parser_takes_whole_names_only():
    parser = build_parser()
    (commands,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    assert {"train", "shard", "evaluate", "report"} < set(commands)
    assert not any(one.allow_abbrev for one in (parser, *commands.values()))
    files = [path for folder in ("dde_ds", "launchers", "tools") for path in (ROOT / folder).rglob("*.py")]
    calls = [
        (path.name, node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and any(ast.unparse(part).endswith("ArgumentParser") for part in (node.func, *node.args))
    ]
    assert len(calls) > 5
    assert not [name for name, _ in calls if (ROOT / "dde_ds" / "cli" / name).is_file()], "all are of build_parser"
    for name, call in calls:
        assert "allow_abbrev=False" in ast.unparse(call), name


@pytest.mark.parametrize("command", ["recipe", "recipe sdxl_dde", "--help", "recipe none 2>&1"])
def test_who_reads_the_output_may_leave(command):
    """Print no traceback, and exit like a program that SIGPIPE ends, as in `dde-ds recipe | head -1`."""
    shell = f"{shlex.quote(sys.executable)} -m dde_ds.cli {command} | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr == ""
    assert ended.stdout in ("141\n", "0\n")


def test_a_full_disk_behind_the_output():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        words = [sys.executable, "-m", "dde_ds.cli", "recipe"]
        ended = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (1, "error: no space left on device; make room, then start it again\n")


def test_a_folder_in_the_place_of_a_shard(tmp_path, parquet, sd_model, capsys):
    output = tmp_path / "shards"
    shard(parquet, sd_model, output)
    (output / "00001.tar").unlink()
    (output / "00001.tar").mkdir()
    words = [
        "shard",
        "--alone",
        "--input",
        parquet,
        "--model",
        sd_model,
        "--output",
        output,
        "--pairs-per-shard",
        "6",
        "--batch",
        "4",
    ]
    assert main([str(word) for word in words]) == 1
    said = f"error: --output {output}/00001.tar: is a directory; whole shards are kept, a second run goes on"
    assert capsys.readouterr().err.splitlines()[-1] == said


def test_absurd_numbers(capsys):
    for value in ("1e300", "nan", "0", "-1"):
        assert main(["doctor", "--timeout-minutes", value]) == 1
        assert capsys.readouterr().err.startswith("error: --timeout-minutes ")
