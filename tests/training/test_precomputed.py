from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dde_ds import UserError, load_config
from dde_ds.config import RunConfig
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.errors import RankError
from dde_ds.training.batches import Batch
from dde_ds.training.precomputed import FORMAT, PrecomputedReference, check_precomputed, open_precomputed
from dde_ds.training.prepare import build_run_objective, open_shards
from tests.conftest import shard
from tests.support.launching import write_config
from tests.support.pipelines import save_sd

ALONE = DistributedEnv(0, 1, 0)


@pytest.fixture
def run(tmp_path, sd_model, sd_shards) -> RunConfig:
    config = write_config(
        tmp_path / "run.yaml", sd_model, sd_shards, reference={"precomputed": str(tmp_path / "precomputed" / "one")}
    )
    return load_config(config)


def changed(run: RunConfig, *overrides: str) -> RunConfig:
    path = Path(run.output).with_name("changed.yaml")
    path.write_text(run.to_yaml())
    return load_config(path, overrides)


def opened(run: RunConfig) -> PrecomputedReference:
    return open_precomputed(run, open_shards(run)[0], build_run_objective(run), ALONE)


def batch_at(*positions: int) -> tuple[Batch, torch.Tensor]:
    """A micro-batch of these positions, and errors that tell winner and loser of each: position + 0.25 and + 0.5."""
    at = torch.tensor(positions)
    nothing = torch.empty(0)
    batch = Batch(latents=nothing, noise=nothing, timesteps=nothing, positions=at, prompt_embeds=nothing)
    return batch, torch.cat([at + 0.25, at + 0.5]).float()


def test_what_is_added_is_there_for_the_next_run(run):
    precomputed = opened(run)
    assert not precomputed.covers(0, 1)
    precomputed.add(*batch_at(*range(4)))
    precomputed.add(*batch_at(*range(4, 10)))
    precomputed.write(ALONE)
    precomputed = opened(run)
    assert precomputed.covers(0, 1)
    assert not precomputed.covers(0, 2), "two of the second step's eight pairs are there"
    filled = [next(precomputed.fill(iter([batch_at(*positions)[0]]))) for positions in ((2, 3), (8, 9))]
    assert filled[0].reference_errors.tolist() == [2.25, 3.25, 2.5, 3.5]
    assert filled[1].reference_errors is None, "the whole step or nothing"
    precomputed.add(filled[0], torch.full((4,), 7.0))  # they came from the precomputed reference
    precomputed.write(ALONE)
    assert next(opened(run).fill(iter([batch_at(2)[0]]))).reference_errors.tolist() == [2.25, 2.5]
    # Another batch size asks for other positions in a step, and nothing else.
    assert opened(changed(run, "batch.pairs=10")).covers(0, 1)


def test_two_runs_that_write_at_a_time_keep_each_others_errors(run):
    first, second = opened(run), opened(run)
    first.add(*batch_at(*range(8)))
    second.add(*batch_at(*range(8, 16)))
    first.write(ALONE)
    second.write(ALONE)
    assert opened(run).covers(0, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=3", "was made with seed 0, this run has 3"),
        ("precision=bf16", "was made with precision 'fp32', this run has 'bf16'"),
        ("objective.timestep_range=[200,700]", "was made with objective.timestep_range [0, 600], this run has [200, 700]"),
        ("objective.shared_noise=false", "was made with objective.shared_noise True, this run has False"),
        ("data.caption_dropout=0", "was made with data.caption_dropout 0.25, this run has 0.0"),
        ("data.block_shards=1", "was made with data.block_shards 2, this run has 1"),
    ],
)
def test_another_runs_precomputed_reference_is_refused(run, override, message):
    opened(run)
    with pytest.raises(UserError, match=re.escape(f"{run.reference.precomputed}: {message}")):
        opened(changed(run, override))


def test_a_file_of_the_draws_of_earlier_versions_is_refused_in_one_line(run):
    precomputed = opened(run)
    precomputed.add(*batch_at(*range(8)))
    precomputed.write(ALONE)
    with safetensors.safe_open(precomputed.path, framework="pt") as file:
        errors, metadata = file.get_tensor("errors"), file.metadata()
    own = json.loads(metadata["identity"])
    del own["timesteps"]
    safetensors.torch.save_file({"errors": errors}, precomputed.path, metadata | {"identity": json.dumps(own)})
    said = "was made with timesteps 'drawn independently, as by earlier versions', this run has 'stratified'"
    with pytest.raises(UserError, match=said) as error:
        opened(run)
    assert "\n" not in str(error.value)


