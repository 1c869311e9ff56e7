"""Shares of votes from an input to the loss."""

from __future__ import annotations

import copy
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import UNet2DConditionModel

from dde_ds import UserError, build_objective, load_config
from dde_ds.data.inputs import find_pairs
from dde_ds.data.order import Order
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset
from dde_ds.data.shards import ShardSet
from dde_ds.data.storage import DamagedData
from dde_ds.training.batches import Batch
from dde_ds.training.heldout import HeldOut
from dde_ds.training.prepare import open_shards
from dde_ds.training.reference import frozen_model
from dde_ds.training.step import micro_step
from tests.conftest import DEMO, shard
from tests.support.launching import write_config

LABELS = [1.0, 0.75, 0.5, 0.25, 0.0, None, 0.9]
SHARES = [1.0, 0.75, 0.75, 1.0, 0.9]


@pytest.fixture(scope="module")
def voted(tmp_path_factory):
    """Seven rows of the demo's, five of them decided by their votes and two by one voice."""
    folder = tmp_path_factory.mktemp("voted")
    rows = pq.read_table(DEMO / "pairs" / "held_out.parquet").slice(0, len(LABELS))
    rows = rows.set_column(rows.schema.get_field_index("label_0"), "label_0", pa.array(LABELS, pa.float64()))
    pq.write_table(rows, folder / "pairs.parquet")
    return folder / "pairs.parquet"


@pytest.fixture(scope="module")
def voted_shards(voted, sd_model, tmp_path_factory):
    return shard(voted, sd_model, tmp_path_factory.mktemp("voted") / "shards", soft_labels=True)


def test_the_majority_comes_first(voted):
    source, table = find_pairs([str(voted)]), pq.read_table(voted).to_pylist()
    assert source.survey().rows.tolist() == [0, 4], "without votes a fraction is a tie, as ever"
    rows = source.survey(votes=True).rows
    assert rows.tolist() == [0, 1, 3, 4, 6]
    pairs = list(source.read(rows))
    assert [pair.share for pair in pairs] == SHARES
    images = [(row["jpg_0"], row["jpg_1"]) for row in table]
    images = [tuple(cell["bytes"] if isinstance(cell, dict) else cell for cell in both) for both in images]
    assert [(pair.winner, pair.loser) for pair in pairs] == [
        images[0],
        images[1],
        images[3][::-1],
        images[4][::-1],
        images[6],
    ]


def test_a_folder_of_pairs_names_its_winner_first(tmp_path):
    lines = [{"winner": "a.png", "loser": "b.png", "caption": "x", "label": label} for label in (1, 0.8, 0.5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = find_pairs([str(tmp_path / "pairs.jsonl")])
    assert source.survey().rows.tolist() == [0]
    assert [pair.share for pair in source.read(source.survey(votes=True).rows)] == [1.0, 0.8]
    lines[1]["label"] = 0.2
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"label 0\.2 prefers the loser; swap the two paths and write 0\.8"):
        find_pairs([str(tmp_path / "pairs.jsonl")]).survey(votes=True)


def batch_of(shards, schedule, count=5):
    dataset = PairDataset(shards, Order(shards.counts, 0, block=1), PairRng(0, torch.ones(1000)))
    return dataset, Batch(**dataset.collate([dataset.pair(position) for position in range(count)]))


def test_shares_reach_the_loss(voted_shards, sd_model, schedule):
    shards = ShardSet(voted_shards)
    dataset, batch = batch_of(shards, schedule)
    assert batch.soft_labels is not None and batch.soft_labels.shape == (5,)
    stored = [float(shards.read(*dataset.order.locate(position))["soft_label"]) for position in range(5)]
    assert batch.soft_labels.tolist() == stored
    assert sorted(stored) == pytest.approx(sorted(SHARES))

    policy = UNet2DConditionModel.from_pretrained(sd_model, subfolder="unet")
    reference = frozen_model(copy.deepcopy(policy).requires_grad_(False))
    with torch.no_grad():
        policy.conv_out.weight.mul_(1.05)
    device = torch.device("cpu")
    soft = micro_step(policy, reference, build_objective("dde", schedule, beta=20.0, soft_labels=True), batch, device)
    z, p = soft.logits.double(), torch.tensor(stored, dtype=torch.float64)
    expected = -(p * torch.log(torch.sigmoid(z)) + (1 - p) * torch.log(torch.sigmoid(-z)))
    assert soft.loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    sure = micro_step(policy, reference, build_objective("dde", schedule, beta=20.0), batch, device)
    assert sure.loss.item() != pytest.approx(soft.loss.item(), rel=1e-4)

    looked = HeldOut(shards, schedule)
    with torch.no_grad():
        base = UNet2DConditionModel.from_pretrained(sd_model, subfolder="unet")
        look = looked.look(policy, looked.predictions(base))
    objective = build_objective("uniform", schedule, beta=20.0, soft_labels=True)
    m = (look.policy - look.base)[0] - (look.policy - look.base)[1]
    p = look.soft_labels.double()
    expected = -(p * torch.log(torch.sigmoid(-10 * m)) + (1 - p) * torch.log(torch.sigmoid(10 * m)))
    assert looked.summary(objective, look)["loss"].item() == pytest.approx(expected.mean().item(), rel=1e-6)


def test_shards_without_shares_are_what_they_were(sd_shards, voted_shards):
    assert "soft_labels" not in ShardSet(sd_shards).manifest["settings"]
    assert ShardSet(voted_shards).manifest["settings"]["soft_labels"] is True
    assert "soft_label" not in ShardSet(sd_shards).read(0, 0)


def test_a_run_that_needs_shares_is_refused_without_them(tmp_path, sd_model, sd_shards, voted_shards):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    soft = "objective.soft_labels=true"
    with pytest.raises(UserError, match=r"^objective\.soft_labels is true, but data\.path .* holds no shares of votes"):
        open_shards(load_config(config, [soft]))
    with pytest.raises(UserError, match=r"but evaluation\.path .* holds no shares of votes"):
        open_shards(load_config(config, [soft, f"data.path={voted_shards}", f"evaluation.path={sd_shards}"]))
    open_shards(load_config(config, [soft, f"data.path={voted_shards}"]))
    with pytest.raises(UserError, match="soft_labels"):
        open_shards(load_config(config, [f"data={{sources: [{{path: {sd_shards}}}, {{path: {voted_shards}}}]}}"]))


@pytest.mark.parametrize("wrong", [1.5, -0.25, float("nan")])
def test_a_share_that_is_none_is_damage(voted_shards, schedule, monkeypatch, wrong):
    shards = ShardSet(voted_shards)
    read = shards.read
    monkeypatch.setattr(shards, "read", lambda *place: {**read(*place), "soft_label": torch.tensor(wrong)})
    with pytest.raises(DamagedData, match=r"soft label is .* must lie in \[0, 1\]"):
        batch_of(shards, schedule, 1)
