from __future__ import annotations

import json
import os
import pydoc
import re
import sys

import pytest
import torch

from dde_ds import UserError, initialize
from dde_ds.config import BatchConfig, DataConfig, ModelConfig, OptimizerConfig, ReferenceConfig, RunConfig
from dde_ds.distributed.group import start
from dde_ds.engine.adamw8bit import check_partition
from dde_ds.engine.reference import SHARDED, reference_config
from dde_ds.engine.zero import complete_config
from dde_ds.models.checkpointing import blocks, set_checkpointing
from dde_ds.models.family import Conditioning
from dde_ds.models.known import read_architecture
from dde_ds.models.lora import add_adapters
from dde_ds.models.unet import load_unet, predict
from dde_ds.planning.cost import made_up_conditioning
from tests.conftest import ROOT


def run_with(deepspeed, **options) -> RunConfig:
    model = options.pop("model", ModelConfig("m"))
    return RunConfig(
        "out", 1, model, DataConfig("d"), BatchConfig(16, 2), OptimizerConfig(1e-5), deepspeed=str(deepspeed), **options
    )


FILES = [path for path in sorted(ROOT.glob("ds_configs/*.json")) if path.stem != "zero0"]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_shipped_files_are_completed(file):
    config = complete_config(run_with(file), world=2)
    assert config["zero_optimization"]["stage"] == int(file.stem[4])
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (
        16,
        2,
        4,
    )
    assert config["gradient_clipping"] == 1.0
    assert config["optimizer"]["params"]["lr"] == 1e-5
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    fp32 = complete_config(run_with(file, precision="fp32"), world=2)
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


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([{"stage": 2}], r'is a list: must be an object, such as \{"zero_optimization": \{"stage": 2\}\}'),
        ({"zero_optimization": True}, r'zero_optimization is True: must be an object, such as \{"stage": 2\}; or leave it out'),
        (
            {"zero_optimization": {"offload_optimizer": True}},
            r"zero_optimization\.offload_optimizer is True: .*\"device\": \"cpu\"",
        ),
        ({"zero_optimization": {"offload_param": None}}, r"zero_optimization\.offload_param is None: must be an object"),
        ({"optimizer": "AdamW"}, r"optimizer is 'AdamW': must be an object, such as \{\"type\": \"AdamW\"\}"),
        ({"optimizer": {"params": [1e-5]}}, r"optimizer\.params is \[1e-05\]: must be an object"),
        ({"bf16": True}, r'bf16 is True: must be an object, such as \{"enabled": true\}'),
        ({"fp16": "auto"}, r"fp16 is 'auto': must be an object"),
        ({"data_types": "fp32"}, r"data_types is 'fp32': must be an object"),
        ({"torch_autocast": True}, r"torch_autocast is True: must be an object"),
    ],
)
def test_a_section_that_is_no_object(tmp_path, found, message):
    """Of a file, which the message names, as of a dict."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match=rf"^deepspeed {re.escape(str(file))}: {message}"):
        complete_config(run_with(file), world=1)
    if isinstance(found, dict):
        with pytest.raises(UserError, match=rf"^deepspeed configuration: {message}"):
            initialize(torch.nn.Linear(1, 1), None, found)


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


def test_where_the_reference_lies():
    stage3 = {"stage": 3, "stage3_max_reuse_distance": 10**9, "zero_hpz_partition_size": 8, "offload_optimizer": {"device": "cpu"}}
    for policy, placement, stage, offloaded in (
        ({"stage": 2}, "auto", 0, False),
        ({"stage": 2}, "sharded", 3, False),
        ({"stage": 2}, "cpu", 3, True),
        (stage3, "auto", 3, False),
        (stage3, "replicated", 0, False),
        (stage3, "cpu", 3, True),
        (stage3 | {"offload_param": {"device": "cpu"}}, "auto", 3, True),
        (stage3 | {"offload_param": {"device": "cpu"}}, "sharded", 3, False),
    ):
        found = reference_config({"train_batch_size": 8, "zero_optimization": policy}, placement)["zero_optimization"]
        assert (found["stage"], "offload_param" in found) == (stage, offloaded)
        if stage == 3:  # cut as the policy is, but nothing is kept: each weight is used once
            assert found.get("zero_hpz_partition_size") == policy.get("zero_hpz_partition_size")
            assert found["stage3_max_reuse_distance"] == 0
    both = {"train_batch_size": 8, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    assert [reference_config(both, "auto", kind)["bf16"]["enabled"] for kind in ("policy", "bf16", "fp32")] == [True, True, False]
    for key, value in (("placement", "gpu"), ("dtype", "fp16")):
        with pytest.raises(UserError, match=rf"reference\.{key} is '{value}': must be"):
            reference_config(both, **{key: value})


def test_what_a_file_may_leave_out(tmp_path):
    file = tmp_path / "bare.json"
    file.write_text('{"zero_optimization": {"stage": 1}}')
    assert complete_config(run_with(file), world=1)["train_batch_size"] == 16
    assert complete_config(run_with(file), world=1)["data_types"] == {"grad_accum_dtype": "fp32"}  # not DeepSpeed's bf16
    file.write_text('{"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}')
    assert complete_config(run_with(file), world=1)["data_types"] == {"grad_accum_dtype": "bf16"}
    file.write_text("{}")
    assert complete_config(run_with(file, precision="fp32"), world=1)["zero_optimization"]["stage"] == 0
    # Of the two ways to state a batch the reference takes the one that is there.
    assert reference_config({"train_batch_size": 8})["train_batch_size"] == 8
    both = reference_config({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4})
    assert (both["train_micro_batch_size_per_gpu"], "train_batch_size" in both) == (2, False)


@pytest.mark.parametrize(
    ("zero", "options", "message"),
    [
        ({"stage": 4}, {}, r"zero_optimization\.stage is 4: must be 0, 1, 2 or 3"),
        ({"stage": 0}, {}, r"zero_optimization\.stage is 0, .*but precision is bf16; take ds_configs/zero1\.json"),
        ({"stage": 3}, {"model": ModelConfig("m", compile=True)}, r"zero_optimization\.stage is 3, .*but model\.compile is true"),
        (
            {"stage": 2},
            {"model": ModelConfig("m", compile=True), "reference": ReferenceConfig(placement="sharded")},
            r"reference\.placement is sharded, .*but model\.compile is true; set reference\.placement to replicated",
        ),
        ({"stage": 3, "zero_hpz_partition_size": 3}, {}, r"zero_hpz_partition_size is 3: must divide the 8 ranks"),
        ({"stage": 2, "round_robin_gradients": True}, {}, r"round_robin_gradients is true, .*checkpoints would be wrong"),
        ({"stage": 1, "compute_grad_norm": False}, {}, r"compute_grad_norm is false"),
    ],
)
def test_what_cannot_be(tmp_path, zero, options, message):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(UserError, match=message):
        complete_config(run_with(file, **options), world=8)


def test_sizes(tmp_path):
    file = tmp_path / "mine.json"

    def written(**zero) -> dict:
        file.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}}))
        return complete_config(run_with(file), world=2)["zero_optimization"]

    assert written(reduce_bucket_size=5e8)["reduce_bucket_size"] == 500_000_000
    found = written(reduce_bucket_size="auto", sub_group_size="auto", zero_hpz_partition_size="auto")
    assert ("reduce_bucket_size" in found, "sub_group_size" in found, found["zero_hpz_partition_size"]) == (False, False, 2)
    for key, value in (
        ("reduce_bucket_size", "1e8"),
        ("sub_group_size", -1),
        ("zero_hpz_partition_size", 1.5),
        ("sub_group_size", True),
    ):
        with pytest.raises(
            UserError, match=rf"{re.escape(str(file))}: zero_optimization\.{key} is {value!r}: must be a whole number"
        ):
            written(**{key: value})
    for zero, message in (
        ({"sub_group_size": float("inf")}, "sub_group_size is inf: must be a whole number"),
        ({"reduce_bucket_size": 0}, "reduce_bucket_size is 0: must be 1 or more"),
        ({"allgather_bucket_size": 10**8 + 1}, "allgather_bucket_size is 100000001: must be even"),
    ):
        with pytest.raises(UserError, match=message):
            written(**zero)
    assert written(stage3_max_live_parameters=10**400)["stage3_max_live_parameters"] == 10**400
    with pytest.raises(UserError, match="zero_hpz_partition_size is 0: must divide the 2 ranks"):
        written(zero_hpz_partition_size=0)


def test_one_rank_reduces_nothing():
    zero1, zero2, zero3, offload = (f"ds_configs/{name}.json" for name in ("zero1", "zero2", "zero3", "zero2_offload"))

    def found(file: str, precision: str = "bf16", world: int = 1) -> dict:
        return complete_config(run_with(ROOT / file, precision=precision), world=world)["zero_optimization"]

    for file in (zero1, zero2):
        assert not found(file)["overlap_comm"] and not found(file)["reduce_scatter"]
        assert found(file)["contiguous_gradients"] and not found(file, "fp32")["contiguous_gradients"]
    for file, world in ((zero2, 2), (zero3, 1), (offload, 1)):
        own = json.loads((ROOT / file).read_text())["zero_optimization"]
        assert {key: found(file, world=world)[key] for key in own} == own


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_and_trains_the_same(monkeypatch, name, precision):
    """To the last bit, as with the keys of the file itself."""
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    start()
    file = ROOT / f"ds_configs/{name}.json"
    completed = complete_config(run_with(file, precision=precision), world=1)
    shipped = completed | {"zero_optimization": completed["zero_optimization"] | json.loads(file.read_text())["zero_optimization"]}
    weights = []
    for config in (completed, shipped):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
        policy, _ = initialize(model, None, config | {"gradient_accumulation_steps": 3, "train_batch_size": 6})
        for _ in range(6):
            policy.backward(policy(torch.randn(2, 5, dtype=next(model.parameters()).dtype)).square().mean())
            policy.step()
        assert policy.global_steps == 2
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    torch.manual_seed(0)
    assert not torch.equal(weights[0][0].float(), torch.nn.Linear(5, 7).weight)


@pytest.mark.parametrize(("model", "blockwise", "layerwise"), [("sd15", 78, 280), ("sdxl", 117, 792)])
def test_blocks_are_gathered_at_once(model, blockwise, layerwise):
    """The blocks of checkpointing are ZeRO-3's leaf modules, in all files and of the reference; so often as ds_configs/README.md says."""
    from diffusers import UNet2DConditionModel

    files = [ROOT / f"ds_configs/{name}.json" for name in ("zero3", "zero3_hierarchical", "zero3_offload")]
    (classes,) = {tuple(json.loads(file.read_text())["zero_optimization"]["leaf_module"]["classes"]) for file in files}
    assert list(classes) == SHARDED["leaf_module"]["classes"]
    leaves = tuple(pydoc.locate(name) for name in classes)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_architecture(model))
    assert [module for module in unet.modules() if isinstance(module, leaves)] == blocks(unet)

    def gathered(module: torch.nn.Module, leaves: tuple) -> list[int]:
        """Elements each time; smaller parameters are on every rank whole."""
        leaf = isinstance(module, leaves)
        sizes = [parameter.numel() for parameter in module.parameters(recurse=leaf)]
        inner = [] if leaf else [size for child in module.children() for size in gathered(child, leaves)]
        return [sum(sizes)] * any(size > SHARDED["stage3_param_persistence_threshold"] for size in sizes) + inner

    assert (len(gathered(unet, leaves)), len(gathered(unet, ()))) == (blockwise, layerwise)
    assert max(gathered(unet, leaves)) < SHARDED["stage3_prefetch_bucket_size"]


