"""What others write into DeepSpeed files: taken where it is harmless, and refused in one line where it is not."""

from __future__ import annotations

import json

import pytest

from dde_ds import UserError
from dde_ds.engine.zero import complete_config
from tests.engine.test_zero_config import run_with

STAGE = {"zero_optimization": {"stage": 2}}


def completed(tmp_path, found: dict) -> dict:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(STAGE | found))
    return complete_config(run_with(file), world=2)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        *(
            (name, r"log\.trackers of the run says who gets its numbers")
            for name in ("wandb", "comet", "tensorboard", "csv_monitor")
        ),
        *((name, "the order of the pairs") for name in ("data_efficiency", "curriculum_learning")),
        *((name, "precision states the type") for name in ("amp", "torch_autocast")),
        *(
            (name, "would change what is trained")
            for name in ("progressive_layer_drop", "compression_training", "quantize_training")
        ),
        *((name, r"batch\.pairs states the batch") for name in ("elasticity", "autotuning")),
        ("flops_profiler", "dde-ds plan counts FLOPs"),
        ("compile", r"model\.compile states it"),
        ("sparse_attention", "a run does not take this key"),
        ("hybrid_engine", "a run does not take this key"),
        ("zero_optimisation", "a run does not take this key; did you mean 'zero_optimization'"),
    ],
)
def test_what_a_run_does_not_take(tmp_path, key, message):
    """Switched off it may stand there, even where DeepSpeed refuses the very name."""
    with pytest.raises(UserError, match=rf"^deepspeed .*mine\.json: {key} is set, but .*{message}.*; remove it from the JSON$"):
        completed(tmp_path, {key: {"enabled": True}})
    assert key not in completed(tmp_path, {key: {"enabled": False}})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"comms_logger": 5}, "DeepSpeed does not take it: TypeError"),
        ({"timers": 5}, "DeepSpeed does not take it: TypeError"),
        ({"aio": []}, "DeepSpeed does not take it: AttributeError"),
        ({"steps_per_print": "x"}, "steps_per_print is 'x': must be a whole number, 1 or more"),
        ({"steps_per_print": 0}, "steps_per_print is 0: must be a whole number, 1 or more"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0: must be a number"),
        ({"gradient_allreduce_op": "sum"}, """gradient_allreduce_op is 'sum': must be "mean\""""),
        ({"prescale_gradients": "x"}, "prescale_gradients is 'x': must be true or false"),
        ({"communication_data_type": "x"}, "Invalid communication_data_type"),
        ({"data_types": {"grad_accum_dtype": "x"}}, """data_types: grad_accum_dtype is 'x': must be "fp32" or "bf16\""""),
        ({"data_types": {"param_dtype": "fp32"}}, r"data_types\.param_dtype is set, but precision"),
        (
            {"optimizer": {"params": {"adam_w_mode": False}}},
            r"optimizer\.params\.adam_w_mode is set, but the run states the optimizer",
        ),
        ({"bf16": {"foo": 1}}, "DeepSpeed does not take it: .*: foo is 1"),
        ({"zero_optimization": {"stage": True}}, "stage is True: must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": [2]}}, r"stage is \[2\]: must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"zero_hpz_partition_size": "x"}}, "zero_hpz_partition_size is 'x': must be a whole number"),
        ({"zero_optimization": {"foo": 1}}, "DeepSpeed does not take it: .*: foo is 1"),
        ({"zero_optimization": {"overlap_comm": "x"}}, "DeepSpeed does not take it: .*: overlap_comm is 'x'"),
        ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload is set, but offload_optimizer"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zenflow is set, but"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "MiCS ZeRO-3 sharding has been removed"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, """device is 'nvme': must be "cpu" or "none\""""),
        ({"zero_optimization": {"leaf_module": 5}}, "leaf_module configuration must be a mapping"),
    ],
)
def test_values_that_would_end_deepspeed_later(tmp_path, found, message):
    merged = found | {"zero_optimization": STAGE["zero_optimization"] | found.get("zero_optimization", {})}
    with pytest.raises(UserError, match=message) as error:
        completed(tmp_path, merged)
    assert "\n" not in str(error.value)


def test_what_is_harmless(tmp_path):
    """Speed, logging on this machine, and the "auto" of files for other trainers."""
    harmless = {
        **{"steps_per_print": "auto", "wall_clock_breakdown": True, "communication_data_type": "fp32", "prescale_gradients": False},
        **{"activation_checkpointing": {"partition_activations": True}, "comms_logger": {"enabled": True}, "dump_state": "auto"},
        **{"train_batch_size": 16.0, "gradient_clipping": "auto", "data_types": {"grad_accum_dtype": "auto"}},
        "zero_optimization": {"stage": 2, "overlap_comm": "auto"},
    }
    config = completed(tmp_path, harmless)
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert type(config["train_batch_size"]) is int
    assert "steps_per_print" not in config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "not valid JSON: the key stage is there twice"),
        ("[" * 100_000, "not valid JSON: nested deeper than 64 levels"),
        ('{"zero_optimization": ' + '{"a":' * 100 + "1" + "}" * 101, "not valid JSON: nested deeper than 64 levels"),
        ('{"a": "\\ud83c"}', "not valid JSON: text holds half a surrogate pair"),
        ("\xff", "not valid JSON: "),
    ],
)
def test_json_that_is_odd(tmp_path, text, message):
    (tmp_path / "mine.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        complete_config(run_with(tmp_path / "mine.json"), world=2)
