"""The planner's numbers: of the two public architectures, of tiny real passes, and what it makes of them."""

from __future__ import annotations

import json
import socket
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from dde_ds import UserError, load_config
from dde_ds.cli import main
from dde_ds.engine.zero import complete_config
from dde_ds.models.checkpointing import set_checkpointing
from dde_ds.models.known import KNOWN, read_architecture, shipped_unet
from dde_ds.models.unet import predict
from dde_ds.planning.cost import (
    Adapters,
    Sizes,
    forward_flops,
    made_up_conditioning,
    pair_flops,
    parameter_sizes,
    run_pass,
    training_pass,
)
from dde_ds.planning.gpus import find_device, peak_flops
from dde_ds.planning.memory import Memory, policy_memory, reference_memory
from dde_ds.planning.plan import MODES, Workload, kept_checkpoints, make_plan, nearest_fit, pick_checkpointing, rank_memory
from dde_ds.planning.traffic import step_traffic
from dde_ds.planning.workload import Utilisation, workload_of
from tests.conftest import ROOT
from tests.support.launching import write_config

TINY = {
    **{"sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 2},
    **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
    **{"norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16},
}
LATENT, TOKENS = (4, 16, 16), 8
H100 = find_device("H100")


@pytest.mark.parametrize(
    ("name", "side", "parameters", "tflop"), [("sd15", 64, 859_520_964, 0.803), ("sdxl", 128, 2_567_463_684, 6.761)]
)
def test_the_public_architectures(name, side, parameters, tflop):
    config, latent = read_architecture(name), (4, side, side)
    assert sum(parameter_sizes(config).trained) == parameters
    assert parameter_sizes(config).frozen == ()
    assert forward_flops(config, latent) / 1e12 == pytest.approx(tflop, abs=5e-4)
    assert pair_flops(config, latent) == 8 * forward_flops(config, latent)
    assert pair_flops(config, latent, reference=False) == 6 * forward_flops(config, latent)


def tiny(mode: str):
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(TINY).train()
    set_checkpointing(unet, mode)
    return unet, torch.randn(2, *LATENT), made_up_conditioning(TINY, 2, TOKENS)


@pytest.mark.parametrize("mode", ["none", "every_2", "full"])
def test_activations_are_what_autograd_keeps(mode):
    """On real tensors, by autograd's own hooks: they see all but what selective checkpointing stores by itself."""
    unet, noisy, batch = tiny(mode)
    own = {
        tensor.untyped_storage()._cdata for tensor in [*unet.parameters(), noisy, *(value for value in batch if value is not None)]
    }
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prediction = predict(unet, noisy, torch.zeros(2, dtype=torch.int64), batch)
    saved = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    assert training_pass(TINY, LATENT, mode, torch.float32, TOKENS).kept == saved + prediction.nbytes


def test_activations_of_selective_checkpointing_are_what_the_allocator_gave():
    """Beside full checkpointing, whose own state of the random numbers is the same."""
    found = {}
    for mode in ("selective", "full"):
        unet, noisy, batch = tiny(mode)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            prediction = predict(unet, noisy, torch.zeros(2, dtype=torch.int64), batch)
        found[mode] = sum(event.self_cpu_memory_usage for event in profile.events())
        del prediction
    planned = {mode: training_pass(TINY, LATENT, mode, torch.float32, TOKENS).kept for mode in found}
    assert planned["selective"] - planned["full"] == found["selective"] - found["full"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_without_data_is_the_real_one(mode):
    """Peak and FLOPs as well; and all three grow with the batch, but for the gradient of one parameter."""
    unet, noisy, batch = tiny(mode)
    one = training_pass(TINY, LATENT, mode, torch.float32, TOKENS)
    assert run_pass(unet, noisy, batch) == one
    three = training_pass(TINY, LATENT, mode, torch.float32, TOKENS, pairs=3)
    assert (three.kept, three.flops) == (3 * one.kept, 3 * one.flops)
    assert 0 <= 3 * one.peak - three.peak <= 2 * 4 * max(parameter_sizes(TINY).trained)


def test_modes_trade_memory_for_time():
    passes = [training_pass(TINY, LATENT, mode, torch.bfloat16, TOKENS) for mode in MODES]
    assert [one.flops for one in passes] == sorted(one.flops for one in passes)
    assert passes[0].flops == passes[1].flops  # selective computes nothing of weight again
    assert passes[0].peak > passes[1].peak > passes[3].peak
    assert passes[0].kept > passes[2].kept > passes[3].kept


SIZES = Sizes((1000, 300, 7))


def ds_config(stage: int, **zero) -> dict:
    return {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10, "stage3_param_persistence_threshold": 7, **zero},
    }


def test_memory_by_hand():
    """1,307 elements on four ranks: 1,312 in flat buffers, 250 + 75 + 2 in parts."""
    assert policy_memory(SIZES, ds_config(2, overlap_comm=True), 4, 8) == Memory(
        weights=2 * 1312, gradients=4 * 328, optimizer=12 * 328, communication=3 * 2 * 10
    )
    assert policy_memory(SIZES, ds_config(2), 4, 8, ema=True).ema == 4 * 328
    alone = policy_memory(SIZES, ds_config(2) | {"bf16": {"enabled": False}}, 1, 8)
    assert alone == Memory(weights=4 * 1308, gradients=4 * 1307, optimizer=12 * 1308, step=4 * 1308)  # with its buckets in the step
    third = policy_memory(SIZES, ds_config(3, stage3_max_live_parameters=400), 4, 8)
    assert third == Memory(
        weights=2 * 327 + 2 * 7, gradients=4 * 327, optimizer=12 * 327, communication=2 * (2 * 10 + 400), step=4 * 327
    )
    hierarchical = policy_memory(SIZES, ds_config(3, stage3_max_live_parameters=400, zero_hpz_partition_size=2), 4, 8)
    assert hierarchical.weights - third.weights == 2 * (500 + 150 + 4)
    offloaded = policy_memory(SIZES, ds_config(2, offload_optimizer={"device": "cpu"}), 4, 8)
    assert (offloaded.optimizer, offloaded.gradients) == (0, 0)
    assert offloaded.host == (12 + 4 + 2) * 328
    assert reference_memory(SIZES.trained, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, 4) == Memory(
        reference=2614
    )


def test_traffic_by_hand():
    """Rings over eight ranks on two nodes; seven eighths of everything."""
    share, trained = 7 / 8, 2 * 1307

    def of(config: dict, **reference):
        return step_traffic(SIZES, config, 2, 4, 16, **reference)

    assert of(ds_config(1)).inside == share * 3 * trained  # all-reduce and all-gather, once a step
    assert of(ds_config(2, use_multi_rank_bucket_allreduce=False)).inside == share * (16 + 1) * trained
    assert of(ds_config(2)).inside == share * (32 + 1) * trained
    gathered = 2 * 1300
    third = of(ds_config(3))
    assert third.inside == pytest.approx(share * (16 * (2 * gathered + trained) + 2 * 7))
    assert third.between == third.inside
    hierarchical = of(ds_config(3, zero_hpz_partition_size=4))
    assert hierarchical.between == pytest.approx(share * (16 * (gathered + trained) + 2 * 7))
    assert hierarchical.inside == pytest.approx(hierarchical.between + 16 * gathered * 3 / 4)
    assert step_traffic(SIZES, ds_config(2), 1, 1, 16) == (0, 0)
    assert step_traffic(SIZES, ds_config(2), 1, 8, 16).between == 0
    sharded = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 7}}
    assert of(ds_config(1), reference=SIZES.trained, frozen_config=sharded).inside == share * (3 * trained + 16 * gathered)


