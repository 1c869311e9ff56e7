"""The deepspeed launcher over two hosts: by pdsh and ssh from a hostfile, and started on each host by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dde_ds import load_config
from tests.conftest import ROOT
from tests.support.hosts import NAMES, Hosts, find, need
from tests.support.launching import LAUNCHER, PATIENCE, environment, rows, wait_for_rows, write_config
from tests.support.reference_loop import plain_losses

pytestmark = pytest.mark.launch
TRAIN = ROOT / "launchers" / "train.py"

SSHD_CONFIG = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
# With what launchers/README.md recommends: a host that fell silent ends its ssh in bounded time.
SSH_CONFIG = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ServerAliveInterval 5
ServerAliveCountMax 3
"""


@pytest.fixture
def config(tmp_path, sd_model, sd_shards):
    return write_config(tmp_path / "run.yaml", sd_model, sd_shards)


@pytest.fixture
def hostfile(tmp_path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text(
        (ROOT / "launchers" / "hostfile.example").read_text().replace("=8", "=1").replace("node1", "dde0").replace("node2", "dde1")
    )
    return path


@pytest.fixture
def hosts(tmp_path):
    need()
    with Hosts(tmp_path) as hosts:
        yield hosts


def test_hostfile_over_ssh(config, hostfile, tmp_path):
    """The whole way: the runner, pdsh, sshd, a launcher and a rank on each host; stopped by a file."""
    need("pdsh", "ssh", "sshd", "ssh-keygen")
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks itself up
    subprocess.run([find("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    (tmp_path / "sshd_config").write_text(SSHD_CONFIG.format(folder=tmp_path))
    (tmp_path / "ssh_config").write_text(SSH_CONFIG.format(folder=tmp_path))
    variables = environment() | {"PDSH_RCMD_TYPE": "ssh"}
    # Variables for the ranks travel in this file; no blank lines in it.
    (tmp_path / "carried").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n")
    variables["DS_ENV_FILE"] = str(tmp_path / "carried")
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with Hosts(tmp_path) as hosts:
        for name in NAMES:
            hosts.start(name, find("sshd"), "-D", "-e", "-f", str(tmp_path / "sshd_config"), log=tmp_path / f"sshd-{name}.log")

        command = [LAUNCHER, "--hostfile", hostfile, "--master_addr", "dde0", TRAIN, "--config", config]
        process = hosts.start("dde0", *command, "steps=5000", "optimizer.learning_rate=1e-5", cwd=ROOT, env=variables)
        wait_for_rows(tmp_path / "run", 2, process)
        (tmp_path / "run" / "STOP").touch()
        output = process.communicate(timeout=PATIENCE)
        assert process.returncode == 75, output
    found = [row["loss"] for row in rows(tmp_path / "run")]
    expected = plain_losses(load_config(config, [f"steps={len(found)}", "optimizer.learning_rate=1e-5"]))
    assert found == pytest.approx(expected, abs=1e-5)
    assert (tmp_path / "run" / "checkpoints" / f"step-{len(found):08d}").is_dir()


def test_a_host_is_lost(hosts, config, hostfile, tmp_path):
    """Started on each host by itself, without ssh. One host's plug is pulled: no connection is closed, nothing more arrives."""
    arguments = ("steps=100000", "optimizer.learning_rate=1e-6", "timeout_minutes=0.25", "checkpoint.every=2")
    nodes = [
        hosts.start(
            name,
            *(LAUNCHER, "--no_ssh", "--node_rank", i, "--hostfile", hostfile, "--num_nodes", 2, "--master_addr", "dde0"),
            *("--master_port", 29500, TRAIN, "--config", config, *arguments),
            cwd=ROOT,
            env=environment(),
        )
        for i, name in enumerate(NAMES)
    ]
    wait_for_rows(tmp_path / "run", 4, *nodes)
    hosts.cut("dde1")
    for node in nodes:
        _, stderr = node.communicate(timeout=PATIENCE)
        assert node.returncode == 1
        assert "the connection to another rank was lost" in stderr
    assert not (tmp_path / "run" / "DONE").exists()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_torchrun(config, tmp_path):
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--standalone", "--nproc-per-node", "2", TRAIN, "--config", config, "steps=2"]
    process = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "run" / "DONE").exists()
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx(
        plain_losses(load_config(config, ["steps=2"])), abs=1e-5
    )