def test_timesteps_in_another_proportion_are_refused(run):
    opened(run)
    with pytest.raises(UserError, match="probabilities of the timesteps"):
        opened(changed(run, "objective.name=discounted", "objective.discount_mode=sample"))


def test_another_model_or_other_pairs_are_refused(run, tmp_path, parquet):
    opened(run)
    model = save_sd(tmp_path / "model", prediction_type="v_prediction")
    with pytest.raises(UserError, match="was made with prediction type 'epsilon', this run has 'v_prediction'"):
        opened(changed(run, f"model.path={model}"))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["conv_in.bias"] += 1
    safetensors.torch.save_file(tensors, weights)
    with pytest.raises(UserError, match="was made with reference weights '"):
        opened(changed(run, f"model.path={model}"))
    with pytest.raises(UserError, match="was made with data '"):
        opened(changed(run, f"data.path={shard(parquet, run.model.path, tmp_path / 'other', pairs_per_shard=5)}"))


def test_what_only_weighs_the_errors_may_differ(run):
    opened(run)
    for override in (
        "objective.beta=9",
        "objective.name=uniform",
        "optimizer.learning_rate=1",
        "objective.variance=beta",
        "steps=9",
    ):
        opened(changed(run, override))
    assert opened(changed(run, "objective.name=sft")).path is None


def test_damage_is_found(run, tmp_path):
    precomputed = opened(run)
    precomputed.add(*batch_at(*range(8)))
    precomputed.write(ALONE)
    whole = precomputed.path.read_bytes()
    foreign = safetensors.torch.save({"errors": torch.ones(8, 2)})
    strange = safetensors.torch.save({"errors": torch.ones(8, 2)}, {"format": FORMAT, "identity": "[1]", "sha256": ""})
    for damaged in (whole[:-3], b"", whole[:-1] + bytes([whole[-1] ^ 1]), foreign, strange):
        precomputed.path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"reference.precomputed {re.escape(str(precomputed.path))}: "):
            opened(run)
    precomputed.path.write_bytes(whole)
    assert opened(run).covers(0, 1)


def test_a_place_that_cannot_be_written_is_found_at_once(run, tmp_path):
    (tmp_path / "precomputed").write_text("a file")
    with pytest.raises((UserError, RankError), match=r"reference\.precomputed .*one: not writable"):
        opened(run)


def test_a_precomputed_reference_knows_whether_predictions_were_rounded(run):
    """In float32 no prediction is rounded."""
    opened(run)
    opened(changed(run, "model.float32_output=false"))
    Path(run.reference.precomputed).unlink()
    opened(changed(run, "precision=bf16"))
    with pytest.raises(UserError, match=r"was made with model\.float32_output True, this run has False"):
        opened(changed(run, "precision=bf16", "model.float32_output=false"))


def test_replaced_pairs_and_a_precomputed_reference_exclude_each_other(run):
    with pytest.raises(UserError, match="must be 0 with"):
        changed(run, "data.max_bad_samples=3")


def test_a_precomputed_reference_of_a_copy_of_the_model_is_the_same(run, tmp_path, sd_model):
    """The weights identify a model, not its path or the version that saved it."""
    opened(run)
    copied = shutil.copytree(sd_model, tmp_path / "copied")
    assert opened(changed(run, f"model.path={copied}")) is not None


def test_a_pipe_or_deep_json_is_no_precomputed(run):
    opened(run)
    path = Path(run.reference.precomputed)
    metadata = {"format": FORMAT, "identity": "[" * 100_000, "sha256": ""}
    path.write_bytes(safetensors.torch.save({"errors": torch.empty(0, 2)}, metadata))
    with pytest.raises(UserError, match="damaged, or no precomputed reference: nested deeper than 64 levels; delete it"):
        opened(run)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="damaged, or no precomputed reference: not a regular file; delete it"):
        opened(run)


def test_an_objective_that_needs_more_than_errors_is_refused_at_the_start(run, tmp_path):
    other = changed(run, "objective.name=dspo", "objective.beta=0.001")
    for refuse in (opened, lambda run: check_precomputed(run, open_shards(run)[0], build_run_objective(run))):
        with pytest.raises(UserError, match=r"^reference\.precomputed .*: holds errors alone, but objective dspo compares"):
            refuse(other)
