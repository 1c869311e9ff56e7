"""Check the content of run folders: a run overwrites no file of the user, and continues if it was killed early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from dde_ds import UserError, load_config
from dde_ds.training import lock as lock_py
from dde_ds.training.folder import LOCK, claimed, holds
from tests.conftest import ROOT
from tests.support.launching import PATIENCE, Run, environment, free_port, launch_many, write_config


@pytest.fixture(scope="module", autouse=True)
def group():
    """Provide a process group of this process alone. Another test may already have created one."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fill(folder: Path, *names: str, text: str = "mine") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_text(text)
    return folder


@pytest.fixture(scope="module")
def config_yaml(tmp_path_factory, sd_model, sd_shards) -> str:
    return load_config(write_config(tmp_path_factory.mktemp("config") / "run.yaml", sd_model, sd_shards)).to_yaml()


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def claim(folder: Path, resume: str | None) -> None:
    with claimed(folder, resume, print):
        assert (folder / LOCK).is_file()


@pytest.mark.parametrize("resume", [None, "auto", "required"])
@pytest.mark.parametrize(
    "names",
    [
        ("notes.txt",),
        ("export/unet/model.safetensors", "config.yaml"),
        ("metrics.jsonl", "thesis.tex"),
        ("checkpoints/epoch-1.pt", "config.yaml"),
        (".git/HEAD",),
        ("DONE",),
        ("samples/0.png",),
    ],
    ids=lambda names: names[0],
)
def test_a_folder_of_the_users_is_refused_and_stays_as_it_was(tmp_path, names, resume):
    folder = fill(tmp_path / "mine", *names)
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        claim(folder, resume)
    assert str(caught.value) == f"output {folder}: is not empty and holds no run; choose another folder"
    assert contents(folder) == before


@pytest.mark.parametrize("names", [(), ("STOP",), ("lost+found/", "heartbeat"), ("slurm-1.log", "train.err"), ("run.lock.0123",)])
def test_a_folder_without_contents_is_free(tmp_path, names):
    folder = fill(tmp_path / "run", *names)
    folder.mkdir(exist_ok=True)
    for resume in (None, "auto"):
        claim(folder, resume)
    assert sorted(contents(folder)) == sorted(name for name in names if not name.endswith("/"))


@pytest.mark.parametrize(
    "names", [("config.yaml",), ("config.yaml", "metrics.jsonl", "samples/a.png"), ("metrics.jsonl", "checkpoints/.staging/")]
)
def test_a_run_killed_before_its_first_checkpoint_goes_on_when_asked_to(tmp_path, config_yaml, names):
    folder = fill(tmp_path / "run", *names, text=config_yaml)
    with pytest.raises(
        UserError, match="holds a run already, without a checkpoint yet; start it anew with --resume auto, or choose"
    ):
        claim(folder, None)
    claim(folder, "auto")


@pytest.mark.parametrize("resume", [None, "auto", "required"])
def test_a_finished_run_without_checkpoints_is_not_started_anew(tmp_path, config_yaml, resume):
    folder = fill(tmp_path / "run", "config.yaml", "DONE", "export/model.safetensors", text=config_yaml)
    with pytest.raises(UserError, match="holds a finished run without a checkpoint to go on from; choose another folder"):
        claim(folder, resume)
    assert holds(folder) == "done run"


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"output {folder}: .*not a directory"):
            claim(folder, None)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").symlink_to(tmp_path / "pipe")
    with pytest.raises(UserError, match="holds no run"):
        claim(tmp_path / "run", None)


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(KeyError), claimed(tmp_path / "runs" / "first", None, print):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path / "runs" / "first", None, print):
        (tmp_path / "runs" / "first" / "config.yaml").touch()
    assert contents(tmp_path) == {"runs/first/config.yaml": ""}


@pytest.mark.slow
def test_all_ranks_obey(tmp_path, sd_model, sd_shards, config_yaml):
    """Two real ranks: a foreign folder, a run that is going on, one that was killed before its first checkpoint, one that died."""
    foreign = fill(tmp_path / "foreign", "export/unet/model.safetensors", "config.yaml")
    other = fill(tmp_path / "other", "config.yaml", text=config_yaml)
    (other / LOCK).write_text(json.dumps(lock_py._myself()))  # this process lives
    killed = fill(tmp_path / "killed", "config.yaml", text=config_yaml)
    (killed / LOCK).write_text(json.dumps(lock_py._myself() | {"ticks": "1"}))
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards, steps=1)
    fresh = [f"output={tmp_path / 'new' / 'run'}"]
    runs = {
        "foreign": Run(config, [f"output={foreign}"], "auto"),
        "other": Run(config, [f"output={other}"], "auto"),
        "none": Run(config, fresh, "required"),
        "killed": Run(config, [f"output={killed}"]),
        "killed auto": Run(config, [f"output={killed}"], "auto"),
    }
    found = dict(zip(runs, launch_many(list(runs.values())), strict=True))
    named = {
        "foreign": "is not empty and holds no run",
        "other": f"a run is going on there, started {time.strftime('%Y')}",
        "none": "--resume found no checkpoint there",
        "killed": "start it anew with --resume auto",
    }
    for name, text in named.items():
        assert [text in error for error in found[name].errors] == [True, True], found[name]
    assert contents(foreign) == {"export/unet/model.safetensors": "mine", "config.yaml": "mine"}
    assert not (tmp_path / "new").exists()
    assert found["killed auto"].code == 0, found["killed auto"]
    assert (killed / "DONE").exists()
    assert not list(killed.glob(f"{LOCK}*"))
    assert list(contents(other)) == ["config.yaml", LOCK]


def catches(process: subprocess.Popen, number: int) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(caught >> (number - 1) & 1)


@pytest.mark.slow
def test_a_request_to_stop_in_the_first_moments_counts(tmp_path, sd_model, sd_shards):
    """Handle a stop request long before the libraries are imported: exit with 75 and print no traceback."""
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    asked = {"train.py": signal.SIGUSR1, "node.py": signal.SIGTERM}
    arguments = {"train.py": [], "node.py": ["--ranks", "2"]}
    started = {
        name: subprocess.Popen(
            [sys.executable, ROOT / "launchers" / name, *arguments[name], "--config", config, f"output={tmp_path / name / 'run'}"],
            **{"cwd": ROOT, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
        )
        for name in asked
    }
    deadline = time.monotonic() + PATIENCE
    for name, process in started.items():
        while not catches(process, asked[name]):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(asked[name])
    for name, process in started.items():
        stdout, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == 75, stderr
        # On a busy machine half a minute may pass before the ranks have met: then the process stops waiting for them.
        whens = ("a step was made", "the ranks had met")
        assert stdout in [f"stopped as asked before {when}; go on with --resume auto\n" for when in whens]
        assert not (tmp_path / name).exists()


@pytest.mark.slow
def test_a_rank_that_waits_for_others_in_vain_stops_too(tmp_path, sd_model, sd_shards):
    """The second of its two ranks never comes."""
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = subprocess.Popen(
        [sys.executable, ROOT / "launchers" / "train.py", "--config", config],
        **{"cwd": ROOT, "env": environment() | alone, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    deadline = time.monotonic() + PATIENCE
    while not any(one.laddr.port == int(alone["MASTER_PORT"]) for one in psutil.Process(process.pid).net_connections("tcp")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert (process.returncode, stdout) == (75, "stopped as asked before the ranks had met; go on with --resume auto\n"), stderr
    assert not (tmp_path / "run").exists()
