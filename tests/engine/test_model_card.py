from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from dde_ds.config import BatchConfig, DataConfig, EmaConfig, ModelConfig, OptimizerConfig, RunConfig, SourceConfig
from dde_ds.engine.export import model_card
from dde_ds.engine.state import EMA, WEIGHT


def run_on(data: DataConfig) -> RunConfig:
    return RunConfig("out", 4, ModelConfig("some/base", revision="abc"), data, BatchConfig(16, 2), OptimizerConfig(1e-5))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (DataConfig("one"), "one"),
        (DataConfig(sources=(SourceConfig("one", weight=3), SourceConfig("s3://two/shards"))), "one, s3://two/shards"),
    ],
)
def test_the_card_says_where_a_model_comes_from(data, named):
    card = model_card(run_on(data), 3, {"loss": 0.51234, "grad_norm": 2.0, "eval/accuracy": 0.75}, WEIGHT)
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "some/base"
    rows = dict(re.findall(r"^\| (.+) \| (.+) \|$", body, re.MULTILINE))
    assert rows["preference pairs"] == named
    assert rows["base model"] == "some/base at abc"
    assert rows["optimizer steps"] == "3 of 16 pairs"
    assert (rows["loss"], rows["eval/accuracy"]) == ("0.5123", "0.75")
    assert "grad_norm" not in rows
    assert "None" not in card
    assert "weights" not in rows


def test_the_card_of_a_moving_average():
    run = replace(run_on(DataConfig("one")), ema=EmaConfig(0.999))
    assert "| weights | moving average of decay 0.999 |" in model_card(run, 3, {}, EMA)
    assert "moving average" not in model_card(run, 3, {}, WEIGHT)  # exported with --raw