@pytest.mark.parametrize("look_first", [True, False])
def test_adapters_of_the_first_block(monkeypatch, sd_model, look_first):
    """Cut up over the ranks as they are with a high rank: trained with blocks that nothing before them needs gradients for."""
    pytest.importorskip("peft")
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    start()
    norms = []
    for name in ("zero2", "zero3"):
        config = complete_config(run_with(ROOT / f"ds_configs/{name}.json", precision="fp32"), world=1)
        if name == "zero3":
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        unet = load_unet(str(sd_model))
        add_adapters(unet, 4, 4.0, ["conv1", "to_q"], seed=0)
        policy, _ = initialize(unet, None, config | {"gradient_accumulation_steps": 1, "train_batch_size": 2})
        batch = made_up_conditioning(unet.config, 2, 7)
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            inputs = (torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 700]), batch)
            if look_first:
                with torch.no_grad():
                    predict(policy, *inputs)
            policy.backward((predict(policy, *inputs) - 1).square().mean())
            policy.step()
            norms.append(float(policy.get_global_grad_norm()))
    assert norms[3:] == pytest.approx(norms[:3], rel=1e-4)
    assert min(norms) > 0


def test_buckets_end_with_the_gradients(monkeypatch):
    """As the engine makes them, where the configuration says 100 M elements."""
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    start()
    config = json.loads((ROOT / "ds_configs/zero2.json").read_text()) | {
        **{"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    }
    frozen = torch.nn.Linear(3, 1000).requires_grad_(False)
    policy, _ = initialize(torch.nn.Sequential(frozen, torch.nn.Linear(1000, 2)), None, config)
    assert policy.optimizer.reduce_bucket_size == 2002
    policy.optimizer.setup_buckets()
    buffers = [buffer for bucket in policy.optimizer.ipg_buckets.values() for buffer in bucket.buffer]
    assert [buffer.numel() for buffer in buffers] == [2002, 2002]


def test_managed_accumulation(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"managed_gradient_accumulation": False, "zero_optimization": {"stage": 1}}))
    with pytest.raises(UserError, match=r"managed_gradient_accumulation is false, but batch\.pairs"):
        complete_config(run_with(file), world=1)


