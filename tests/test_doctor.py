"""``dde-ds doctor`` where all is well, and where it is not."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dde_ds import doctor
from dde_ds.config import load_config
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.errors import UserError
from tests.support.launching import PATIENCE, environment, free_port, write_config

CODE = "from dde_ds.cli import command; command()"


@pytest.fixture
def config(tmp_path, sd_model, sd_shards):
    return write_config(tmp_path / "run.yaml", sd_model, sd_shards)


def start(*arguments, rank: int = 0, world: int = 1, port: int = 0, **options) -> subprocess.Popen:
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        [sys.executable, "-c", CODE, "doctor", *arguments],
        env=environment() | variables | options.pop("variables", {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def lines(process: subprocess.Popen) -> dict[str, str]:
    """The verdict and what was found, by check."""
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert not stderr.strip().startswith("Traceback"), stderr
    return {
        line[6:24].strip(): line[:6].strip() + " " + line[24:] for line in stdout.splitlines() if line.startswith(("ok  ", "FAIL"))
    }


@pytest.mark.slow
def test_two_healthy_ranks(config, sd_shards, tmp_path):
    port = free_port()
    sources = ("data.path=null", f"data.sources=[{{path: {sd_shards}}}]", f"reference.precomputed={tmp_path}/precomputed/seed-0")
    first, second = (start(config, *sources, rank=rank, world=2, port=port) for rank in range(2))
    found = lines(first)
    assert second.communicate(timeout=PATIENCE)[0].strip() == ""
    assert (first.returncode, second.returncode) == (0, 0), found
    assert all(line.startswith("ok ") for line in found.values())
    assert list(found) == [
        *(
            "ranks",
            "versions",
            "accelerator",
            "shared memory",
            "open files",
            "temporary folder",
            "network device",
            "shards",
            "free disk",
            "precomputed",
        ),
        *("clocks", "traffic", "shared folder"),
    ]
    assert "2 on 1 hosts" in found["ranks"]
    assert f"{sd_shards}: 20 pairs, digest " in found["shards"]
    assert "M parameters and the export take" in found["free disk"]
    assert found["precomputed"] == f"ok {tmp_path}/precomputed: writable by rank 0"
    assert "synced by all, seen by rank 0" in found["shared folder"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"], "it leaves nothing behind"


@pytest.mark.slow
def test_two_ranks_that_do_not_share_a_folder(config, sd_shards, sdxl_shards, tmp_path):
    """Each in a working directory of its own, with relative paths: as two nodes with local disks, and another set of shards on each."""
    port = free_port()
    processes = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "shards").symlink_to((sd_shards, sdxl_shards)[rank])
        root = str(Path(__file__).resolve().parent.parent)
        options = {"cwd": tmp_path / str(rank), "variables": {"PYTHONPATH": root}}
        processes.append(start(config, "output=run", "data.path=shards", rank=rank, world=2, port=port, **options))
    found = lines(processes[0])
    processes[1].communicate(timeout=PATIENCE)
    assert [process.returncode for process in processes] == [1, 1]
    assert found["shared folder"].startswith("FAIL")
    assert "a file that rank 1 wrote is not there for rank 0" in found["shared folder"]
    assert "ranks differ: shards: 20 pairs, digest " in found["shards"]
    assert [name for name, line in found.items() if line.startswith("FAIL")] == ["shards", "shared folder"]


@pytest.mark.slow
def test_one_sick_machine(config):
    process = start(
        config,
        "data.path=/nowhere",
        "checkpoint.keep=100000000",
        variables={"GLOO_SOCKET_IFNAME": ""},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512)),
    )
    found = lines(process)
    assert process.returncode == 1
    assert [name for name, line in found.items() if line.startswith("FAIL")] == ["open files", "shards", "free disk"]
    assert "512 files may be open: raise it to 1024 or more" in found["open files"]
    assert "data.path /nowhere: no such folder" in found["shards"]
    assert "GB free, but 100000001 checkpoints of" in found["free disk"]


def test_ranks_that_do_not_meet():
    process = start("--timeout-minutes", "0.03", rank=0, world=2, port=free_port())
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert stdout == ""
    assert "error: rank 0 of 2 did not meet the others at 127.0.0.1:" in stderr


def test_held_out_pairs_and_the_folder_of_the_precomputed_reference_are_looked_at_too(config, sd_shards, tmp_path):
    def run(**changes):
        return load_config(config, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])

    assert doctor._shards(run(evaluation__path=sd_shards)).count(": 20 pairs, digest ") == 2
    with pytest.raises(UserError, match=r"^evaluation.path /nowhere: no such folder"):
        doctor._shards(run(evaluation__path="/nowhere"))
    ranks = DistributedEnv(0, 1, 0)
    (tmp_path / "file").touch()
    with pytest.raises(doctor.Failed, match=r"^reference.precomputed .*: not writable: not a directory"):
        doctor._precomputed(run(reference__precomputed=tmp_path / "file" / "precomputed"), ranks)


def test_nothing_is_left_where_a_rename_fails(tmp_path):
    (tmp_path / "probe").mkdir()
    with pytest.raises(IsADirectoryError):
        doctor._write_synced(tmp_path / "probe", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["probe"]
