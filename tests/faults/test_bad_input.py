"""Bad input ends in one line that names it, with exit code 1, and leaves nothing that a later run would take for good."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from dde_ds.cli import main
from dde_ds.data.shards import ShardSet
from dde_ds.data.writer import Sample, write_manifest, write_shard
from tests.conftest import ROOT
from tests.support.launching import PATIENCE, Outcome, Run, alone, environment, launch, launch_many, write_config

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path, sd_model, sd_shards):
    return write_config(tmp_path / "run.yaml", sd_model, sd_shards)


def truncated(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    (target / "00001.tar").write_bytes((target / "00001.tar").read_bytes()[:4000])
    return target


def narrow(source: Path, target: Path) -> Path:
    """Write shards whose latents have another shape than the manifest says."""
    return reshard(source, target, lambda number, tensors: tensors | {"latents": tensors["latents"][..., :4].contiguous()})


def sixteen_channels(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_bytes())
    manifest["latents"]["shape"] = [16, 8, 8]
    write_manifest(target, manifest)
    return target


def flipped(source: Path, target: Path) -> Path:
    """One bit of one pair."""
    shutil.copytree(source, target)
    index = json.loads((target / "00001.json").read_bytes())
    damaged = bytearray((target / "00001.tar").read_bytes())
    damaged[sum(index["members"][2][1:3]) - 600] ^= 1
    (target / "00001.tar").write_bytes(damaged)
    return target


# By name: what is changed of a good run, or of its shards; what the one line says; whether the run had started when it was met.
REFUSED = {
    "no shards": ("data.path=/nowhere/shards", "data.path /nowhere/shards: no such folder", False),
    "no model": ("model.path=/nowhere/model", "model.path /nowhere/model: no model_index.json", False),
    "batch": ("batch.micro_batch_size=3", "batch.pairs is 8: not a multiple of 1 ranks × batch.micro_batch_size 3", False),
    "no deepspeed": ("deepspeed=/nowhere/ds.json", "deepspeed /nowhere/ds.json: no such file", False),
    "truncated": (truncated, "shard {shards}/00001.tar has 4000 bytes", False),
    "narrow": (narrow, "latents have shape (2, 4, 8, 4) float16, manifest.json says (2, 4, 8, 8)", True),
    "channels": (sixteen_channels, "latents have 16 channels (shape 16x8x8), the UNet of model.path", False),
    "flipped": (flipped, "shard {shards}/00001.tar, sample 000000008: ", True),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory, sd_model, sd_shards) -> dict[str, tuple[Path, Outcome]]:
    """Folder and outcome of each, by one process."""
    folder = tmp_path_factory.mktemp("refused")
    runs = {}
    for name, (change, _, _) in REFUSED.items():
        config = write_config(folder / name / "run.yaml", sd_model, sd_shards, steps=5)
        changed = change if isinstance(change, str) else f"data.path={change(sd_shards, folder / name / 'shards')}"
        runs[name] = Run(config, [changed])
    outcomes = launch_many(list(runs.values()), ranks=1)
    return {name: (folder / name, outcome) for name, outcome in zip(runs, outcomes, strict=True)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named(refused, name):
    """``launchers/train.py`` prints such an error as its one line: below."""
    folder, outcome = refused[name]
    _, named, started = REFUSED[name]
    assert outcome.code == 1
    (error,) = outcome.errors
    assert named.format(shards=folder / "shards") in error
    assert "\n" not in error
    assert (folder / "run").exists() == started
    assert not list(folder.glob("run/checkpoints/step-*"))
    assert not (folder / "run" / "DONE").exists()


def error_lines(process: subprocess.CompletedProcess) -> list[str]:
    assert process.returncode == 1, process.stderr[-3000:]
    assert "Traceback" not in process.stderr, process.stderr[-3000:]
    return [line for line in process.stderr.splitlines() if line.startswith("error")]


def test_unknown_key_is_reported_once_by_two_ranks(config, tmp_path):
    (line,) = error_lines(launch(config, "objective.bta=3"))
    assert line == "error: unknown key objective.bta; did you mean 'beta'?"
    assert not (tmp_path / "run").exists()


def test_resume_without_a_checkpoint(config, tmp_path):
    (line,) = error_lines(alone(config, "--resume"))
    assert "--resume found no checkpoint" in line
    assert not (tmp_path / "run").exists()


def reshard(source: Path, target: Path, change) -> Path:
    """The same shards through the real writer, every sample's tensors passed through ``change(number, tensors)``."""
    shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_bytes())
    reader, number, shard_rows = ShardSet(source), 0, []
    for shard, row in enumerate(manifest["shards"]):
        samples = []
        for line in range(row["samples"]):
            samples.append(Sample(number, change(number, reader.read(shard, line)), {}))
            number += 1
        shard_rows.append(write_shard(target, row["name"], samples, manifest["settings_digest"], []))
    write_manifest(target, manifest | {"shards": shard_rows})
    return target