@pytest.fixture
def run(tmp_path, sd_model, sd_shards):
    return load_config(
        write_config(tmp_path / "run.yaml", sd_model, sd_shards, precision="bf16", batch={"pairs": 32, "micro_batch_size": 4})
    )


def test_the_plan_of_a_run(run, sd_shards):
    from dde_ds.training.prepare import open_shards

    task = workload_of(run, open_shards(run)[0])
    plan = make_plan(run, task, 1, 2, H100)
    assert plan["batch"] == {"pairs": 32, "nodes": 1, "ranks": 2, "micro": 4, "accumulation": 4, "steps": 4}
    assert plan["memory"]["activations"] == plan["memory"]["activations_by_mode"]["none"]
    assert plan["data"]["pairs"] == 20
    assert plan["data"]["shards_bytes"] == sum(path.stat().st_size for path in sd_shards.glob("*.tar"))
    assert plan["data"]["epochs"] == 4 * 32 / 20
    assert plan["time"]["step"] == pytest.approx(plan["flops"]["step"] / (2 * 989e12 * 0.4))
    assert plan["time"]["gpu_hours"] == pytest.approx(2 * plan["time"]["run_hours"])
    assert plan["verdict"]["fits"] and plan["verdict"]["change"] == []
    assert plan["verdict"]["room"] == pytest.approx(80 * 2**30 * 0.92 - plan["memory"]["peak"])
    parameters = plan["model"]["parameters"]
    assert plan["checkpoints"] == {
        **{
            "bytes": 12 * parameters,
            "kept": 3,
            "disk": 40 * parameters,
            "save_seconds": 12 * parameters / 1e9,
            "disk_bytes_per_s": 1e9,
        }
    }
    assert make_plan(replace(run, precision="fp32"), task, 1, 2, H100)["time"]["step"] is None


