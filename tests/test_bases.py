"""Which bases are taken, which are refused in one line, and that they are known by what they hold."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from dde_ds import UserError
from dde_ds.evaluation.generate import load_pipeline
from dde_ds.models import remembered as memory
from dde_ds.models.base import find_variant
from dde_ds.models.check import check_base
from dde_ds.models.encode import encoders_digests
from dde_ds.models.optional import left_out, load_optional
from dde_ds.models.remembered import remembered
from dde_ds.models.unet import load_unet, unet_digest
from tests.support.bases import changed, copied, in_half, scaled, with_checker


def test_whole_bases_are_taken(sd_model, sdxl_model, tmp_path):
    image_to_image = copied(sd_model, tmp_path / "image", _class_name="StableDiffusionImg2ImgPipeline")
    for base in (sd_model, sdxl_model, image_to_image):
        check_base(str(base))
        assert left_out(str(base)) == {}
    assert type(load_pipeline(str(image_to_image))) is StableDiffusionPipeline


def test_parts_that_nobody_needs_may_be_missing(sd_model, tmp_path):
    named = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    without = str(copied(sd_model, tmp_path / "without", **named))
    pickled = str(with_checker(sd_model, tmp_path / "pickled", pickled=True))
    whole = str(with_checker(sd_model, tmp_path / "whole"))
    for base in (without, pickled, whole):
        check_base(base)
    assert left_out(without) == {"safety_checker": "its files are missing"}
    assert left_out(pickled) == {"safety_checker": "its weights are a pickle"}
    assert left_out(whole) == {}
    parts, reasons = load_optional(whole)
    assert type(parts["safety_checker"]).__name__ == "StableDiffusionSafetyChecker"
    assert parts["feature_extractor"] is not None
    assert reasons == {}
    parts, reasons = load_optional(pickled)
    assert parts["safety_checker"] is None
    # The checker cannot look at images without it.
    shutil.rmtree(tmp_path / "whole" / "feature_extractor")
    assert list(left_out(whole)) == ["feature_extractor", "safety_checker"]


def test_weights_named_after_fp16(sd_model, tmp_path):
    half, both = str(in_half(sd_model, tmp_path / "half")), str(in_half(sd_model, tmp_path / "both", keep=True))
    full = load_unet(str(sd_model)).state_dict()
    for base, variant, wanted in ((half, None, "fp16"), (both, None, None), (both, "fp16", "fp16")):
        assert find_variant(base, wanted=variant) == wanted
        check_base(base, variant=variant)
        rounded = load_unet(base, variant=variant).state_dict()
        for name, value in full.items():
            assert torch.equal(rounded[name], value.half().float() if wanted else value)
    assert unet_digest(both) == unet_digest(str(sd_model))
    assert unet_digest(both, variant="fp16") == unet_digest(half)
    assert load_pipeline(half).vae.dtype == torch.float32
    with pytest.raises(UserError, match=r"model.variant is 'ema': model.path .* holds fp16"):
        check_base(both, variant="ema")
    # One part alone in half precision, beside whole ones.
    mixed = shutil.copytree(sd_model, tmp_path / "mixed")
    shutil.rmtree(mixed / "unet")
    shutil.copytree(tmp_path / "half" / "unet", mixed / "unet")
    check_base(str(mixed))
    load_pipeline(str(mixed))


def test_the_conversion_that_the_message_names_works(sd_model, tmp_path):
    pickled = tmp_path / "pickled"
    DiffusionPipeline.from_pretrained(sd_model).save_pretrained(pickled, safe_serialization=False)
    with pytest.raises(UserError, match="is a pickle") as refusal:
        check_base(str(pickled))
    line = str(refusal.value)
    call = line[line.index("DiffusionPipeline.from") : line.index("; see")].replace("'base'", repr(str(tmp_path / "base")))
    eval(call)  # what a user would run
    check_base(str(tmp_path / "base"))
    (tmp_path / "one.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"is a single file.*from_single_file\(.*launchers/recipes/README.md"):
        check_base(str(tmp_path / "one.safetensors"))
    inpainting = copied(sd_model, tmp_path / "inpainting", _class_name="StableDiffusionInpaintPipeline")
    with pytest.raises(UserError, match="is a StableDiffusionInpaintPipeline, expected one of"):
        check_base(str(inpainting))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_whole(sd_model, tmp_path, part):
    base = shutil.copytree(sd_model, tmp_path / "base")
    (file,) = (base / part).glob("*.safetensors")
    whole, weights = file.read_bytes(), safetensors.torch.load_file(file)
    first = next(iter(weights))
    safetensors.torch.save_file({name: value for name, value in weights.items() if name != first}, file)
    with pytest.raises(UserError, match=rf"{part} holds no .* \(1 of \d+ tensors are missing\)"):
        check_base(str(base))
    if part == "unet":  # the missing ones would be random
        with pytest.raises(UserError, match="1 of its tensors are missing"):
            load_unet(str(base))
    safetensors.torch.save_file(weights | {first: torch.zeros(3, 5, 7)}, file)
    with pytest.raises(UserError, match=rf"{part} holds .* of shape \[3, 5, 7\]"):
        check_base(str(base))
    file.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"is damaged or no safetensors"):
        check_base(str(base))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=rf"{part} holds no"):
        check_base(str(base))


def test_indexes_of_weight_files(sd_model, tmp_path):
    base = shutil.copytree(sd_model, tmp_path / "base")
    unet = load_unet(str(base))
    shutil.rmtree(base / "unet")
    unet.save_pretrained(base / "unet", max_shard_size="40KB")
    check_base(str(base))
    index = base / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for weight_map, said in (
        ([], "names no files"),
        ({}, "names no files"),
        ({"a": 3}, "names no files"),
        ({"a": "../vae/diffusion_pytorch_model.safetensors"}, "unet holds no ../vae"),
        ({"a": "config.json"}, "expected safetensors"),
        (dict(list(whole["weight_map"].items())[:3]), "tensors are missing"),
    ):
        index.write_text(json.dumps(whole | {"weight_map": weight_map}))
        with pytest.raises(UserError, match=said):
            check_base(str(base))


VALUES = [None, True, -1, 0, 10**9, 1e308, float("nan"), "", "x" * 50, [], [1, "a"], {}, {"a": []}]
FILES = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]


@pytest.mark.parametrize("name", FILES)
def test_whatever_a_configuration_holds_is_one_line(sd_model, tmp_path, name):
    """Each key missing or of another kind, and files that are no objects: taken, or refused in one line that names the file."""
    base = shutil.copytree(sd_model, tmp_path / "base")
    file = base / name
    whole = json.loads(file.read_text())
    texts = ["", "[]", "3", "null", '"a"', "{", "[" * 100_000, '{"a": ' * 2000 + "1" + "}" * 2000, "\udcff"]
    for number, key in enumerate(whole):
        changed_key = {key: VALUES[number % len(VALUES)]} if number % 4 else {}
        texts.append(json.dumps({other: value for other, value in whole.items() if other != key} | changed_key))
    refused = 0
    for text in texts:
        file.write_bytes(text.encode(errors="surrogateescape"))
        try:
            check_base(str(base))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
            assert len(str(error)) < 1000
            assert str(base) in str(error) or "scheduler" in str(error)
    assert refused >= 9
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=name.rpartition("/")[2]):
        check_base(str(base))


def test_parts_of_two_models(sd_model, tmp_path):
    base = copied(sd_model, tmp_path / "base")
    changed(base / "tokenizer" / "tokenizer_config.json", model_max_length=77)
    with pytest.raises(UserError, match="model_max_length is 77, its text encoder takes 12"):
        check_base(str(base))
    shutil.rmtree(base / "tokenizer")
    with pytest.raises(UserError, match="tokenizer"):
        check_base(str(base))
    third = copied(sd_model, tmp_path / "third", scheduler=["diffusers", "NoSuchScheduler"])
    with pytest.raises(UserError, match="'NoSuchScheduler', which is no scheduler"):
        check_base(str(third))
    foreign = copied(sd_model, tmp_path / "foreign", vae=["os", "AutoencoderKL"])
    with pytest.raises(UserError, match="expected AutoencoderKL"):
        check_base(str(foreign))


def test_encoders_are_known_by_their_weights(sd_model, tmp_path):
    own = encoders_digests(str(sd_model))
    settings = {"weights": own.full, "weights_half": own.half}
    moved = encoders_digests(str(shutil.copytree(sd_model, tmp_path / "moved")))
    assert moved == own
    assert encoders_digests(str(in_half(sd_model, tmp_path / "half"))).fit(settings)
    assert not encoders_digests(str(in_half(sd_model, tmp_path / "again"))).fit({"weights": own.full})  # of an earlier version
    assert own.fit({"weights": own.other_full})
    for part in ("vae", "text_encoder"):
        assert not encoders_digests(str(scaled(copied(sd_model, tmp_path / part), part))).fit(settings)


def test_digests_are_remembered_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "SETTLED_SECONDS", 0.0)
    file, calls = tmp_path / "weights", []
    file.write_bytes(b"one")
    one, two, other = ([hashlib.sha256(data).hexdigest()] for data in (b"one", b"two", b"other"))

    def digest() -> list[str]:
        return remembered("test", [file], lambda: calls.append(1) or [hashlib.sha256(file.read_bytes()).hexdigest()])

    assert [digest(), digest(), len(calls)] == [one, one, 1]
    link = tmp_path / "link"
    link.symlink_to(file)
    assert remembered("test", [link], lambda: other) == one
    assert remembered("other", [file], lambda: other) == other
    changed_at = file.stat()
    file.write_bytes(b"two")  # of the same size, under the same name, and made as old as it was
    os.utime(file, ns=(changed_at.st_atime_ns, changed_at.st_mtime_ns))
    assert [digest(), digest(), len(calls)] == [two, two, 2]
    assert remembered("test", [file], lambda: two + two, count=2) == two + two  # as another version asks
    assert digest() == two

    cache = tmp_path / "cache" / "dde_ds" / "digests.json"
    whole = cache.read_text()
    for damage in (
        "",
        "[]",
        "[" * 100_000,
        "\0" * 100,
        whole.replace(two[0], "x"),
        whole.replace(f'["{two[0]}"]', "{}"),
        whole[:-9],
    ):
        cache.write_text(damage)
        assert digest() == two
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert digest() == two
    monkeypatch.setattr(memory, "SETTLED_SECONDS", 1e9)  # what may still be changing is not trusted
    (tmp_path / "cache").unlink()
    before = len(calls)
    digest()
    digest()
    assert len(calls) == before + 2


def test_configurations_are_not_shared_between_calls(sd_model):
    """A caller's changes to a configuration must not reach another caller."""
    from dde_ds.models.unet import load_unet_config

    first = load_unet_config(str(sd_model))
    kept = copy.deepcopy(first)
    first["in_channels"] = 99
    assert load_unet_config(str(sd_model)) == kept
