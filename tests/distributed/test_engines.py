"""The place of the weights, the tensors kept of a forward pass and the memory format do not change the numbers of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dde_ds import load_config
from tests.support.launching import Run, launch_many, rows, shipped, write_config
from tests.support.reference_loop import plain_losses

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory, sd_model, sd_shards) -> Path:
    return write_config(tmp_path_factory.mktemp("engines") / "run.yaml", sd_model, sd_shards)


def launched(config: Path, folder: Path, plan: dict[str, list[str]]) -> dict[str, list[dict]]:
    runs = {name: Run(config, [f"output={folder / 'runs' / name}", *overrides]) for name, overrides in plan.items()}
    for outcome in launch_many(list(runs.values())):
        assert (outcome.code, outcome.errors) == (0, [None, None])
    return {name: rows(folder / "runs" / name) for name in runs}


def losses(found: list[dict]) -> list[float]:
    return [row["loss"] for row in found]


def test_two_ranks(config, tmp_path):
    zero2, zero3 = shipped(tmp_path, "zero2"), shipped(tmp_path, "zero3")
    placed = {
        f"{stage} {where}": [file, f"reference.placement={where}"]
        for stage, file in (("zero2", zero2), ("zero3", zero3))
        for where in ("replicated", "sharded", "cpu")
    }
    others = {
        "hierarchical": [shipped(tmp_path, "zero3_hierarchical")],
        "selective": [zero3, "model.gradient_checkpointing=selective"],
        "channels_last": [zero2, "model.channels_last=true"],
        "not contiguous": [shipped(tmp_path, "zero2", contiguous_gradients=False)],
        "auto": [zero2, "model.gradient_checkpointing=auto"],
        "compiled": [zero2, "model.compile=true"],
    }
    bf16 = {
        "bf16 zero2": [zero2, "precision=bf16", "steps=2"],
        "bf16 zero3": [zero3, "precision=bf16", "steps=2", "model.gradient_checkpointing=selective"],
        "bf16 policy": [zero2, "precision=bf16", "steps=1", "reference.dtype=fp32"],
        "bf16 reference": [zero2, "steps=1", "reference.dtype=bf16", "reference.placement=sharded"],
    }
    found = launched(config, tmp_path, placed | others | bf16)
    expected = plain_losses(load_config(config))
    for name in placed | others:
        assert losses(found[name]) == pytest.approx(expected, abs=1e-5), name
    assert len({tuple(losses(found[name])) for name in placed}) <= 2, "the reference's place is no arithmetic"

    log_2 = torch.tensor(2.0).log().item()
    first, second = found["bf16 zero2"], found["bf16 zero3"]
    assert losses(first)[0] == losses(second)[0] == log_2
    # DeepSpeed's own linear layers at stage 3 round twice: 2.5 % off.
    assert first[0]["grad_norm"] == pytest.approx(second[0]["grad_norm"], rel=5e-3)
    for name in ("bf16 policy", "bf16 reference"):
        assert 0 < abs(losses(found[name])[0] - log_2) < 0.01, "the types differ, and little follows"


@pytest.mark.grid
def test_hierarchical_on_two_groups(config, tmp_path):
    """Four ranks, for two nodes of two. In every run of the tests tests/engine/test_checkpoint.py does the same with a few layers."""
    own = [shipped(tmp_path, "zero3_hierarchical", zero_hpz_partition_size=2), f"output={tmp_path / 'run'}"]
    plan = [Run(config, [*own, "steps=2"]), Run(config, [*own, "steps=3"], resume="required")]
    outcomes = launch_many(plan, ranks=4)
    assert [(outcome.code, outcome.errors) for outcome in outcomes] == [(0, [None] * 4)] * 2
    assert losses(rows(tmp_path / "run")) == pytest.approx(plain_losses(load_config(config, ["steps=3"])), abs=1e-5)


def test_moments_of_8_bits(config, tmp_path):
    """A resumed run is the unbroken one but for quantising its moments once more. Plain AdamW goes on from them, and it from AdamW's."""
    pytest.importorskip("bitsandbytes", reason="the extra lowbit is not installed")
    eight = [shipped(tmp_path, "zero2"), "optimizer.type=adamw_8bit"]
    outputs = {name: f"output={tmp_path / name}" for name in ("whole", "broken")}
    plan = [
        Run(config, [*eight, outputs["whole"]]),
        Run(config, [*eight, outputs["broken"], "steps=2"]),
        Run(config, [*eight, outputs["broken"]], resume="required"),
        Run(config, [shipped(tmp_path, "zero3"), outputs["broken"], "steps=5"], resume="required"),
        Run(config, [*eight, outputs["broken"], "steps=6"], resume="required"),
    ]
    assert [(outcome.code, outcome.errors) for outcome in launch_many(plan)] == [(0, [None, None])] * 5
    whole, broken = (losses(rows(tmp_path / name)) for name in ("whole", "broken"))
    assert broken[:3] == whole[:3]
    assert broken[3] == pytest.approx(whole[3], abs=5e-6)  # 3e-4 lie between steps
    expected = plain_losses(load_config(config, ["steps=6"]))
    assert broken == pytest.approx(expected, abs=1e-4)
    assert broken[:4] != pytest.approx(expected[:4], abs=1e-6), "32 bits would be nearer"


@pytest.mark.compiles
def test_two_ranks_with_offload(config, tmp_path):
    plan = {name: [shipped(tmp_path, name)] for name in ("zero2_offload", "zero3_offload")}
    found = launched(config, tmp_path, plan)
    expected = plain_losses(load_config(config))
    for name in plan:
        assert losses(found[name]) == pytest.approx(expected, abs=1e-5), name
    again = [Run(config, [f"output={tmp_path / 'runs' / name}", "steps=5", *plan[name]], resume="required") for name in plan]
    assert [outcome.code for outcome in launch_many(again)] == [0, 0]
    for name in plan:
        assert losses(rows(tmp_path / "runs" / name)) == pytest.approx(plain_losses(load_config(config, ["steps=5"])), abs=1e-5)
