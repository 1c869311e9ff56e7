"""``lora.init``: a run's adapters begin as a file's, whatever the names in it; files that do not fit are refused in one line."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from dde_ds import UserError, load_config
from dde_ds.models import lora
from dde_ds.models.parts import build_empty
from dde_ds.training.prepare import load_engines
from dde_ds.training.resume import differences, identity
from tests.support.launching import write_config
from tests.test_lora import TARGETS, adapters_of, load, predict, train_somewhat, with_adapters


def write_files(folder, trained, alpha: float) -> dict[str, str]:
    """Write trained adapters of rank 4 with the names of diffusers, of kohya, and of older diffusers."""
    from diffusers import StableDiffusionPipeline

    adapters = adapters_of(trained)
    StableDiffusionPipeline.save_lora_weights(folder / "diffusers", unet_lora_layers=lora.to_file(adapters, alpha / 4))
    save_file(lora.to_kohya(adapters, alpha), folder / "kohya.safetensors")
    old = {
        f"unet.{name.replace('.lora_A.', '.lora.down.').replace('.lora_B.', '.lora.up.')}": value
        for name, value in lora.to_file(adapters, alpha / 4).items()
    }
    save_file(old, folder / "old.safetensors")
    files = {"diffusers": folder / "diffusers" / "pytorch_lora_weights.safetensors"}
    return {name: str(files.get(name, folder / f"{name}.safetensors")) for name in ("diffusers", "kohya", "old")}


@pytest.mark.parametrize("kind", ["sd_model", "sdxl_model"])
def test_the_model_begins_as_the_files(tmp_path, request, kind):
    model = request.getfixturevalue(kind)
    trained = with_adapters(model)
    train_somewhat(trained)
    expected = predict(trained)
    assert (expected - predict(load(model))).abs().max() > 1e-2
    for name, file in write_files(tmp_path, trained, 6).items():
        for alpha in (6.0, 2.0):  # the run's own α need not be the file's
            begun = with_adapters(model, alpha=alpha, seed=5)
            found = lora.read_adapters(build_empty(str(model), "unet"), file, 4, TARGETS)
            lora.set_adapters(begun, found, alpha / 4)
            assert torch.allclose(predict(begun), expected, atol=1e-5), name


def test_a_runs_policy_begins_there(tmp_path, sd_model, sd_shards, monkeypatch):
    trained = with_adapters(sd_model, targets=("to_q", "to_v"))
    train_somewhat(trained)
    files = write_files(tmp_path, trained, 6)
    overrides = [f"lora={{rank: 4, alpha: 3, targets: [to_q, to_v], init: {files['kohya']}}}"]
    run = load_config(write_config(tmp_path / "run.yaml", sd_model, sd_shards), overrides)
    monkeypatch.setattr("dde_ds.training.prepare.initialize_policy", lambda policy, config: policy)
    policy, _ = load_engines(run, {}, with_reference=False, checkpointing="none")
    assert torch.allclose(predict(policy), predict(trained), atol=1e-5)
    assert all(".lora_" in name for name in adapters_of(policy))

    # The content makes the run what it is, not the path.
    class Shards:
        digest = "0" * 64

    def own(file: str | None) -> dict:
        from dataclasses import replace

        assert run.lora
        return identity(replace(run, lora=replace(run.lora, init=file)), Shards, {})  # pyright: ignore[reportArgumentType]

    moved = copy.copy(files["kohya"]).replace("kohya", "moved")
    save_file(load_file(files["kohya"]), moved)
    assert differences(own(moved), own(files["kohya"])) == []
    (changed,) = differences(own(files["old"]), own(files["kohya"]))
    assert changed.startswith("lora.init is ")
    (begun,) = differences(own(None), own(files["kohya"]))
    assert begun.startswith("lora.init is null, was ")


def test_what_does_not_fit_is_refused(tmp_path, sd_model, sdxl_model):
    trained = with_adapters(sd_model)
    train_somewhat(trained)
    files = write_files(tmp_path, trained, 6)
    empty = build_empty(str(sd_model), "unet")

    def refused(file: str, message: str, rank: int = 4, targets=TARGETS, unet=empty) -> None:
        with pytest.raises(UserError, match=message) as caught:
            lora.read_adapters(unet, file, rank, targets)
        assert "\n" not in str(caught.value)

    for file in files.values():
        refused(file, r"lora\.rank is 8: lora\.init .* has rank 4 in ", rank=8)
        refused(file, r"tensors belong to no layer of lora\.targets in the UNet \(unet\.", targets=("to_q", "to_out.0"))
        refused(file, r"lacks \d+ of the \d+ tensors of lora\.targets", targets=(*TARGETS, "to_v"))
    refused(str(tmp_path / "none.safetensors"), r"must be a \.safetensors file")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    refused(str(tmp_path / "broken.safetensors"), "no LoRA of this model")

    tensors = load_file(files["diffusers"])
    extra = tensors | {"text_encoder.layers.0.lora_A.weight": torch.ones(4, 4), "unet.nowhere.lora_A.weight": torch.ones(4, 4)}
    save_file(extra, tmp_path / "extra.safetensors")
    refused(str(tmp_path / "extra.safetensors"), rf"2 of its {len(extra)} tensors belong to no layer")
    name = next(name for name in tensors if "to_q.lora_A" in name)
    save_file(tensors | {name: torch.ones(4, 3)}, tmp_path / "shape.safetensors")
    refused(str(tmp_path / "shape.safetensors"), r"has shapes \(4, 3\) and ")
    save_file(tensors | {name: tensors[name] * float("nan")}, tmp_path / "nan.safetensors")
    refused(str(tmp_path / "nan.safetensors"), "holds NaN or infinity")
