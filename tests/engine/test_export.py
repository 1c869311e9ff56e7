"""What leaves a run: adapters that other programs take whole, single files that say what they predict, numbers alone, and readable files."""

from __future__ import annotations

import json
import os
import stat
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from dde_ds.cli import main
from dde_ds.config import BatchConfig, DataConfig, LoraConfig, ModelConfig, OptimizerConfig, RunConfig
from dde_ds.engine import checkpoint
from dde_ds.engine.export import KOHYA_FILE, LORA_FILE
from dde_ds.files import save_tensors
from dde_ds.training.prepare import build_run_objective
from tests.test_lora import adapters_of, load, predict, train_somewhat, with_adapters

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYTHING = (
    *(*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"),
    *("time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "linear_1", "linear_2"),
)
RANK, ALPHA = 4, 6


def run_of(model: Path, lora: LoraConfig | None = None) -> RunConfig:
    return RunConfig("out", 4, ModelConfig(str(model)), DataConfig("pairs"), BatchConfig(8, 2), OptimizerConfig(1e-5), lora=lora)


def save_checkpoint(folder: Path, run: RunConfig, weights: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of these weights, with all that an export reads."""
    folder.mkdir(parents=True)
    save_tensors({f"{name}/weight": value.contiguous() for name, value in weights.items()}, folder / "state-00000-000.safetensors")
    save_tensors(build_run_objective(run).state_dict(), folder / checkpoint.TABLE)
    write_state(
        folder,
        {
            "step": 4,
            "position": 32,
            "optimizer": {"steps": 4, "moments": []},
            "identity": {},
            "config": yaml.safe_load(run.to_yaml()),
        },
    )
    return folder


def write_state(folder: Path, state: dict) -> None:
    """What a checkpoint says of itself, and the manifest of its files."""
    (folder / checkpoint.STATE).write_text(json.dumps(state))
    files = [checkpoint._row(path) for path in sorted(folder.iterdir()) if path.name != checkpoint.MANIFEST]
    (folder / checkpoint.MANIFEST).write_text(json.dumps({"format": checkpoint.FORMAT, "files": files}))


@pytest.fixture(params=["sd", "sdxl"])
def model(request) -> Path:
    return request.getfixturevalue(f"{request.param}_model")


def lora_checkpoint(folder: Path, model: Path, targets=EVERYTHING):
    """(checkpoint, UNet with adapters)."""
    unet = with_adapters(model, rank=RANK, alpha=ALPHA, targets=targets)
    train_somewhat(unet)
    run = run_of(model, LoraConfig(RANK, ALPHA, targets))
    return save_checkpoint(folder / "step-00000004", run, adapters_of(unet)), unet


def taken(keys: list[str], unet) -> dict[str, int]:
    """How many of an adapter's tensors ComfyUI, A1111 and sd-scripts take, by their rules for names."""
    layers = [name.removesuffix(".weight") for name in unet.state_dict() if name.endswith(".weight")]
    flat = {"lora_unet_" + layer.replace(".", "_") for layer in layers}
    # The original names, which all of them know as well; written for this layer alone.
    flat |= {"lora_unet_label_emb_0_0", "lora_unet_label_emb_0_2"} if "add_embedding.linear_1" in layers else set()
    comfy = flat | {"unet." + layer.replace(".to_", ".processor.to_").removesuffix(".0") for layer in layers}
    return {
        "comfy": sum(key.rsplit(".lora_", 1)[0] in comfy or (key.endswith(".alpha") and key[:-6] in flat) for key in keys),
        "a1111": sum(key.partition(".")[0] in flat for key in keys),
        "sd-scripts": sum("lora_down" in key or "lora_up" in key or key.endswith(".alpha") for key in keys),
    }


@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
def test_other_programs_take_every_tensor_at_its_trained_strength(tmp_path, model, targets):
    source, trained = lora_checkpoint(tmp_path, model, targets)
    path = tmp_path / "adapters.safetensors"
    assert main(["export", str(source), "--output", str(path), "--format", "kohya"]) == 0
    tensors, base = load_file(path), load(model)
    adapters = adapters_of(trained)
    assert len(tensors) == len(adapters) * 3 // 2
    assert set(taken(list(tensors), base).values()) == {len(tensors)}
    assert {value.item() for name, value in tensors.items() if name.endswith(".alpha")} == {ALPHA}

    # As the programs merge it: W + α/r B A, r the rows of A.
    weights = {name.removesuffix(".weight").replace(".", "_"): value for name, value in base.state_dict().items()}
    if "lora_unet_label_emb_0_0.alpha" in tensors:
        weights |= {f"label_emb_0_{2 * n - 2}": weights[f"add_embedding_linear_{n}"] for n in (1, 2)}
    for layer in [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]:
        down, up = (tensors[f"{layer}.lora_{side}.weight"] for side in ("down", "up"))
        weight = weights[layer.removeprefix("lora_unet_")]
        weight += (tensors[f"{layer}.alpha"] / len(down)) * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    assert (predict(load(model)) - predict(trained)).abs().max() > 1e-2
    assert torch.allclose(predict(base), predict(trained), atol=1e-5)

    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.load_lora_weights(path)
    assert torch.allclose(predict(pipeline.unet), predict(trained), atol=1e-5)


def test_both_files_lie_in_a_folder_and_say_what_they_are(tmp_path, model):
    source, trained = lora_checkpoint(tmp_path, model)
    xl = model.name == "sdxl"
    for form in ("folder", "lora"):
        out = tmp_path / form
        assert main(["export", str(source), "--output", str(out), "--format", form, "--dtype", "fp32"]) == 0
        with safe_open(out / KOHYA_FILE, "pt") as file:
            said = file.metadata()
        for name in (LORA_FILE, KOHYA_FILE):
            pipeline = DiffusionPipeline.from_pretrained(model)
            # diffusers finds its own file, though two lie there.
            pipeline.load_lora_weights(out, **({"weight_name": name} if name == KOHYA_FILE else {}))
            assert torch.allclose(predict(pipeline.unet), predict(trained), atol=1e-5)
        card = (out / "README.md").read_text()
        assert f"`{LORA_FILE}`" in card and f"`{KOHYA_FILE}`" in card
        assert ("UNet beside them" in card) == (out / "unet").exists() == (form == "folder")
        assert ("all other parts are the base model's" in card) == (form == "folder")
    architecture = "stable-diffusion-xl-v1-base/lora" if xl else "stable-diffusion-v1/lora"
    assert said == {
        "format": "pt",
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0" if xl else "sd_v1",
        "ss_sd_model_name": model.name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "6",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if xl else "diffusers",
        "modelspec.title": f"{model.name}, aligned with preference pairs",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
    }


def test_adapters_can_be_had_without_their_base(tmp_path, sd_model, capsys):
    source, _ = lora_checkpoint(tmp_path, sd_model, ATTENTION)
    state = json.loads((source / checkpoint.STATE).read_text())
    state["config"]["model"]["path"] = str(tmp_path / "gone")
    write_state(source, state)
    assert main(["export", str(source), "--output", str(tmp_path / "out"), "--format", "lora"]) == 0
    assert "warning: the adapters' file does not say which models it is for: model.path" in capsys.readouterr().out
    assert len(load_file(tmp_path / "out" / KOHYA_FILE)) == 3 * len(load_file(tmp_path / "out" / LORA_FILE)) // 2


def test_what_kohya_is_not_for(tmp_path, sd_model, capsys):
    full = save_checkpoint(tmp_path / "full" / "step-00000004", run_of(sd_model), dict(load(sd_model).named_parameters()))
    assert main(["export", str(full), "--output", str(tmp_path / "x.safetensors"), "--format", "kohya"]) == 1
    assert "--format kohya: this run trained parameters of the UNet and has no adapters" in capsys.readouterr().err
    source, _ = lora_checkpoint(tmp_path, sd_model, ATTENTION)
    assert main(["export", str(source), "--output", str(tmp_path / "x"), "--format", "kohya"]) == 1
    assert "format kohya writes one file; give it a name that ends in .safetensors" in capsys.readouterr().err


def change_scheduler(model: Path, folder: Path, **changes) -> Path:
    """A copy of a pipeline with another noise schedule."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **changes)
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "keys", "said"),
    [
        ({}, set(), "epsilon"),
        ({"prediction_type": "v_prediction"}, {"v_pred"}, "v"),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"v_pred", "ztsnr"}, "v"),
    ],
)
def test_a_single_file_says_what_it_predicts(tmp_path, sd_model, changes, keys, said, capsys):
    from tests.support.pipelines import save_sdxl

    # diffusers tells SDXL's two text encoders apart by their widths.
    for name, source in (("sd", sd_model), ("sdxl", save_sdxl(tmp_path / "first", second_width=24))):
        model = change_scheduler(source, tmp_path / name, **changes)
        start = save_checkpoint(tmp_path / f"{name}-run" / "step-00000004", run_of(model), dict(load(model).named_parameters()))
        path = tmp_path / f"{name}.safetensors"
        assert main(["export", str(start), "--output", str(path), "--format", "single", "--dtype", "fp16"]) == 0
        tensors = load_file(path)
        assert {key for key in tensors if "." not in key} == (keys if name == "sdxl" else set())
        assert all(tensors[key].numel() == 0 for key in tensors if "." not in key)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["modelspec.prediction_type"] == said
        assert metadata["modelspec.architecture"] == ("stable-diffusion-xl-v1-base" if name == "sdxl" else "stable-diffusion-v1")
        assert "| optimizer steps | 4 of 8 pairs |" in metadata["model_card"]
        warned = "programs take a single file of Stable Diffusion 1 for noise prediction" in capsys.readouterr().out
        assert warned == (name == "sd" and said == "v")
        kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
        back = kind.from_single_file(path, config=str(model), local_files_only=True)
        assert back.scheduler.config.prediction_type == ("v_prediction" if said == "v" else "epsilon")
        expected = load(model).half().state_dict()
        assert all(torch.equal(value.half(), expected[key]) for key, value in back.unet.state_dict().items())


@pytest.mark.parametrize("form", ["folder", "lora", "kohya", "single"])
def test_what_is_no_number_is_not_exported(tmp_path, sd_model, form, capsys):
    adapters = form in ("lora", "kohya")
    targets = ("to_k",)
    if adapters:
        weights = adapters_of(with_adapters(sd_model, rank=RANK, alpha=ALPHA, targets=targets))
    else:
        weights = {name: value.detach().clone() for name, value in load(sd_model).named_parameters()}
    broken = [name for name in weights if ".to_k." in name][:4]
    for name, value in zip(broken, (torch.nan, torch.inf, -torch.inf, torch.nan), strict=True):
        weights[name].view(-1)[-1] = value
    run = run_of(sd_model, LoraConfig(RANK, ALPHA, targets) if adapters else None)
    source = save_checkpoint(tmp_path / "checkpoints" / "step-00000004", run, weights)
    before = set(tmp_path.iterdir())
    target = tmp_path / ("x.safetensors" if form in ("kohya", "single") else "x")
    assert main(["export", str(source), "--output", str(target), "--format", form]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: export: 4 of ") and "tensors hold NaN or infinity (" in error and ", …)" in error
    assert error.count(".to_k.") + error.count("_to_k.") + error.count(".attn") >= 3
    assert error.count("\n") == 1
    assert set(tmp_path.iterdir()) == before, "something was written"


def test_a_weight_too_large_for_the_chosen_type(tmp_path, sd_model, capsys):
    weights = {name: value.detach().clone() for name, value in load(sd_model).named_parameters()}
    weights["conv_in.weight"][0, 0, 0, 0] = 7e4
    source = save_checkpoint(tmp_path / "step-00000004", run_of(sd_model), weights)
    assert main(["export", str(source), "--output", str(tmp_path / "x"), "--dtype", "fp16"]) == 1
    assert "(unet.conv_in.weight); nothing was exported: fp16 ends at 65,504, choose --dtype bf16" in capsys.readouterr().err
    assert main(["export", str(source), "--output", str(tmp_path / "x"), "--dtype", "bf16"]) == 0


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(tmp_path, sd_model, mask):
    with umask(mask):
        source, _ = lora_checkpoint(tmp_path, sd_model, ATTENTION)
        for form, name in (("folder", "a"), ("lora", "b"), ("kohya", "c.safetensors"), ("single", "d.safetensors")):
            assert (
                main(["export", str(source), "--output", str(tmp_path / name), "--format", form, "--max-shard-size", "50KB"]) == 0
            )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) > 8
    modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in files}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_disk_that_cannot_be_written(tmp_path, sd_model, capsys):
    source, _ = lora_checkpoint(tmp_path, sd_model, ATTENTION)
    (tmp_path / "file").write_text("in the way")
    for form, name in (("lora", "x"), ("kohya", "x.safetensors")):
        assert main(["export", str(source), "--output", str(tmp_path / "file" / name), "--format", form]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: export {tmp_path}/file/{name}: not writable: ") and error.count("\n") == 1


def test_a_hub_id_alone_is_the_base_of_the_card(tmp_path, monkeypatch):
    from dde_ds.engine.export import model_card

    def head(path: str) -> dict:
        run = replace(run_of(Path("x")), model=ModelConfig(path))
        card = model_card(run, 4, {}, "weight")
        assert f"| base model | {path} |" in card
        return yaml.safe_load(card.split("---\n")[1])

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    assert head("stable-diffusion-v1-5/stable-diffusion-v1-5")["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    for local in ("/data/sd15", "./sd15", "../sd15", "a/b/c", "models/sd15", str(tmp_path / "models" / "sd15")):
        assert "base_model" not in head(local), local
