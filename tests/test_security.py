"""A run speaks to nobody outside, tells no secrets, and executes nothing that it was given as text."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launching import PATIENCE, environment, write_config

OURS = [path for folder in ("dde_ds", "launchers", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
SECRETS = {name: f"very-secret-{name.lower()}-7d1c" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
# Executed by any Python that finds it: writes down what the process does, before it does it.
WATCH = """
import os, sys
def hook(event, arguments, log=open(os.environ["AUDIT_LOG"], "a")):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "os.system", "os.exec"):
        print(event, arguments[-1] if event != "socket.getaddrinfo" else arguments[0], file=log, flush=True)
sys.addaudithook(hook)
"""
LOCAL = ("127.", "::1", "localhost")


def name_of(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shell_no_eval_no_pickle(path):
    banned = {
        "eval",
        "exec",
        "compile",
        "os.system",
        "os.popen",
        "pickle.load",
        "pickle.loads",
        "torch.load",
        "yaml.load",
        "__import__",
    }
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            plain = any(keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords)
            assert plain or name_of(node.func) not in banned, f"{path}:{node.lineno}"
            assert not any(keyword.arg == "shell" for keyword in node.keywords), f"{path}:{node.lineno}"


@pytest.fixture
def hostile(tmp_path, sd_model, sd_shards):
    """A run whose folder's name would do harm in a shell."""
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards, steps=2)
    return config, tmp_path / "run; touch pwned $(touch pwned) `touch pwned` & | ' \""


def run_node(config: Path, output: Path, *before: str, **variables) -> subprocess.CompletedProcess:
    # Online: what is on the disk must not make it ask the hub.
    online = {name: value for name, value in environment().items() if name != "HF_HUB_OFFLINE"}
    command = [
        *before,
        sys.executable,
        ROOT / "launchers" / "node.py",
        "--ranks",
        "1",
        "--config",
        config,
        f"output='{yaml_quoted(output)}'",
    ]
    return subprocess.run(
        command,
        cwd=output.parent,
        env=online | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def yaml_quoted(path: Path) -> str:
    return str(path).replace("'", "''")


@pytest.mark.slow
def test_nothing_leaves_and_nothing_is_told(hostile, tmp_path):
    config, output = hostile
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    log = tmp_path / "audit.log"
    process = run_node(config, output, AUDIT_LOG=str(log), PYTHONPATH=f"{tmp_path / 'watch'}:{ROOT}", **SECRETS)
    assert process.returncode == 0, process.stderr[-3000:]
    assert (output / "DONE").exists()
    events = log.read_text().splitlines()
    outside = [event for event in events if event.startswith("socket.") and not any(local in event for local in LOCAL)]
    assert outside == []
    assert not [event for event in events if event.startswith(("os.system", "os.exec")) and "pwned" in event]
    assert not list(tmp_path.rglob("pwned"))
    told = process.stdout + process.stderr
    written = [path for path in output.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "heartbeat"} <= {path.name for path in written}
    for secret in SECRETS.values():
        assert secret not in told
        assert not [path for path in written if secret.encode() in path.read_bytes()]


def test_the_watch_sees_a_connection(tmp_path):
    """The test above would notice."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    code = "import socket; s = socket.socket(); s.settimeout(0.01)\ntry: s.connect(('192.0.2.1', 9))\nexcept OSError: pass"
    variables = {"AUDIT_LOG": str(tmp_path / "log"), "PYTHONPATH": str(tmp_path)}
    watched = code.replace(
        "s.connect", "__import__('sys').audit('socket.connect', s, ('192.0.2.1', 9)); (lambda _: 0)"
    )  # says it, and sends nothing
    subprocess.run([sys.executable, "-c", watched], env=environment() | variables, check=True)
    assert "socket.connect ('192.0.2.1', 9)" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_no_connection_below_python_either(hostile, tmp_path):
    """The kernel's view: also of gloo, which is not Python."""
    if not shutil.which("strace"):
        pytest.skip("not installed: strace")
    config, output = hostile
    trace = tmp_path / "trace"
    process = run_node(
        config,
        output,
        "strace",
        "--follow-forks",
        "--string-limit=200",
        "--trace=connect,sendto,sendmsg,sendmmsg",
        f"--output={trace}",
    )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = trace.read_text(errors="replace").splitlines()
    resolver = re.compile(r"^(\d+) +connect\((\d+), .*htons\(53\)")
    asking, outside, connects = set(), [], 0
    for line in lines:
        if asked := resolver.match(line):
            asking.add(asked.groups())
            continue
        sender = re.match(r"^(\d+) +(connect|send\w+)\((\d+), ", line)
        if sender and sender[2] != "connect" and (sender[1], sender[3]) in asking:
            # PyTorch asks the machine's resolver for the name of the loopback address, and for nothing else.
            if not re.search(r"127\\7in-addr|ip6", line):
                outside.append(line)
        elif sender and sender[2] == "connect":
            asking.discard((sender[1], sender[3]))
            connects += 1
        outside += [
            address
            for address in re.findall(r'sin6?_addr[^"]*"([^"]+)"', line)
            if not address.removeprefix("::ffff:").startswith(LOCAL)
        ]
    assert connects
    assert outside == []