def test_8_bit_moments_of_sdxl_need_two_gpus(run):
    eight = replace(run, optimizer=replace(run.optimizer, type="adamw_8bit"))
    with pytest.raises(UserError, match="2,567,463,684 are trained on 1: take more ranks"):
        make_plan(eight, Workload(read_architecture("sdxl"), (4, 128, 128), 77, 1000), 1, 1, H100)


def test_checkpointing_that_fits(run):
    task = workload_of(run, None)
    peaks = {mode: rank_memory(override(run, mode), task, 2, 2).peak for mode in MODES}
    assert pick_checkpointing(run, task, 2, 2, peaks["none"]) == "none"
    assert pick_checkpointing(run, task, 2, 2, peaks["none"] - 1) in ("selective", "every_2")
    assert pick_checkpointing(run, task, 2, 2, peaks["full"]) == "full"
    assert pick_checkpointing(run, task, 2, 2, peaks["full"] - 1) is None
    compiled = replace(run, model=replace(run.model, compile=True))
    assert pick_checkpointing(compiled, task, 2, 2, peaks["none"] - 1) == "every_2"  # its blocks do not heed selective
    # A precomputed reference that covers the run takes the reference's place in memory.
    lighter = rank_memory(override(run, "none"), task, 2, 2, with_reference=False)
    assert (lighter.reference, lighter.peak < peaks["none"]) == (0, True)
    assert pick_checkpointing(run, task, 2, 2, lighter.peak, with_reference=False) == "none"
    automatic = make_plan(override(run, "auto"), task, 1, 2, H100)
    assert automatic["settings"]["gradient_checkpointing"] == "none"


def override(run, mode: str):
    return replace(run, model=replace(run.model, gradient_checkpointing=mode))


def _applied(run, overrides: list[str]):
    batch = dict(override.split("=") for override in overrides)
    changed = override(run, batch.get("model.gradient_checkpointing", "none"))
    return replace(changed, batch=replace(run.batch, micro_batch_size=int(batch.get("batch.micro_batch_size", 4))))


def test_the_nearest_setting_that_fits(run):
    task = workload_of(run, None)
    whole = rank_memory(run, task, 2, 2)
    half = whole.peak - whole.activations // 2
    assert nearest_fit(run, task, 2, 2, half) == ["batch.micro_batch_size=2"]
    sixteenth = rank_memory(override(replace(run, batch=replace(run.batch, micro_batch_size=2)), "full"), task, 2, 2).peak
    change = nearest_fit(run, task, 2, 2, sixteenth)
    assert change is not None
    assert rank_memory(_applied(run, change), task, 2, 2).peak <= sixteenth
    assert nearest_fit(run, task, 2, 2, 1000) is None
    # Where no activations are left to save, it is state: ZeRO-3, then the host's memory.
    least = rank_memory(override(replace(run, batch=replace(run.batch, micro_batch_size=1)), "full"), task, 2, 2).peak
    found = nearest_fit(run, task, 2, 2, least - 1)
    assert found is not None
    assert found[-1].startswith("deepspeed=")