def test_a_node_is_filled_in():
    run = run_with(ROOT / "ds_configs/zero3_hierarchical.json")
    assert complete_config(run, world=8, local_world_size=4)["zero_optimization"]["zero_hpz_partition_size"] == 4
    assert complete_config(run, world=8)["zero_optimization"]["zero_hpz_partition_size"] == 8


def test_selective_checkpointing_takes_pytorchs_linear_layers(sd_model):
    """DeepSpeed's for stage 3 add their bias in place, to what was kept."""
    unet = load_unet(str(sd_model))
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 3, "memory_efficient_linear": True}}
    set_checkpointing(unet, "selective")
    with pytest.raises(UserError, match=r"memory_efficient_linear is true, but model\.gradient_checkpointing is selective"):
        initialize(unet, None, config)


def test_selective_checkpointing_refuses_deepspeeds_linear_layers(sd_model, monkeypatch):
    """Where another model of the process has put them there."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    unet = load_unet(str(sd_model))
    set_checkpointing(unet, "selective")
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    with pytest.raises(RuntimeError, match="would give wrong gradients"):
        predict(unet, torch.randn(1, 4, 8, 8), torch.tensor([3]), Conditioning(torch.randn(1, 7, 16)))


@pytest.mark.parametrize("zero", [{"stage": 3}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}])
def test_8_bit_moments_need_stage_1_or_2(zero):
    config = {"train_batch_size": 1, "optimizer": {"type": "AdamW8bit", "params": {}}, "zero_optimization": zero}
    with pytest.raises(UserError, match=r"optimizer\.type is adamw_8bit, which works with zero_optimization\.stage 1 or 2"):
        initialize(torch.nn.Linear(1, 1), None, config)


def test_8_bit_moments_are_counted_in_32_bits():
    check_partition(2_567_463_684, ranks=2)
    with pytest.raises(
        UserError, match="at most 2,147,483,647 elements a rank, but 2,567,463,684 are trained on 1: take more ranks"
    ):
        check_partition(2_567_463_684, ranks=1)


def test_8_bit_moments_without_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    config = {"train_batch_size": 1, "optimizer": {"type": "AdamW8bit", "params": {}}, "zero_optimization": {"stage": 2}}
    with pytest.raises(UserError, match=r"bitsandbytes is not installed; pip install -e '.\[lowbit\]'"):
        initialize(torch.nn.Linear(1, 1), None, config)


def test_offload_without_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(UserError, match=r"offload_optimizer: g\+\+ and ninja not found"):
        initialize(torch.nn.Linear(1, 1), None, config)


def test_policy_and_reference_must_be_two():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="same module"):
        initialize(model, model, {})
