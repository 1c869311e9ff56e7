"""Shares of votes from an input to the loss."""

from __future__ import annotations

import copy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import UNet2DConditionModel

from dde_ds import UserError, build_objective, load_config
from dde_ds.data.manifest import SOFT_LABEL
from dde_ds.data.order import Order
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset
from dde_ds.data.shards import ShardSet
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
    columns = ("caption=caption", "image_0=jpg_0", "image_1=jpg_1", "preference_0=label_0")
    return shard(voted, sd_model, tmp_path_factory.mktemp("voted") / "shards", columns=columns)


def batch_of(shards, schedule, count=5):
    dataset = PairDataset(shards, Order(shards.counts, 0, block=1), PairRng(0, torch.ones(1000)))
    return dataset, Batch(**dataset.collate([dataset.pair(position) for position in range(count)]))


def test_shares_reach_the_loss(voted_shards, sd_model, schedule):
    shards = ShardSet(voted_shards)
    dataset, batch = batch_of(shards, schedule)
    assert batch.soft_label is not None and batch.soft_label.shape == (5,)
    stored = [float(shards.read(*dataset.order.locate(position))["soft_label"]) for position in range(5)]
    assert batch.soft_label.tolist() == stored
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

    held_out = HeldOut(shards, schedule)
    with torch.no_grad():
        base = UNet2DConditionModel.from_pretrained(sd_model, subfolder="unet")
        errors = held_out.measure(policy, held_out.predictions(base))
    objective = build_objective("uniform", schedule, beta=20.0, soft_labels=True)
    m = (errors.policy - errors.base)[0] - (errors.policy - errors.base)[1]
    p = errors.soft_labels.double()
    expected = -(p * torch.log(torch.sigmoid(-10 * m)) + (1 - p) * torch.log(torch.sigmoid(10 * m)))
    assert held_out.summary(objective, errors)["loss"].item() == pytest.approx(expected.mean().item(), rel=1e-6)


def test_shards_without_shares_are_what_they_were(sd_shards, voted_shards):
    assert SOFT_LABEL not in ShardSet(sd_shards).manifest["settings"]
    assert ShardSet(voted_shards).manifest["settings"][SOFT_LABEL] is True
    assert SOFT_LABEL not in ShardSet(sd_shards).read(0, 0)


def test_a_run_that_needs_shares_is_refused_without_them(tmp_path, sd_model, sd_shards, voted_shards):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    soft = "objective.soft_labels=true"
    with pytest.raises(UserError, match=r"^objective\.soft_labels is true, but data\.path .* holds no shares of votes"):
        open_shards(load_config(config, [soft]))
    with pytest.raises(UserError, match=r"but evaluation\.path .* holds no shares of votes"):
        open_shards(load_config(config, [soft, f"data.path={voted_shards}", f"evaluation.path={sd_shards}"]))
    open_shards(load_config(config, [soft, f"data.path={voted_shards}"]))
