from __future__ import annotations

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from dde_ds import NoiseSchedule, UserError, build_objective, load_config
from dde_ds.data.order import Order
from dde_ds.data.shards import ShardSet
from dde_ds.evaluation.generate import PromptSet
from dde_ds.objective.specs import OBJECTIVES
from dde_ds.training.heldout import HeldOut, error_drift
from dde_ds.training.prepare import open_shards
from tests.conftest import DEMO, shard
from tests.support.launching import write_config


@pytest.fixture(scope="module")
def held_out_shards(tmp_path_factory, sd_model):
    folder = tmp_path_factory.mktemp("held_out")
    pq.write_table(pq.read_table(DEMO / "pairs" / "held_out.parquet").slice(20, 11), folder / "pairs.parquet")
    return shard(folder / "pairs.parquet", sd_model, folder / "shards")


@pytest.fixture(scope="module")
def unets(sd_model):
    base = UNet2DConditionModel.from_pretrained(sd_model, subfolder="unet")
    policy = UNet2DConditionModel.from_pretrained(sd_model, subfolder="unet")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=generator)
    return policy, base


def test_against_the_formulas_pair_by_pair(held_out_shards, unets, sd_model):
    scheduler = DDIMScheduler.from_pretrained(sd_model, subfolder="scheduler")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    objective = build_objective("dde", schedule, beta=20.0)
    objective.table.add(torch.arange(1000), torch.full((1000,), 1e-3), torch.zeros(4, 1000))
    objective.commit()
    shards = ShardSet(held_out_shards)
    held_out = HeldOut(shards, schedule, pairs=10, micro=4)
    found = held_out.summary(objective, measure_on(held_out, unets))

    numbers = {name: [] for name in found}
    steps = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # λ written out
    alphas = np.cumprod(1 - steps)
    stepwise = steps[1:] / (2 * (1 - steps[1:]) * (1 - alphas[:-1]))
    tenths = [stepwise[max(0, 100 * k - 1) : 100 * k + 99].sum() for k in range(10)]
    order = Order(shards.counts, 0, 1)
    for position in range(10):
        pair = held_out._dataset.pair(position)
        assert torch.equal(pair["latents"], shards.read(*order.locate(position))["latents"])
        t = torch.tensor(100 * (position % 10) + 50)
        noisy = scheduler.add_noise(pair["latents"].float(), pair["noise"].expand(2, -1, -1, -1), t)
        text = pair["prompt_embeds"].float().expand(2, -1, -1)
        with torch.no_grad():
            predictions = [unet(noisy, t, text).sample.double() for unet in unets]
        errors = [(prediction - pair["noise"]).square().mean((1, 2, 3)) for prediction in predictions]
        drift = errors[0] - errors[1]
        m = (drift[0] - drift[1]).item()
        alpha = scheduler.alphas_cumprod[t].item()
        z = -(20.0 / 2) * ((1 - alpha) / alpha * m + objective.correction(t).item())
        numbers["loss"].append(math.log1p(math.exp(-z)))
        numbers["loss_uniform"].append(math.log1p(math.exp(2000 / 2 * m)))
        numbers["accuracies"].append(float(m < 0))
        numbers["drift_chosen"].append(drift[0].item())
        numbers["drift_rejected"].append(drift[1].item())
        # One pair a tenth: Σ over tenths of Σλ · ‖ε_θ - ε_base‖², the mean of both images, summed over elements.
        distance = (predictions[0] - predictions[1]).square().sum((1, 2, 3)).mean().item()
        numbers["path_kl"].append(10 * tenths[position] * distance)
    for name, values in numbers.items():
        assert found[name].item() == pytest.approx(sum(values) / 10, rel=1e-3, abs=1e-6), name


def measure_on(held_out, unets):
    policy, base = unets
    return held_out.measure(policy, held_out.predictions(base))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objectives_own_loss(held_out_shards, unets, schedule, name):
    """Compare with the objective itself, called on the predictions as in training."""
    held_out = HeldOut(ShardSet(held_out_shards), schedule, pairs=10, micro=10)
    objective = build_objective(name, schedule, beta=20.0)
    if objective.needs_reference:
        objective.table.fill(1e-3)
    errors = measure_on(held_out, unets)
    batch = held_out._dataset.collate([held_out._dataset.pair(position) for position in range(10)])
    t = torch.arange(10) * 100 + 50
    noisy = schedule.add_noise(batch["latents"].float(), batch["noise"].repeat(2, 1, 1, 1), t.repeat(2))
    with torch.no_grad():
        policy, base = (unet(noisy, t.repeat(2), batch["prompt_embeds"].float()).sample for unet in unets)
    out = objective(policy, base if objective.needs_reference else None, batch["noise"], t)
    assert held_out.summary(objective, errors)["loss"].item() == pytest.approx(out.loss.item(), rel=1e-4)


