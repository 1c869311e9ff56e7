"""A run speaks to nobody outside, tells no secrets, and executes nothing that it was given as text."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dde_ds.cli import main
from dde_ds.cli.inspect_shards import write_sheet
from tests.conftest import ROOT
from tests.support.launching import PATIENCE, environment, write_config
from tests.support.tiny import sign, write_tiny

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


def test_only_files_that_the_user_names_are_executed():
    """One module executes a file, and two places hand it the name that stands in the command."""
    executing = [path.name for path in OURS if re.search(r"exec_module|SourceLoader|SourceFileLoader|runpy", path.read_text())]
    assert executing == ["user_file.py"]
    using = {str(path.relative_to(ROOT)) for path in OURS if "load_name" in path.read_text()}
    assert using == {"dde_ds/user_file.py", "dde_ds/evaluation/user_scorer.py"}


# Text from files, on a terminal

NASTY = "[/red][link=file:///etc]:warning: \x1b[31m\x07\u202e[b]"
SHOWN = r"[/red][link=file:///etc]:warning: \x1b[31m\x07\u202e[b]"
"""The expected print of ``NASTY``: rich's markup and emoji names letter by letter, terminal codes as escapes."""


@pytest.fixture
def printed(capsys, monkeypatch):
    """Return a function that reads the printed text, from a terminal wide enough to fold no line."""
    monkeypatch.setenv("COLUMNS", "1000")

    def read() -> str:
        captured = capsys.readouterr()
        text = captured.out + captured.err
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
        return text

    return read


def manifest_with(folder: Path, rows: dict | None = None, **settings) -> dict:
    """Sign a manifest whose settings say this, and return it."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["settings"] |= settings
    manifest["rows"] |= rows or {}
    sign(folder, manifest)
    return manifest


def test_tables_show_text_from_files_letter_by_letter(tmp_path, printed, sd_model, sd_shards):
    from dde_ds.cli import plan
    from dde_ds.cli.shard import _print_rows
    from dde_ds.evaluation.comparison import Comparison, print_table

    folder = write_tiny(tmp_path / "shards")
    manifest_with(folder, {NASTY: 3}, model=NASTY, empty_prompt=NASTY, vae_dtype=NASTY)
    assert main(["inspect", str(folder)]) == 0
    assert printed().count(SHOWN) == 4
    _print_rows({NASTY: 2}, {})
    assert SHOWN in printed()
    row = {"scorer": NASTY, "model": NASTY, "mean": 1.0, "deviation": 0.0, "splits": 1, "count": 2}
    settings = {NASTY: {"images_per_prompt": 1, "scheduler": NASTY}, "other": {"images_per_prompt": 1, "scheduler": "x"}}
    print_table(Comparison(NASTY, {NASTY: folder, "other": folder}, ["a"], settings, {}, {}, [], [row]))
    assert printed().count(SHOWN) >= 3
    model = tmp_path / "model[b] :warning: \x1b[31m"
    model.symlink_to(sd_model)
    config = write_config(tmp_path / "run.yaml", model, sd_shards)
    options = {"nodes": 1, "gpus": 1, "gpu_memory": None, "mfu": 0.4, "gpu": plan.GPU, "json": False}
    plan.plan_run(argparse.Namespace(config=config, overrides=["precision=bf16"], **options))
    assert r"model[b] :warning: \x1b[31m on 1 x" in printed()


@pytest.mark.parametrize("settings", [{"input": 5}, {"scaling_factor": "x"}, {"resolution": None, "input": [{}]}, {"model": ["x"]}])
def test_what_a_manifest_does_not_say_is_one_line(tmp_path, printed, settings):
    folder = write_tiny(tmp_path / "shards")
    manifest_with(folder, **settings)
    assert main(["inspect", str(folder), "--sheet", str(tmp_path / "sheet.html")]) == 1
    assert printed().splitlines()[-1].startswith("error: ")
    (folder / "00001.tar").unlink()
    assert main(["verify", str(folder)]) == 1
    assert "00001.tar: is missing" in printed()


def commands(text: str) -> list[str]:
    """The two that the tool prints, indented."""
    return [line.strip() for line in text.splitlines() if line.startswith("  ")]


def test_the_command_that_makes_shards_again_can_be_pasted(tmp_path, printed):
    """Bash reads it, with a manifest of somebody who wished it to do more."""
    evil = "$(touch pwned) `touch pwned`; touch pwned & | ' \" \\"
    folder = write_tiny(tmp_path / evil)
    names = [f"a{evil}.parquet", "--output=/elsewhere"]
    nasty = dict.fromkeys(("model", "resolution", "min_side", "pairs_per_shard", "vae_dtype", "text_dtype"), evil)
    manifest_with(folder, input=[{"name": name, "rows": 1} for name in names], flip=False, **nasty)
    (folder / "00001.tar").write_bytes(b"")
    assert main(["verify", str(folder)]) == 1
    remove, remake = commands(printed())
    told = "dde-ds() { printf '%s\\n' \"$@\"; }\n"
    process = subprocess.run(["bash", "-c", told + remake], cwd=tmp_path, capture_output=True, text=True, check=True)
    options = [f"--{name}={evil}" for name in ("resolution", "min-side", "pairs-per-shard")]
    dtypes = [f"--{name}={evil}" for name in ("vae-dtype", "text-dtype")]
    words = ["shard", "--input", names[0], f"./{names[1]}", f"--model={evil}", f"--output={folder}"]
    assert process.stdout.splitlines() == [*words, *options, "--latents=mean", *dtypes]
    subprocess.run(["bash", "-c", remove], cwd=tmp_path, check=True)
    assert not (folder / "00001.tar").exists() and not (folder / "00001.json").exists()
    assert (folder / "00000.tar").exists()
    assert not list(tmp_path.rglob("pwned"))
    manifest_with(folder, model="\x1b[31m\n")
    assert main(["verify", str(folder)]) == 1
    assert r"--model=\x1b[31m\n" in shlex.split(commands(printed())[1])


def test_the_sheet_takes_captions_as_text(tmp_path):
    import numpy as np

    image = np.zeros((8, 8, 3), dtype=np.uint8)
    write_sheet(tmp_path / "sheet.html", [(image, image, "<script>alert('x')</script>\x1b")])
    assert "<script" not in (tmp_path / "sheet.html").read_text()


def test_no_pickle_is_drawn_from(tmp_path, sd_model, sd_shards, printed):
    """A VAE that is there as .bin alone is refused, also for a look at the shards."""
    import safetensors.torch
    import torch

    model = tmp_path / "model"
    shutil.copytree(sd_model, model)
    (weights,) = (model / "vae").glob("*.safetensors")
    torch.save(safetensors.torch.load_file(weights), model / "vae" / "diffusion_pytorch_model.bin")
    weights.unlink()
    options = ["--model", str(model), "--sheet", str(tmp_path / "sheet.html")]
    assert main(["inspect", str(sd_shards), *options]) == 1
    assert printed().splitlines()[-1].startswith(f"error: --model {model}: ")
    assert not (tmp_path / "sheet.html").exists()


JSON_OF_OTHERS = [
    ROOT / "dde_ds" / "data" / f"{name}.py" for name in ("manifest", "shards", "writer", "make", "verify", "storage", "adapter")
]


@pytest.mark.parametrize("path", [*JSON_OF_OTHERS, ROOT / "dde_ds" / "training" / "precomputed.py"], ids=lambda path: path.stem)
def test_json_of_shards_is_read_within_limits(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in calls if name_of(node.func) in ("json.loads", "json.load")], "use dde_ds.untrusted"


# What a run does


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