def test_nan_in_a_latent_stops_two_ranks_and_saves_nothing(config, tmp_path, sd_shards):
    def poison(number, tensors):
        if number == 13:
            tensors["latents"][1, 2, 3, 4] = torch.nan
        return tensors

    copy = reshard(sd_shards, tmp_path / "shards", poison)
    process = launch(config, f"data.path={copy}", "checkpoint.every=100", "data.workers=1", "steps=10")
    assert process.returncode == 1
    lines = [line for line in process.stderr.splitlines() if line.startswith("error") and "000000013" in line]
    assert len(lines) == 1, process.stderr[-3000:]
    assert f"shard {copy}/00002.tar, sample 000000013: latents hold NaN" in lines[0]
    assert "Traceback" not in process.stderr, process.stderr[-3000:]
    run = tmp_path / "run"
    assert not (run / "DONE").exists()
    assert not (run / "export").exists()
    assert not list((run / "checkpoints").glob("step-*")) if (run / "checkpoints").exists() else True


def test_two_ranks_replace_what_they_may(config, tmp_path, sd_shards):
    """Two sources, one with a damaged pair. The run ends, and says what it did."""
    copy = flipped(sd_shards, tmp_path / "shards")
    sources = f"data.sources=[{{path: {sd_shards}, weight: 1}}, {{path: {copy}, weight: 3}}]"
    arguments = ("data.path=null", sources, "data.workers=1", "steps=5", "batch.pairs=16")
    process = launch(config, *arguments, "data.max_bad_samples=1")
    assert process.returncode == 0, process.stderr[-3000:]
    assert "00001.tar, sample 000000008: " in process.stderr
    assert "is trained on in its place" in process.stderr
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found[-1]["data/substitutions"] == 1  # though both ranks met it
    assert all(row["data/bytes_per_s"] > 0 and 0 <= row["perf/data_wait"] <= 1 for row in found)


def shard_tool(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "shard_pickapic.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)


def test_parquet_without_images(tmp_path, parquet, sd_model):
    path = tmp_path / "narrow.parquet"
    pq.write_table(pq.read_table(parquet).drop_columns(["jpg_0"]), path)
    output = tmp_path / "shards"
    (line,) = error_lines(shard_tool("--input", path, "--model", sd_model, "--output", output))
    assert line.startswith(f"error: --input {path}: no column jpg_0")
    assert not output.exists()


def test_options_of_sharding_are_checked_before_models_are_loaded(tmp_path, parquet, sd_model, capsys):
    """This model has no weights at all."""
    weightless = shutil.copytree(sd_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    given = ["--input", str(parquet), "--model", str(weightless), "--output", str(tmp_path / "shards")]
    for option, named in (
        (["--resolution", "17"], "error: --resolution 17: must be a multiple of 2, the VAE's factor"),
        (["--background", "whiet"], "error: --background whiet: expected a colour's name or #rrggbb"),
        (["--background", "#ffffff80"], "error: --background #ffffff80: expected a colour's name or #rrggbb"),
        (["--follow-links"], "error: --follow-links: is for the images of a pairs.jsonl"),
    ):
        assert main(["shard", *given, *option]) == 1
        assert capsys.readouterr().err.startswith(named)
    assert not (tmp_path / "shards").exists()


def test_a_stopped_sharding_is_no_shard_set(tmp_path, parquet, sd_model):
    """Ctrl-C after the first shard is one line, KILL after another nothing: training refuses the folder, a third run finishes it."""
    output = tmp_path / "shards"
    arguments = ["--input", parquet, "--model", sd_model, "--output", output, "--pairs-per-shard", "1", "--batch", "1"]
    stderr = {}
    for number, sent in enumerate((signal.SIGINT, signal.SIGKILL)):
        process = subprocess.Popen(
            [sys.executable, ROOT / "tools" / "shard_pickapic.py", *arguments],
            **{"cwd": ROOT, "env": environment(), "stderr": subprocess.PIPE, "text": True},
        )
        deadline = time.monotonic() + PATIENCE
        before = len(list(output.glob("[0-9]*.json")))
        while len(list(output.glob("[0-9]*.json"))) == before:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(sent)
        stderr[number] = process.communicate()[1]
        if number == 0:
            assert process.returncode == 130, stderr[0]
    assert stderr[0].splitlines()[-1] == "stopped by Ctrl-C; whole shards are kept, a second run goes on"
    assert "Traceback" not in stderr[0]
    (output / "manifest.json").unlink(missing_ok=True)  # where the tool was quicker than the kill
    (line,) = error_lines(alone(write_config(tmp_path / "run.yaml", sd_model, output)))
    assert "no manifest.json" in line
    assert shard_tool(*arguments).returncode == 0
    whole = ShardSet(output)
    assert sum(whole.counts) == 20
    for shard, count in enumerate(whole.counts):
        for row in range(count):
            whole.read(shard, row)
    for row in range(whole.manifest["prompts"]["distinct"]):
        whole.prompt(row)
