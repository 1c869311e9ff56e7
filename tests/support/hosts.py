"""Make two hosts on one machine: network namespaces joined by a bridge. Each has its own name; they share one file system.

Nothing of the machine's own network is touched. This needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launching import PATIENCE

NAMES = ("dde0", "dde1")
# Give a host its own name, its own /etc/hosts and its own ssh_config.
ENTER = """
set -e
mount --bind "$1/hosts" /etc/hosts
if [ -e "$1/ssh_config" ]; then mount --bind "$1/ssh_config" /etc/ssh/ssh_config; fi
hostname "$2"
shift 2
exec "$@"
"""


def missing(*programs: str) -> str | None:
    """Return why there can be no hosts with these programs here, or None."""
    lost = [program for program in ("ip", "nsenter", "unshare", *programs) if not find(program)]
    if lost:
        return f"not installed: {', '.join(lost)}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True).returncode:
        return "no network namespaces here"
    return None


def need(*programs: str) -> None:
    reason = missing(*programs)
    if reason:
        pytest.skip(reason)


def find(program: str) -> str | None:
    """Return the path of a program, or None.

    Look also beside this Python, whose virtual environment need not be active, and where Debian keeps daemons.
    """
    return shutil.which(
        program, path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/sbin", "/sbin"])
    )


def ip(*arguments: str) -> None:
    subprocess.run([find("ip"), *arguments], check=True, capture_output=True)


def wait_until(condition: Callable[[], object], what: str | Callable[[], str], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.1)


class Hosts:
    """Hold the two hosts, as a context manager. Processes that were started in the hosts end with it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._suffix = f"-{os.getpid()}"
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        switch = f"switch{self._suffix}"
        lines = ["127.0.0.1 localhost", *(f"10.213.7.{i + 1} {name}" for i, name in enumerate(NAMES))]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        for name in ("switch", *NAMES):
            ip("netns", "add", name + self._suffix)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for i, name in enumerate(NAMES):
            host = name + self._suffix
            ip("-n", switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("-n", switch, "link", "set", name, "master", "bridge", "up")
            ip("-n", host, "address", "add", f"10.213.7.{i + 1}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", host, "link", "set", device, "up")
        return self

    def __exit__(self, *_) -> None:
        for process in reversed(self._started):
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        for name in ("switch", *NAMES):
            pids = subprocess.run([find("ip"), "netns", "pids", name + self._suffix], capture_output=True, text=True).stdout
            for pid in map(int, pids.split()):  # processes that the ones above had started
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            ip("netns", "delete", name + self._suffix)

    def command(self, host: str, *command: str) -> list[str]:
        inside = [f"--net=/run/netns/{host}{self._suffix}", "unshare", "--uts", "--mount", "sh", "-c", ENTER, "sh"]
        return [find("nsenter"), *inside, str(self.folder), host, *map(str, command)]

    def start(self, host: str, *command: str, log: Path | None = None, **options) -> subprocess.Popen:
        """Start a process in a host. Its output goes to ``log``, or to pipes."""
        if log:
            with log.open("ab") as out:
                process = subprocess.Popen(self.command(host, *command), stdout=out, stderr=out, **options)
        else:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process = subprocess.Popen(self.command(host, *command), **pipes, **options)
        self._started.append(process)
        return process

    def run(self, host: str, *command: str, **options) -> str:
        process = subprocess.run(self.command(host, *command), capture_output=True, text=True, timeout=PATIENCE, **options)
        assert process.returncode == 0, (command, process.stdout, process.stderr)
        return process.stdout

    def cut(self, host: str) -> None:
        """Pull the host's plug: nothing that it sends arrives, and no other process is told."""
        ip("-n", f"switch{self._suffix}", "link", "set", host, "down")