def test_plan_on_the_command_line(run, tmp_path, capsys, sd_model):
    config = str(tmp_path / "run.yaml")
    assert main(["plan", config, "--gpus", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["batch"]["ranks"] == 2
    assert main(["plan", config, "batch.pairs=2048", "data.path=/not/yet", "--nodes", "64", "--gpus", "8", "--gpu", "a100"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "2048 pairs a step = 64 nodes x 8 ranks x 1 micro-batches of 4" in text
    assert "40% of 312 TFLOP/s" in text
    assert "an assumption, not a measurement" in text
    assert "shards not there yet" in text
    assert "fits, with" in text
    behind = ["plan", config, "steps=7", "--gpus", "2", "steps=9", "--json", "batch.pairs=64"]
    assert main(behind) == 0
    plan = json.loads(capsys.readouterr().out)["batch"]
    assert (plan["pairs"], plan["steps"]) == (64, 9)
    for unknown in ("--gpu-count=3", "pairs"):
        with pytest.raises(SystemExit):
            main(["plan", config, "--gpus", "2", unknown])
        assert f"unrecognized arguments: {unknown}" in capsys.readouterr().err
    assert main(["plan", config, "--gpus", "3"]) == 1
    assert "not a multiple of 3 ranks × batch.micro_batch_size 4; what fits:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus 0: must be 1 or more"),
        (["--mfu", "1.5"], "--mfu 1.5: must lie in (0, 1]"),
        (["--gpu", "abacus"], "--gpu abacus: not known; known: B200"),
        (["model.path=nobody/nothing"], "model.path nobody/nothing: neither a diffusers folder nor to be had from the hub"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line(run, tmp_path, capsys, arguments, message):
    assert main(["plan", str(tmp_path / "run.yaml"), *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_lora_trains_adapters_alone():
    pytest.importorskip("peft")
    adapters = Adapters(4, ("to_q", "to_out.0"))
    sizes = parameter_sizes(TINY, adapters)
    assert sizes.frozen == parameter_sizes(TINY).trained
    layers = [
        module for name, module in UNet2DConditionModel.from_config(TINY).named_modules() if name.endswith(("to_q", "to_out.0"))
    ]
    assert sum(sizes.trained) == sum(4 * (layer.in_features + layer.out_features) for layer in layers)
    thin, whole = (training_pass(TINY, LATENT, "none", torch.bfloat16, TOKENS, part=each) for each in (adapters, None))
    assert thin.flops < whole.flops


def test_kept_checkpoints(run):
    checkpoint = replace(run.checkpoint, keep=2, keep_every=500)
    assert kept_checkpoints(replace(run, steps=2000, checkpoint=checkpoint)) == 2 + 1 + 4


def test_utilisation(run, monkeypatch):
    """10 pairs a second on two H100, beside what they could do; left out where nothing is known of the device."""
    from dde_ds.training.prepare import open_shards

    shards, _ = open_shards(run)
    assert Utilisation(run, shards, True, 2, torch.device("cpu")).row(10.0) == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    pair = workload_of(run, shards).pair_flops(True)
    assert Utilisation(run, shards, True, 2, torch.device("cuda")).row(10.0) == {
        "perf/mfu": pytest.approx(10 * pair / (2 * 989e12))
    }
    assert Utilisation(replace(run, precision="fp32"), shards, True, 2, torch.device("cuda")).row(10.0) == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla K80")
    assert Utilisation(run, shards, True, 2, torch.device("cuda")).row(10.0) == {}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_devices_by_cuda_s_name(name, found):
    assert find_device(name).name == found
    assert peak_flops(name, "bf16") == find_device(found).flops
    assert peak_flops(name, "fp32") is None


def test_an_unknown_device_has_no_peak():
    assert peak_flops("Tesla K80", "bf16") is None


def test_a_plan_takes_every_file_of_ours(run):
    """ZeRO-0 is for float32."""
    task = workload_of(run, None)
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        changed = replace(run, deepspeed=str(path), precision="fp32" if path.stem == "zero0" else "bf16")
        complete_config(changed, 8, 8)
        plan = make_plan(replace(changed, batch=replace(run.batch, micro_batch_size=2)), task, 2, 8, H100)
        assert plan["memory"]["peak"] > 0
        assert (plan["memory"]["host"] > 0) == ("offload" in path.stem)
        assert plan["traffic"]["between"] > 0


def test_contradictions_end_in_a_line(run):
    with pytest.raises(UserError, match="no such file"):
        make_plan(replace(run, deepspeed="nowhere.json"), workload_of(run, None), 1, 1, H100)


def test_a_public_model_is_planned_without_a_hub(monkeypatch, tmp_path, capsys):
    """Plan by the architecture file in the package, from any working directory, without a network connection."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    for path in {load_config(recipe).model.path for recipe in (ROOT / "launchers/recipes").glob("*.yaml")}:
        assert path in KNOWN
        assert shipped_unet(path) == read_architecture(KNOWN[path])
    assert shipped_unet("nobody/nothing") is None
    assert main(["plan", str(ROOT / "launchers/recipes/sd15_dde.yaml"), "model.gradient_checkpointing=full"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        "859,520,964 parameters, 859,520,964 of them trained, latents 4x64x64, prompts of 77 tokens architecture: shipped copy"
        in text
    )
    (tmp_path / "stabilityai/stable-diffusion-xl-base-1.0").mkdir(parents=True)  # a folder of that name is what is meant
    assert shipped_unet("stabilityai/stable-diffusion-xl-base-1.0") is None


def test_a_model_in_the_hubs_cache_is_read_from_there(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    path = "stabilityai/stable-diffusion-xl-base-1.0"
    repository = tmp_path / f"models--{path.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for name in ("model_index.json", "unet/config.json", "text_encoder/config.json"):
        assert shipped_unet(path) is not None
        file = repository / "snapshots" / ("0" * 40) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    assert shipped_unet(path) is None
