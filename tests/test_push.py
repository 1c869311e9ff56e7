"""``dde-ds push`` against a hub on loopback: what arrives, what the card says of it, and what is said where it fails."""

from __future__ import annotations

import json
import logging.handlers
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session

from dde_ds.cli import main
from dde_ds.engine.export import KOHYA_FILE, LORA_FILE
from tests.conftest import ROOT
from tests.engine.test_export import lora_checkpoint, run_of, save_checkpoint
from tests.support.hub import TOKEN, serve
from tests.support.scorers import save_clip
from tests.test_lora import load

LICENSE = ["--license", "creativeml-openrail-m"]
PROMPTS = ["red fire", "penguin", "<b>dagger</b> | *fox*", "snow", "moon"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, sd_model) -> Path:
    """A run folder with an export of changed weights, and drawings."""
    folder = tmp_path_factory.mktemp("run")
    weights = dict(load(sd_model).named_parameters())
    generator = torch.Generator().manual_seed(0)
    changed = {name: value.detach() + 0.02 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    source = save_checkpoint(folder / "checkpoints" / "step-00000004", run_of(sd_model), changed)
    assert main(["export", str(source), "--output", str(folder / "export")]) == 0
    from dde_ds.evaluation.generate import save_row

    for step in (0, 2, 4):
        save_row(torch.full((2, 3, 16, 16), step, dtype=torch.uint8), folder / "samples" / f"step-{step:08d}.png")
    return folder


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, sd_model, run_folder) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    sources = ["--base", f"base={sd_model}", "--model", f"new={run_folder / 'export'}", "--prompts", str(folder / "prompts.txt")]
    drawing = ["--images-per-prompt", "2", "--steps", "2", "--scorers", f"clip={save_clip(folder / 'clip')}"]
    assert main(["evaluate", *sources, *drawing, "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture
def hub(monkeypatch):
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield hub
    close_session()


def push(*arguments: str | Path) -> int:
    return main(["push", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *arguments: str | Path) -> str:
    """The one line of a push that fails."""
    capsys.readouterr()
    assert push(*arguments) == 1
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err
    assert told.err.count("\n") == 1 and told.err.startswith("error: "), told.err
    return told.err


def test_the_bytes_and_the_results_arrive(hub, run_folder, comparison, tmp_path, capsys):
    export, before = run_folder / "export", contents(run_folder / "export")
    options = ["--base-model", "some/base", "--datasets", "yuvalkirstain/pickapic_v2", "--tags", "emoji", "--pictures", "3"]
    assert push(export, "me/model", *LICENSE, *options, "--comparison", comparison, "--message", "First one") == 0
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err
    assert f"{hub.endpoint}/me/model/commit/abc" in told.out
    assert contents(export) == before, "the export was changed"

    held = hub.repos["me/model"]["main"]
    arrived = {name: data for name, data in held.items() if not name.startswith((".gitattributes", "README.md", "samples/"))}
    assert arrived == {name: data for name, data in before.items() if name != "README.md"}
    assert hub.large, "no weights were uploaded by themselves"
    assert hub.messages == ["First one"]
    assert not hub.private["me/model"]

    (tmp_path / "README.md").write_bytes(held["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    head = card.data.to_dict()
    assert head["license"] == "creativeml-openrail-m"
    assert head["base_model"] == "some/base" and head["base_model_relation"] == "finetune"
    assert head["datasets"] == ["yuvalkirstain/pickapic_v2"]
    assert (head["library_name"], head["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert head["tags"] == ["preference-alignment", "emoji"]

    data = json.loads((comparison / "comparison.json").read_text())
    (row,) = data["results"]
    rate, score = card.data["eval_results"]
    assert card.data["model_name"] == "model"
    assert (rate.task_type, rate.metric_type, rate.metric_value) == ("text-to-image", "win_rate", row["beats"]["rate"])
    assert {key: rate.metric_args[key] for key in ("low", "high")} == {key: row["beats"][key] for key in ("low", "high")}
    assert rate.metric_args["scorer_sha256"] == data["scorers"]["clip"]
    assert (rate.metric_args["prompts"], rate.metric_args["comparisons"]) == (5, 10)
    assert (score.metric_value, score.metric_args["base_mean"]) == (row["model_mean"], row["base_mean"])
    assert score.metric_args["difference"] == row["difference"]

    text = card.text
    assert text.startswith(before["README.md"].decode().split("---\n", 2)[2].rstrip("\n"))
    assert f"{row['beats']['rate']:.1%}" in text and "fewer than 500" in text
    pictures = sorted(name for name in held if name.startswith("samples/"))
    assert len(pictures) == 6
    for name in pictures:
        assert f"]({name})" in text
        number, side = name.removeprefix("samples/").rsplit("-", 1)
        drawn = comparison / "images" / {"base.png": "base", "model.png": "new"}[side] / "images" / f"{number}.png"
        assert held[name] == drawn.read_bytes()


def test_results_count_whichever_way_they_fall(run_folder, comparison):
    """A model that loses everywhere is said to lose, and the results of another model are left out."""
    from dde_ds.push import eval_results

    data = json.loads((comparison / "comparison.json").read_text())
    lost = data["results"][0] | {"beats": {"rate": 0.0, "low": 0.0, "high": 0.1}}
    data["results"] = [lost, data["results"][0] | {"model": "third"}]
    data["sets"] = [{"scorer": "inception", "model": "new", "mean": 1.5, "deviation": 0.1, "splits": 2, "count": 10}]
    found = list(eval_results(data, "new"))
    assert [(one.metric_type, one.metric_value) for one in found] == [
        ("win_rate", 0.0),
        ("mean_score", lost["model_mean"]),
        ("set_score", 1.5),
    ]
    assert (found[2].metric_args or {})["count"] == 10


def test_a_run_folder_shows_its_first_and_last_drawing(hub, run_folder, capsys):
    assert push(run_folder, "me/run", *LICENSE, "--private", "--branch", "v/1") == 0
    assert hub.private["me/run"]
    held = hub.repos["me/run"]["v/1"]
    assert "README.md" not in hub.repos["me/run"]["main"]
    assert sorted(name for name in held if name.startswith("samples/")) == [
        "samples/step-00000000.png",
        "samples/step-00000004.png",
    ]
    assert held["samples/step-00000004.png"] == (run_folder / "samples" / "step-00000004.png").read_bytes()
    assert "checkpoints" not in " ".join(held)
    head = ModelCard(held["README.md"].decode()).data.to_dict()
    assert "base_model" not in head and "model-index" not in head, "a folder on this machine is no model of the hub"


def test_adapters_alone(hub, sd_model, tmp_path):
    source, _ = lora_checkpoint(tmp_path, sd_model)
    assert main(["export", str(source), "--output", str(tmp_path / "lora"), "--format", "lora"]) == 0
    other = ["--license", "other", "--license-name", "mine", "--license-link", "https://example.org/mine"]
    assert push(tmp_path / "lora", "me/lora", *other, "--base-model", "some/base") == 0
    held = hub.repos["me/lora"]["main"]
    for name in (LORA_FILE, KOHYA_FILE):
        assert held[name] == (tmp_path / "lora" / name).read_bytes()
    head = ModelCard(held["README.md"].decode()).data.to_dict()
    assert (head["base_model_relation"], head["license_name"]) == ("adapter", "mine")
    assert head["tags"] == ["preference-alignment", "lora"]


def test_a_dry_run_asks_nobody(hub, run_folder, comparison, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert push(run_folder, "me/model", *LICENSE, "--comparison", comparison, "--pictures", "5", "--dry-run") == 0
    told = capsys.readouterr().out
    assert hub.requests == []
    assert "model-index:" in told and "unet/diffusion_pytorch_model.safetensors" in told and "nothing was uploaded" in told
    assert r"&lt;b&gt;dagger&lt;/b&gt; \| \*fox\*" in told


def test_broken_off_and_pushed_again(hub, run_folder, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    # All weights but the first lose their connection, as often as the library tries.
    hub.fault = lambda method, path: "drop" if method == "PUT" and hub.large else None
    handler = logging.handlers.BufferingHandler(1000)  # the library writes to the terminal by itself, addresses of uploads included
    logging.getLogger("huggingface_hub").addHandler(handler)
    told = refused(capsys, run_folder, "me/model", *LICENSE)
    logging.getLogger("huggingface_hub").removeHandler(handler)
    assert hub.count("PUT") > len(contents(run_folder / "export")), "the library tried no upload twice"
    assert handler.buffer == []
    assert "push me/model: broke off: " in told and "push again" in told
    assert "model_index.json" not in hub.repos["me/model"]["main"], "half of an export was committed"
    arrived = set(hub.large)
    assert len(arrived) >= 1

    hub.fault = lambda method, path: None
    hub.requests.clear()
    assert push(run_folder, "me/model", *LICENSE) == 0
    assert hub.count("PUT") == len(hub.large) - len(arrived) > 0, "what had arrived was sent again"
    held = hub.repos["me/model"]["main"]
    assert {name: held[name] for name in contents(run_folder / "export") if name != "README.md"} == {
        name: data for name, data in contents(run_folder / "export").items() if name != "README.md"
    }

    hub.requests.clear()
    assert push(run_folder, "me/model", *LICENSE) == 0  # once more: all is there
    assert hub.count("PUT") == hub.count("POST", "/commit/") == 0


def test_what_the_hub_refuses_is_one_line(hub, run_folder, monkeypatch, capsys):
    def failing(pattern: str, status: int):
        hub.fault = lambda method, path: status if pattern in path else None
        return refused(capsys, run_folder, "me/model", *LICENSE)

    host = "push me/model: refused by 127.0.0.1: "
    assert host + "403 refused Bearer *** for a reason; the token needs write access" in failing("/api/repos/create", 403)
    assert host + "413" in failing("/large/", 413)
    assert host + "409 refused" in (told := failing("/commit/", 409)) and "push again" in told
    hub.fault = lambda method, path: None
    told = refused(capsys, run_folder, "me/model", "--license", "my-own")
    assert host + '400 "license" must be one of' in told
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert host + "401 Invalid username or password.; the token was not accepted" in refused(
        capsys, run_folder, "me/model", *LICENSE
    )
    monkeypatch.setenv("HF_TOKEN", "hf_ä\x1b")
    assert "holds characters that no token has" in refused(capsys, run_folder, "me/model", *LICENSE)


def test_no_token_and_no_server(hub, run_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN")
    assert "no token of the Hugging Face hub: log in" in refused(capsys, run_folder, "me/model", *LICENSE)
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "push me/model: broke off: " in (told := refused(capsys, run_folder, "me/model", *LICENSE))
    assert "refused" in told.lower()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert "offline mode is enabled" in refused(capsys, run_folder, "me/model", *LICENSE)


def test_private_is_not_pushed_into_the_open(hub, run_folder, capsys):
    hub.repos["me/model"], hub.private["me/model"] = {"main": {}}, False
    assert "is there and is public, nothing was uploaded" in refused(capsys, run_folder, "me/model", *LICENSE, "--private")
    assert hub.repos["me/model"] == {"main": {}} and hub.count("PUT") == 0


def test_what_cannot_be_pushed(hub, run_folder, comparison, sd_model, tmp_path, capsys):
    export = run_folder / "export"
    for arguments, words in [
        ([export, "model", *LICENSE], "repository model: expected OWNER/NAME"),
        ([export, "me/mo..del", *LICENSE], "repository me/mo..del: Cannot have -- or .."),
        ([export, "me/model"], "--license: say under which licence"),
        ([export, "me/model", *LICENSE, "--license-name", "mine"], "has a name and a link already"),
        ([export, "me/model", *LICENSE, "--base-model", "/a/folder"], "--base-model /a/folder: "),
        ([export, "me/model", *LICENSE, "--datasets", "a/b/c"], "--datasets a/b/c: "),
        ([export, "me/model", *LICENSE, "--message", " "], "--message: is empty"),
        ([export, "me/model", *LICENSE, "--model", "new"], "give the comparison too"),
        ([export, "me/model", *LICENSE, "--comparison", comparison, "--model", "now"], "did you mean 'new'?"),
        ([export, "me/model", *LICENSE, "--comparison", tmp_path], "comparison.json: no such file"),
        ([tmp_path, "me/model", *LICENSE], "no export there: no model_index.json"),
        ([export / "model_index.json", "me/model", *LICENSE], "is one file"),
        ([sd_model, "me/model", *LICENSE], "no README.md there"),
    ]:
        assert words in refused(capsys, *arguments)
    # Numbers of other weights.
    other = shutil.copytree(sd_model, tmp_path / "other")
    shutil.copy(export / "README.md", other)
    assert "was drawn by other weights" in refused(capsys, other, "me/model", *LICENSE, "--comparison", comparison)
    # What leads out of the folder.
    (other / "notes.txt").symlink_to("/etc/hostname")
    assert "neither a regular file nor a folder" in refused(capsys, other, "me/model", *LICENSE)
    # A picture that is gone.
    moved = shutil.copytree(comparison, tmp_path / "moved")
    shutil.rmtree(moved / "images" / "new" / "images")
    told = refused(capsys, export, "me/model", *LICENSE, "--comparison", moved)
    assert "no such file or directory; the card would show this picture" in told
    assert hub.requests == []


@pytest.mark.slow
def test_the_command_of_the_environment(run_folder):
    """Run the command like a user, with only the library's own environment variables."""
    with serve() as hub:
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "dde_ds.cli", "push", run_folder, "me/model", *LICENSE]
        environment = os.environ | variables | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert TOKEN not in done.stdout + done.stderr
        assert "unet/diffusion_pytorch_model.safetensors" in hub.repos["me/model"]["main"]
