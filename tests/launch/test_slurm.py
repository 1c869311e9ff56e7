"""Slurm for real: a controller and two nodes, our batch script, a time limit's signal, a preemption, and the run finished."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dde_ds import load_config
from tests.conftest import ROOT
from tests.support.hosts import NAMES, Hosts, find, need, wait_until
from tests.support.launching import PATIENCE, environment, rows, write_config
from tests.support.reference_loop import plain_losses

pytestmark = pytest.mark.launch
SBATCH = ROOT / "launchers" / "slurm" / "train.sbatch"

SLURM_CONF = """
ClusterName=test
SlurmctldHost=dde0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=dde[0-1] CPUs={cpus}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2
"""


class Slurm:
    def __init__(self, hosts: Hosts):
        self.hosts, self.folder = hosts, hosts.folder
        self.environment = environment() | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        # As a user's environment would be: nothing of a launcher's in it, and this Python first.
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"

    def __enter__(self) -> Slurm:
        folder = self.folder
        (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, cpus=os.cpu_count()))
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        for name in ("state", *(f"spool-{name}" for name in NAMES)):
            (folder / name).mkdir()
        files = [f"--{kind}={folder}/munge.{end}" for kind, end in (("socket", "sock"), ("pid-file", "pid"), ("seed-file", "seed"))]
        files += [f"--key-file={folder}/munge.key", f"--log-file={folder}/munge.log"]
        self.hosts.start("dde0", find("munged"), "--force", "--foreground", *files, log=folder / "munged.log")
        wait_until((folder / "munge.sock").exists, "munged did not start")
        for name, daemon in (("dde0", "slurmctld"), ("dde0", "slurmd"), ("dde1", "slurmd")):
            self.hosts.start(name, find(daemon), "-D", log=folder / f"{daemon}-{name}.log", env=self.environment)
        wait_until(lambda: self("sinfo", "--noheader", "--format=%T %D", check=False).strip() == "idle 2", "the nodes did not come")
        return self

    def __exit__(self, *_) -> None:
        self("scancel", "--full", "--signal=KILL", "--user=root", check=False)

    def __call__(self, *command: str, check: bool = True) -> str:
        process = subprocess.run(
            self.hosts.command("dde0", *command), cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert process.returncode == 0 or not check, (command, process.stderr)
        return process.stdout

    def state(self, job: str) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self("scontrol", "--oneliner", "show", "job", job).split() if "=" in pair)

    def log(self) -> str:
        return "".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    need("slurmctld", "slurmd", "sbatch", "munged")
    with Hosts(tmp_path_factory.mktemp("slurm")) as hosts, Slurm(hosts) as slurm:
        yield slurm


def test_signalled_preempted_and_finished(slurm, tmp_path, sd_model, sd_shards):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards, steps=40)
    changes = ("optimizer.learning_rate=1e-5",)
    run, out = tmp_path / "run", tmp_path / "job.log"
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={out}", "--parsable"]
    job = slurm("sbatch", *options, SBATCH, run, config, *changes).strip()

    def seen() -> int:
        assert slurm.state(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "PREEMPTED", "REQUEUED"), slurm.log()
        return len(rows(run)) if (run / "metrics.jsonl").exists() else 0

    wait_until(lambda: seen() >= 2, slurm.log)
    # What --signal=USR1@300 sends before the time limit, to the same processes.
    slurm("scancel", "--signal=USR1", job)
    wait_until(lambda: slurm.state(job)["Restarts"] == "1", slurm.log)
    first = seen()
    assert first < 40
    wait_until(lambda: seen() > first + 1, slurm.log)
    # A job that matters more takes the nodes: ours gets TERM, and a minute.
    more = slurm(
        "sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--parsable", "--wrap", "sleep 1"
    ).strip()
    wait_until(lambda: slurm.state(job)["Restarts"] == "2", slurm.log)
    second = seen()
    assert first < second < 40
    wait_until(lambda: slurm.state(job)["JobState"] == "COMPLETED", slurm.log)
    assert slurm.state(more)["JobState"] == "COMPLETED"
    assert slurm.state(job)["ExitCode"] == "0:0"
    assert (run / "DONE").exists()
    assert out.read_text().count("stopped after step") == 2, out.read_text()
    assert [row["step"] for row in rows(run)] == list(range(1, 41))
    expected = plain_losses(load_config(config, changes))
    assert [row["loss"] for row in rows(run)] == pytest.approx(expected, abs=1e-5)


def test_a_stop_file_is_for_good_and_an_error_fails_the_job(slurm, tmp_path, sd_model, sd_shards):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards, steps=5000)
    run, out = tmp_path / "run", tmp_path / "job.log"
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={out}", "--parsable"]
    job = slurm("sbatch", *options, SBATCH, run, config, "optimizer.learning_rate=1e-5").strip()
    wait_until(lambda: (run / "metrics.jsonl").exists() and rows(run), slurm.log)
    wrong = slurm("sbatch", *options, "--output", tmp_path / "wrong.log", SBATCH, tmp_path / "other", config, "stepz=1").strip()
    (run / "STOP").touch()
    for name, code in ((job, "75:0"), (wrong, "1:0")):
        wait_until(lambda name=name: slurm.state(name)["JobState"] == "FAILED", slurm.log)
        assert slurm.state(name)["ExitCode"] == code
        assert slurm.state(name)["Restarts"] == "0"
    assert "error: unknown key stepz; did you mean 'steps'?" in (tmp_path / "wrong.log").read_text()
    assert not (run / "DONE").exists()