def test_more_pairs_than_tenths_count_as_their_mean(held_out_shards, unets, schedule):
    """Eleven pairs: two at t = 50, whose mean stands for the first tenth."""
    held_out = HeldOut(ShardSet(held_out_shards), schedule)
    errors = measure_on(held_out, unets)
    moved = errors.moved.mean(0)
    at = [(moved[0] + moved[10]) / 2, *moved[1:10]]
    tenths = schedule.stepwise_weight.view(10, 100).sum(1)
    expected = held_out.elements * sum(weight * value for weight, value in zip(tenths, at, strict=True))
    assert held_out.path_kl(errors).item() == pytest.approx(expected.item(), rel=1e-9)
    assert held_out.timesteps.tolist() == [*range(50, 1000, 100), 50]


def test_ranks_share_the_pairs(held_out_shards, unets, schedule):
    """Ten pairs on three ranks: four each, two of them evaluated twice and counted once."""
    objective = build_objective("uniform", schedule, beta=20.0)
    alone = HeldOut(ShardSet(held_out_shards), schedule, pairs=10)
    expected = alone.summary(objective, measure_on(alone, unets))
    ranks = [HeldOut(ShardSet(held_out_shards), schedule, 10, micro=3, rank=rank, world=3) for rank in range(3)]
    assert [len(rank.timesteps) for rank in ranks] == [4, 4, 4]
    shares = [rank.summary(objective, measure_on(rank, unets)) for rank in ranks]
    for name, value in expected.items():
        assert sum(share[name].item() for share in shares) == pytest.approx(value.item(), rel=1e-4, abs=1e-6)


def test_all_pairs_by_default(held_out_shards, unets, schedule):
    drift = error_drift(*unets, schedule, ShardSet(held_out_shards))
    held_out = HeldOut(ShardSet(held_out_shards), schedule)
    assert held_out.pairs == 11
    assert drift["policy_rejected"] == pytest.approx(held_out.errors(unets[0])[1].mean().item())
    assert drift["reference_chosen"] == pytest.approx(held_out.errors(unets[1])[0].mean().item())
    assert (
        drift["path_kl"] == pytest.approx(held_out.path_kl(measure_on(held_out, unets)).item(), rel=1e-6) and drift["path_kl"] > 0
    )


def test_an_evaluation_ends_where_it_is_told_to(held_out_shards, unets, schedule):
    held_out, polled, seen = HeldOut(ShardSet(held_out_shards), schedule, micro=2), [], []

    def poll():
        polled.append(len(seen))
        if len(polled) == 3:
            raise InterruptedError

    with unets[0].register_forward_hook(lambda *_: seen.append(1)), pytest.raises(InterruptedError):
        held_out.errors(unets[0], poll)
    assert polled == [0, 1, 2]


def test_a_drawing_ends_where_it_is_told_to(sd_model, unets):
    prompts, polled, seen = PromptSet(str(sd_model), None, ["dagger"], torch.device("cpu"), torch.float32), [], []

    def poll():
        polled.append(len(seen))
        if len(polled) == 2:
            raise InterruptedError

    with unets[0].register_forward_hook(lambda *_: seen.append(1)), pytest.raises(InterruptedError):
        prompts.draw(unets[0], 0, 5, 2.0, poll=poll)
    assert polled == [1, 2]


def test_pairs_that_are_level_count_one_half(held_out_shards, unets):
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler())
    held_out = HeldOut(ShardSet(held_out_shards), schedule)
    found = held_out.summary(build_objective("dde", schedule), measure_on(held_out, (unets[0], unets[0])))
    assert found["accuracies"].item() == pytest.approx(0.5)
    assert found["path_kl"].item() == 0


def test_training_pairs_are_no_held_out_pairs(tmp_path, sd_model, sd_shards, sdxl_shards):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    with pytest.raises(UserError, match=r"evaluation.path .* holds the pairs of data.path"):
        open_shards(load_config(config, [f"evaluation.path={sd_shards}"]))
    with pytest.raises(UserError, match=r"evaluation.path .* made for 'sdxl' models"):
        open_shards(load_config(config, [f"evaluation.path={sdxl_shards}"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.path=/nowhere", r"^evaluation\.path /nowhere: no such folder"),
        ("evaluation.path=ftp://host/shards", r"^evaluation\.path ftp://host/shards: expected a folder or a URL of"),
        ("data.path=/nowhere", r"^data\.path /nowhere: no such folder"),
        ("data={sources: [{path: /nowhere}]}", r"^data\.sources /nowhere: no such folder"),
        ("data={sources: [{path: SHARDS}, {path: /nowhere}]}", r"^data\.sources\[1\]\.path /nowhere: no such folder"),
    ],
)
def test_missing_shards_are_called_by_their_own_key(tmp_path, sd_model, sd_shards, override, message):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    with pytest.raises(UserError, match=message):
        open_shards(load_config(config, [override.replace("SHARDS", str(sd_shards))]))
