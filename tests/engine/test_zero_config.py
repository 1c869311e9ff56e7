from __future__ import annotations

import json

import pytest
import torch

from dde_ds import UserError, initialize
from dde_ds.config import BatchConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from dde_ds.engine.zero import complete_config, reference_config
from tests.conftest import ROOT


def run_with(deepspeed, **options) -> RunConfig:
    return RunConfig(
        "out", 1, ModelConfig("m"), DataConfig("d"), BatchConfig(16, 2), OptimizerConfig(1e-5), deepspeed=str(deepspeed), **options
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_shipped_files_are_completed(stage):
    config = complete_config(run_with(ROOT / f"ds_configs/zero{stage}.json"), world=2)
    assert config["zero_optimization"]["stage"] == stage
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (
        16,
        2,
        4,
    )
    assert config["gradient_clipping"] == 1.0
    assert config["optimizer"]["params"]["lr"] == 1e-5
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    fp32 = complete_config(run_with(ROOT / f"ds_configs/zero{stage}.json", precision="fp32"), world=2)
    assert not fp32["bf16"]["enabled"]


def test_a_contradiction_names_both_keys(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"train_batch_size": "auto", "gradient_clipping": 0.5, "zero_optimization": {"stage": 2}}))
    with pytest.raises(UserError, match=r"gradient_clipping is 0\.5, but optimizer\.max_grad_norm of the run says 1\.0"):
        complete_config(run_with(file), world=1)
    file.write_text(json.dumps({"scheduler": {"type": "WarmupLR"}, "zero_optimization": {"stage": 2}}))
    with pytest.raises(UserError, match=r"scheduler is set, but optimizer\.warmup_steps"):
        complete_config(run_with(file), world=1)
    file.write_text(json.dumps({"bf16": {"check_grad_overflow": False}, "zero_optimization": {"stage": 2}}))
    with pytest.raises(UserError, match=r"bf16\.check_grad_overflow is False, but guards of the run says True"):
        complete_config(run_with(file), world=1)
    file.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        complete_config(run_with(file), world=1)
    with pytest.raises(UserError, match="no such file"):
        complete_config(run_with(tmp_path / "none.json"), world=1)


def test_the_reference_never_has_an_optimizer():
    for stage, expected in ((1, 0), (2, 0), (3, 3)):
        config = {
            "optimizer": {"type": "AdamW"},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
        }
        found = reference_config(config)
        assert found["zero_optimization"]["stage"] == expected
        assert "optimizer" not in found
        assert "offload_optimizer" not in found["zero_optimization"]
        assert found["bf16"] == {"enabled": True}


def test_what_a_file_may_leave_out(tmp_path):
    file = tmp_path / "bare.json"
    file.write_text("{}")
    with pytest.raises(UserError, match=r"zero_optimization\.stage is 0"):
        complete_config(run_with(file), world=1)
    file.write_text('{"zero_optimization": {"stage": 1}}')
    assert complete_config(run_with(file), world=1)["train_batch_size"] == 16
    # Of the two ways to state a batch the reference takes the one that is there.
    assert reference_config({"train_batch_size": 8})["train_batch_size"] == 8
    both = reference_config({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4})
    assert (both["train_micro_batch_size_per_gpu"], "train_batch_size" in both) == (2, False)


def test_policy_and_reference_must_be_two():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="same module"):
        initialize(model, model, {})
