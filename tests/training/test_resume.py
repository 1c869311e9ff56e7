from __future__ import annotations

from types import SimpleNamespace

import pytest

from dde_ds.config import load_config
from dde_ds.training.resume import differences, identity
from tests.support.launching import write_config


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path / "run.yaml", tmp_path / "model", tmp_path / "shards")


def test_each_changed_value_has_its_own_words(config):
    shards = SimpleNamespace(digest="0123456789abcdef" * 4)
    own = identity(
        load_config(config, ["objective.beta=300", "seed=7", "lora={rank: 4}", "objective.timestep_range=[0, 500]"]), shards, {}
    )
    found = identity(load_config(config, ["objective.beta=500.5", "lora={rank: 8}"]), SimpleNamespace(digest="f" * 64), {})
    assert differences(own, found) == [
        "seed is 7, was 0",
        "data is 01234567…, was ffffffff…",
        "objective.beta is 300, was 500.5",
        "objective.timestep_range is [0, 500], was [0, 600]",
        "lora.rank is 4, was 8",
    ]
    assert differences(own, own) == []
    part = identity(load_config(config, ["model.trainable=[mid_block.*]"]), shards, {})
    assert differences(part, own)[1:2] == ['model.trainable is ["mid_block.*"], was "all"']
    assert differences(own | {"lora": None}, own) == [
        'lora is null, was {"rank": 4, "alpha": null, "targets": ["to_q", "to_k", "to_v", "to_out.0"]}'
    ]
