from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from dde_ds import build_objective
from dde_ds.cli import main
from dde_ds.engine.checkpoint import MANIFEST, TABLE
from tests.launching import write_config

safetensors = pytest.importorskip("safetensors.torch")


def picture(path):
    """Its colours: a drawing has many, an empty page one."""
    with Image.open(path) as image:
        return image.size, len(image.convert("RGB").getcolors(2**24))


def test_from_the_schedule(tmp_path, capsys):
    assert main(["explain", "--output", str(tmp_path / "sub" / "all.png")]) == 0
    printed = capsys.readouterr().out
    assert "417" in printed
    assert "flat" in printed
    assert picture(tmp_path / "sub" / "all.png")[1] > 50
    assert main(["explain", "--objective", "dde", "sft", "--credit-only", "--output", str(tmp_path / "credit.png")]) == 0
    assert picture(tmp_path / "credit.png")[0] != picture(tmp_path / "sub" / "all.png")[0]


def test_from_the_schedule_of_a_model(tmp_path, sd_model, capsys):
    assert main(["explain", "--model", str(sd_model), "--margin", "1e-4", "--output", str(tmp_path / "a.png")]) == 0
    assert "718" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--objective", "ddee"], "did you mean 'dde'"),
        (["--margin", "0"], "--margin 0.0: must be above 0"),
        (["--run", "/nowhere"], "--run /nowhere: no config.yaml"),
        (["--run", "/nowhere", "--beta", "500"], "--beta: a run has its own objective"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, named):
    assert main(["explain", *arguments, "--output", str(tmp_path / "a.png")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


def test_from_a_run(tmp_path, sd_model, sd_shards, schedule, capsys):
    config = write_config(tmp_path / "config.yaml", sd_model, sd_shards, objective={"name": "dde"})
    arguments = ["explain", "--run", str(tmp_path), "--output", str(tmp_path / "run.png")]
    assert main(arguments) == 1
    assert "no checkpoint there yet" in capsys.readouterr().err

    objective = build_objective("dde", schedule)
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text("{}")
    safetensors.save_file(objective.state_dict(), checkpoint / TABLE)
    assert main(arguments) == 1
    assert "holds no sample yet" in capsys.readouterr().err

    generator = torch.Generator().manual_seed(0)
    rows = []
    for step in (1, 2):
        t = torch.randint(1000, (500,), generator=generator)
        objective.table.add(t, -1e-3 * torch.rand(500, generator=generator), torch.rand(4, 500, generator=generator))
        objective.commit()
        rows.append({"step": step, "timesteps": [0, 500], "correction": objective.correction(torch.tensor([0, 500])).tolist()})
    safetensors.save_file(objective.state_dict(), checkpoint / TABLE)
    (tmp_path / "correction.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments) == 0
    assert picture(tmp_path / "run.png")[1] > 50

    config.write_text(config.read_text().replace("name: dde", "name: sft"))
    assert main(arguments) == 1
    assert "compares with no reference" in capsys.readouterr().err
