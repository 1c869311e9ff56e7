"""The launchers' variables, as they set them, and in every wrong way that was thought of."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys

import pytest

from dde_ds.cli.node import read_arguments
from dde_ds.distributed.environment import OWN_PORTS, DistributedEnv, free_port, read_environment
from dde_ds.distributed.hostfile import first_host, read_hostfile, valid_host
from dde_ds.errors import UserError
from tests.conftest import ROOT

TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29501"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {
    **{"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"},
    **{"SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "2"},
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, DistributedEnv(0, 1, 0)),
        (TORCH, DistributedEnv(5, 8, 1, "node1", 29501)),
        (TORCH | {"LOCAL_WORLD_SIZE": "4"}, DistributedEnv(5, 8, 1, "node1", 29501)),
        (TORCH | {"MASTER_ADDR": "fe80::1"}, DistributedEnv(5, 8, 1, "fe80::1", 29501)),
        (MPIRUN, DistributedEnv(1, 2, 1, "127.0.0.1", 29500)),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "10.0.0.1"}, DistributedEnv(1, 2, 1, "10.0.0.1", 29500)),
        (HYDRA, DistributedEnv(1, 2, 1, "127.0.0.1", 29500)),
        # A single rank takes a port that is free, whatever its launcher says: another run may be there.
        ({**TORCH, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, DistributedEnv(0, 1, 0)),
        (dict.fromkeys(MPIRUN, "0") | {"OMPI_COMM_WORLD_SIZE": "1", "MASTER_PORT": "29500"}, DistributedEnv(0, 1, 0)),
        # But torchrun's agent listens there already, and its rank is to call it.
        (
            {**TORCH, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            DistributedEnv(0, 1, 0, "node1", 29501),
        ),
        (SRUN, DistributedEnv(5, 8, 1, "gpu03", 20000 + 1234 * 7 + 2)),
        (SRUN | {"MASTER_ADDR": "ib-gpu03", "MASTER_PORT": "4000"}, DistributedEnv(5, 8, 1, "ib-gpu03", 4000)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, DistributedEnv(0, 1, 0)),
        # srun --mpi=pmi2 sets both.
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, DistributedEnv(5, 8, 1, "gpu03", 20000 + 1234 * 7 + 2)),
        # mpiexec in an allocation starts one Slurm task a node, and its own ranks inside.
        (SRUN | HYDRA, DistributedEnv(1, 2, 1, "127.0.0.1", 29500)),
        # A launcher inside each Slurm task: two tasks, four ranks each.
        (TORCH | SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, DistributedEnv(5, 8, 1, "node1", 29501)),
        # The batch script of a job with one task, without srun.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, DistributedEnv(0, 1, 0)),
    ],
)
def test_each_launcher(environment, expected):
    assert read_environment(environment) == expected


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK not set beside WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK not set beside RANK=0, WORLD_SIZE=2"),
        ({**TORCH, "RANK": "two"}, "RANK='two': expected a whole number"),
        ({**TORCH, "RANK": "-1"}, "RANK='-1': expected a whole number"),
        ({**TORCH, "RANK": "²"}, "RANK='²': expected a whole number"),
        ({**TORCH, "RANK": "8"}, "RANK=8, WORLD_SIZE=8, LOCAL_RANK=1 contradict"),
        ({**TORCH, "LOCAL_RANK": "6"}, "RANK=5, WORLD_SIZE=8, LOCAL_RANK=6 contradict"),
        ({**TORCH, "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1, LOCAL_WORLD_SIZE=1, WORLD_SIZE=8 contradict"),
        ({**TORCH, "SLURM_STEP_NUM_TASKS": "16"}, "WORLD_SIZE=8, but srun started 16 tasks"),
        ({k: v for k, v in TORCH.items() if not k.startswith("MASTER")}, "MASTER_ADDR and MASTER_PORT not set beside RANK=5"),
        ({**TORCH, "MASTER_ADDR": "node1; rm -rf ~"}, "MASTER_ADDR='node1; rm -rf ~': expected a host name"),
        ({**TORCH, "MASTER_ADDR": "$(hostname)"}, "MASTER_ADDR='$(hostname)'"),
        ({**TORCH, "MASTER_ADDR": "-oProxyCommand=x"}, "MASTER_ADDR='-oProxyCommand=x'"),
        ({**TORCH, "MASTER_ADDR": ""}, "MASTER_ADDR=''"),
        ({**TORCH, "MASTER_PORT": "70000"}, "MASTER_PORT='70000': expected a port"),
        ({**TORCH, "MASTER_PORT": "0"}, "MASTER_PORT='0': expected a port"),
        ({**TORCH, "MASTER_PORT": "http"}, "MASTER_PORT='http': expected a port"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "MASTER_ADDR not set, and mpirun does not tell it"),
        ({k: v for k, v in MPIRUN.items() if "LOCAL" not in k}, "OMPI_COMM_WORLD_LOCAL_RANK not set beside OMPI_COMM_WORLD_RANK=1"),
        ({"PMI_RANK": "1"}, "PMI_SIZE, MPI_LOCALRANKID not set beside PMI_RANK=1"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID not set beside SLURM_PROCID=5"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}, "neither SLURM_STEP_NODELIST nor MASTER_ADDR is set"),
        ({**SRUN, "SLURM_STEP_NODELIST": "$(reboot)"}, "SLURM_STEP_NODELIST='$(reboot)'"),
        ({**SRUN, "SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x'"),
        ({**SRUN, "SLURM_PROCID": "8"}, "SLURM_PROCID=8, SLURM_STEP_NUM_TASKS=8, SLURM_LOCALID=1 contradict"),
        # Without srun, in the batch script of a job with eight tasks: it would wait for seven that never come.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, "put srun before the command"),
    ],
)
def test_wrong_environments(environment, named):
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        read_environment(environment)
    assert str(caught.value).startswith("environment: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login1", "login1"),
        ("node[01-04]", "node01"),
        ("node[7,9-12],other3", "node7"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]n[01-04]-ib", "rack1n01-ib"),
        ("gpu-3.cluster.example.org", "gpu-3.cluster.example.org"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    "nodes", ["", "node[", "node[1-", "node[a-b]", "node[1-2", "node 1", "a;b", "-x[1-2]", "node[1-2]]", "$(id)"]
)
def test_no_host_list(nodes):
    with pytest.raises(UserError, match="expected host names such as"):
        first_host(nodes)


def test_hosts():
    assert all(valid_host(text) for text in ("node1", "10.0.0.1", "::1", "a.b-c_d"))
    assert not any(
        valid_host(text) for text in ("", " ", "-l", "a b", "a\n", "a;b", "a|b", "`id`", "$HOME", "a/b", "user@host", "é")
    )


def test_one_node_takes_a_free_port_and_several_a_known_one(monkeypatch):
    for name in ("PET_NNODES", "PET_MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("dde_ds.distributed.environment.OWN_PORTS", range(24567, 24667))
    taken = []
    try:
        for port in range(24567, 24666):  # all but the last
            taken.append(socket.socket())
            with contextlib.suppress(OSError):
                taken[-1].bind(("", port))
        assert free_port() == 24666
        assert read_arguments(["--ranks", "1"])[0].port == 24666
    finally:
        for one in taken:
            one.close()
    assert read_arguments(["--ranks", "1", "--nodes", "2"])[0].port == 29500
    assert read_arguments(["--ranks", "1", "--port", "4000"])[0].port == 4000
    monkeypatch.setenv("PET_MASTER_PORT", "4001")
    assert read_arguments(["--ranks", "1"])[0].port == 4001
    assert max(OWN_PORTS) < 32768


def test_exported_variables_read_back_the_same(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(SRUN))
    ranks = read_environment(SRUN)
    ranks.export()
    assert set(os.environ) == {*SRUN, *TORCH}
    assert read_environment(os.environ) == ranks


def test_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two nodes\n\nnode1 slots=8\n 10.0.0.2\tslots=8 \n")
    assert read_hostfile(path) == {"node1": 8, "10.0.0.2": 8}
    assert set(read_hostfile(ROOT / "launchers" / "hostfile.example").values()) == {8}


def test_a_hostfile_as_deepspeed_reads_it(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text(
        "node1 slots=4 # in the first rack\nnode2 slots=4\t#again\nnode3 slots=4#\n # node9 slots=4\nnode4 slots=4 max_slots=8\n"
    )
    assert read_hostfile(path) == fetch_hostfile(str(path)) == dict.fromkeys(("node1", "node2", "node3", "node4"), 4)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("node1 slots=8\n-oProxyCommand=reboot slots=8", "line 2 is '-oProxyCommand=reboot slots=8': expected a host name"),
        ("$(reboot) slots=8", "line 1 is '$(reboot) slots=8'"),
        ("node1;reboot slots=8", "line 1 is"),
        ("node1", "line 1 is 'node1'"),
        ("node1 slots=0", "line 1 is"),
        ("node1 slots=8x", "line 1 is"),
        ("node1 slots=8# no space needed\nnode2 # slots=8", "line 2 is"),
        ("node1 slots=8\nnode1 slots=8", "line 2: node1 is there twice"),
        ("node1 slots=8\nnode2 slots=4", "equal numbers of slots, found node1 8, node2 4"),
        ("", "found none"),
    ],
)
def test_no_hostfile(tmp_path, text, named):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(named)):
        read_hostfile(path)
    with pytest.raises(UserError, match="no such file"):
        read_hostfile(tmp_path / "none")


ENDS = """
import atexit
import torch.distributed as dist
from dde_ds.distributed.process import end_process

class Held:
    def __del__(self):
        print("the interpreter was taken down")

held = Held()
atexit.register(print, "registered")
print("printed")
if {joined}:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
end_process(75)
"""


@pytest.mark.parametrize("joined", [True, False])
def test_a_rank_ends_without_taking_the_interpreter_down(joined):
    """A thread of gloo's that drops a tensor meanwhile would abort the process: rarely, and on a busy machine."""
    ended = subprocess.run([sys.executable, "-c", ENDS.format(joined=joined)], cwd=ROOT, capture_output=True, text=True)
    down = "" if joined else "the interpreter was taken down\n"
    assert (ended.returncode, ended.stdout) == (75, f"printed\nregistered\n{down}"), ended.stderr


def test_a_deepspeed_that_trains_wrongly_is_refused(monkeypatch):
    """Refuse an older DeepSpeed than setup.py requires, in a launch and for a caller of ``initialize``."""
    import deepspeed
    import torch

    import dde_ds
    from dde_ds.distributed.group import DEEPSPEED, check_deepspeed, start

    check_deepspeed()
    oldest = re.search(r"deepspeed>=([\d.]+),", (ROOT / "setup.py").read_text())[1]
    assert tuple(map(int, oldest.split("."))) == DEEPSPEED
    monkeypatch.setattr(deepspeed, "__version__", "0.19.7")
    monkeypatch.setattr(deepspeed, "__version_patch__", 7)
    for tried in (start, lambda: dde_ds.initialize(torch.nn.Linear(1, 1), None, {})):
        with pytest.raises(UserError, match=r"deepspeed 0\.19\.7 is installed.* pip install 'deepspeed>=0\.19\.8,<0\.20'"):
            tried()
