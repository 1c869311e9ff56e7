"""Folders of images: each a function of (model, seed, prompt, image number), made once, refused when begun otherwise."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dde_ds.cli import evaluate, main
from dde_ds.cli.parsing import options_of
from dde_ds.cli.reporting import report_errors
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.errors import UserError
from dde_ds.evaluation.generate import initial_noise
from dde_ds.evaluation.generate_folder import DrawOptions, generate_folder
from dde_ds.evaluation.pictures import ImageFolder, claim, open_pictures, require_whole
from tests.conftest import ROOT
from tests.support.bases import copied, in_half, scaled
from tests.support.launching import LAUNCHER, environment, free_port
from tests.support.pipelines import save_sd

CPU = torch.device("cpu")
ALONE = DistributedEnv(0, 1, 0)
PROMPTS = ["red fire", "penguin", "größer – 狐"]
OPTIONS = DrawOptions(images_per_prompt=2, steps=3)


def draw(model, folder, prompts=PROMPTS, options=OPTIONS, batch=2, ranks=ALONE):
    return generate_folder(str(model), None, prompts, folder, options, ranks, CPU, batch)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted((folder / "images").iterdir())}


def assert_same_within_rounding(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert list(one) == list(other)
    assert max(np.abs(one[name] - other[name]).max() for name in one) <= 1


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, sd_model) -> Path:
    return draw(sd_model, tmp_path_factory.mktemp("images") / "sd").folder


def test_noise_is_a_function_of_seed_prompt_and_number():
    one = initial_noise(0, "fire", 1, (4, 8, 8))
    assert torch.equal(one, initial_noise(0, "fire", 1, (4, 8, 8)))
    for other in ((1, "fire", 1), (0, "fires", 1), (0, "fire", 2), (0, "1\nfire", 0)):
        assert not torch.equal(one, initial_noise(*other, (4, 8, 8)))
    many = torch.stack([initial_noise(0, "fire", number, (4, 64, 64)) for number in range(16)])
    assert abs(float(many.mean())) < 0.01
    assert float(many.std()) == pytest.approx(1, abs=0.01)
    assert float(torch.corrcoef(many.flatten(1)).fill_diagonal_(0).abs().max()) < 0.05


def test_images_and_their_metadata(drawn, sd_model):
    manifest = json.loads((drawn / "manifest.json").read_text())
    assert manifest["prompts"] == PROMPTS
    settings = manifest["settings"]
    expected = {"scheduler": "ddim", "steps": 3, "guidance": 7.5, "seed": 0, "precision": "fp32", "resolution": 16, "family": "sd"}
    assert expected.items() <= settings.items()
    names = [f"{prompt:05d}-{number:02d}.png" for prompt in range(3) for number in range(2)]
    assert sorted(path.name for path in (drawn / "images").iterdir()) == names
    for name in names:
        image = Image.open(drawn / "images" / name)
        prompt, number = int(name[:5]), int(name[6:8])
        assert image.info == {
            "prompt": PROMPTS[prompt],
            "image": str(number),
            "seed": "0",
            "model": str(sd_model),
            "settings": manifest["digest"],
        }
        assert image.size == (16, 16)
    assert len({array.tobytes() for array in pixels(drawn).values()}) == 6


def test_any_batch_and_any_share_give_the_same_images(tmp_path, drawn, sd_model):
    draw(sd_model, tmp_path / "one", batch=1)
    assert_same_within_rounding(pixels(drawn), pixels(tmp_path / "one"))
    draw(sd_model, tmp_path / "all", batch=6)
    assert_same_within_rounding(pixels(drawn), pixels(tmp_path / "all"))
    # The same batches again: the same bytes.
    draw(sd_model, tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (drawn / "images").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again" / "images").iterdir()
    }


def test_a_variant_is_drawn_where_it_is_asked_for(tmp_path, sd_model, capsys):
    both, half = in_half(sd_model, tmp_path / "both", keep=True), in_half(sd_model, tmp_path / "half")
    (tmp_path / "prompts.txt").write_text("a kite")
    weights = {}
    for name, model, options in (("plain", both, []), ("chosen", both, ["--variant", "fp16"]), ("found", half, [])):
        small = ["--images-per-prompt", "1", "--steps", "1", "--prompts", str(tmp_path / "prompts.txt")]
        assert main(["generate", "--model", str(model), "--out", str(tmp_path / name), *small, *options]) == 0
        weights[name] = json.loads((tmp_path / name / "manifest.json").read_text())["settings"]["weights"]
    assert weights["chosen"] == weights["found"] != weights["plain"]
    assert main(["generate", "--model", str(both), "--out", str(tmp_path / "none"), *small, "--variant", "ema"]) == 1
    assert "model.variant is 'ema'" in capsys.readouterr().err
    scored = [
        "evaluate",
        "--base",
        str(tmp_path / "plain"),
        "--model",
        str(half),
        "--scorers",
        "clip",
        "--out",
        str(tmp_path / "c"),
    ]
    assert main([*scored, *small, "--variant", "fp16"]) == 1
    assert "--variant: --base is a folder of images, nothing is drawn from it" in capsys.readouterr().err


def test_order_of_prompts_changes_no_image(tmp_path, drawn, sd_model):
    draw(sd_model, tmp_path / "reversed", PROMPTS[::-1])
    turned = {f"{2 - int(name[:5]):05d}{name[5:]}": array for name, array in pixels(tmp_path / "reversed").items()}
    assert_same_within_rounding(pixels(drawn), dict(sorted(turned.items())))


def test_the_image_is_what_diffusers_draws(drawn, sd_model):
    """The same noise through the pipeline's own call, prompts and all."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(sd_model)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(0, "penguin", 1, (4, 8, 8))[None]
    image = pipeline("penguin", latents=noise, num_inference_steps=3, guidance_scale=7.5, output_type="np").images[0]
    assert np.abs(image * 255 - pixels(drawn)["00001-01.png"]).max() <= 1


def test_what_is_missing_or_damaged_is_made_again_and_nothing_else(tmp_path, drawn, sd_model):
    folder = shutil.copytree(drawn, tmp_path / "copy")
    images = folder / "images"
    (images / "00000-01.png").unlink()
    data = bytearray((images / "00001-00.png").read_bytes())
    data[data.index(b"IDAT") + 10] ^= 1
    (images / "00001-00.png").write_bytes(data)
    (images / "00002-00.png").write_bytes((images / "00002-00.png").read_bytes()[:300])
    shutil.copy(images / "00002-01.png", images / "00001-01.png")  # whole, but another prompt's
    before = {path.name: path.stat().st_mtime_ns for path in images.iterdir()}
    with pytest.raises(
        UserError, match=r"4 of 6 images are missing or damaged \(00000-01.png, 00001-00.png, 00001-01.png, 00002-00.png\)"
    ):
        require_whole(open_pictures(folder))
    draw(sd_model, folder)
    require_whole(open_pictures(folder))
    assert_same_within_rounding(pixels(drawn), pixels(folder))
    kept = {path.name for path in images.iterdir() if before.get(path.name) == path.stat().st_mtime_ns}
    assert kept == {"00000-00.png", "00002-01.png"}


def test_a_folder_begun_otherwise_is_refused(tmp_path, drawn, sd_model):
    folder = shutil.copytree(drawn, tmp_path / "copy")
    for change, named in (
        ({"options": DrawOptions(images_per_prompt=2, steps=4)}, "steps 3, now 4"),
        ({"options": DrawOptions(images_per_prompt=2, steps=3, seed=1)}, "seed 0, now 1"),
        ({"options": DrawOptions(images_per_prompt=2, steps=3, guidance=5)}, "guidance 7.5, now 5.0"),
        ({"options": DrawOptions(images_per_prompt=2, steps=3, scheduler="euler")}, "scheduler 'ddim', now 'euler'"),
        ({"prompts": PROMPTS[:2]}, "3 prompts, now 2"),
    ):
        with pytest.raises(UserError, match=named):
            draw(sd_model, folder, **change)
    # Another model under the same path.
    model = shutil.copytree(sd_model, tmp_path / "model")
    draw(model, tmp_path / "images", PROMPTS[:1])
    torch.manual_seed(1)
    other = save_sd(tmp_path / "other", prediction_type="epsilon")
    weights = next((other / "unet").glob("*.safetensors"))
    import safetensors.torch

    tensors = safetensors.torch.load_file(weights)
    tensors["conv_in.weight"] += 1e-3
    safetensors.torch.save_file(tensors, model / "unet" / weights.name)
    with pytest.raises(UserError, match="weights"):
        draw(model, tmp_path / "images", PROMPTS[:1])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and holds no images of ours"):
        draw(sd_model, tmp_path / "mine")


def test_bad_options(tmp_path, sd_model):
    for options, named in (
        ({"images_per_prompt": 0}, "images_per_prompt 0"),
        ({"scheduler": "ddmi"}, "did you mean 'ddim'"),
        ({"precision": "int8"}, "precision 'int8'"),
        ({"guidance": 0.5}, "guidance 0.5"),
    ):
        with pytest.raises(UserError, match=named):
            DrawOptions(**options)
    # Before any weights are read: this model has none.
    weightless = shutil.copytree(sd_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match="resolution 18: must be a multiple of 4"):
        draw(weightless, tmp_path / "images", options=DrawOptions(resolution=18))
    assert not (tmp_path / "images").exists()


def test_a_mended_prompts_file_works_with_the_same_folder(tmp_path, sd_model, capsys):
    """A run that ended between folder and manifest, as an earlier version did at half a surrogate pair, leaves nothing in the way."""
    path, out = tmp_path / "p.jsonl", tmp_path / "out"
    path.write_text(json.dumps("fire") + "\n" + '"party \\ud83c"')
    arguments = ["--model", str(sd_model), "--prompts", str(path), "--out", str(out), "--steps", "1", "--images-per-prompt", "1"]
    assert generate(*arguments) == 1
    assert "p.jsonl, line 2: text holds half a surrogate pair" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(UnicodeEncodeError):  # whoever calls it from Python
        claim(ImageFolder(out, ["party \ud83c"], {"images_per_prompt": 1}))
    assert not out.exists()
    (out / "images").mkdir(parents=True)
    (out / ".manifest.json.host-1.partial").write_text("{")
    path.write_text(json.dumps("fire") + "\n" + '"party \\ud83c\\udf89 abcdefghijklmnopqrstuvwxyz"')
    assert generate(*arguments) == 0
    printed = capsys.readouterr()
    assert "2 images" in printed.out
    assert "1 of 2 prompts have more tokens than the text encoder takes" in printed.err
    assert open_pictures(out).prompts == ["fire", "party \U0001f389 abcdefghijklmnopqrstuvwxyz"]
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "holiday.png").touch()
    with pytest.raises(UserError, match="is not empty and holds no images of ours"):
        draw(sd_model, tmp_path / "mine")


def generate(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--revision", "--variant", "--prompts"):
        parser.add_argument(name)
    parser.add_argument("--out", type=Path)
    evaluate.add_drawing(parser)
    return report_errors(lambda: evaluate.generate(parser.parse_args(arguments)), options=options_of(parser))


def test_ctrl_c_is_no_traceback(tmp_path, drawn, sd_model, capsys):
    def interrupted(done: int, total: int) -> None:
        if done == 4:
            signal.raise_signal(signal.SIGINT)

    def act() -> None:
        generate_folder(str(sd_model), None, PROMPTS, tmp_path, OPTIONS, ALONE, CPU, 2, interrupted)

    assert report_errors(act) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by Ctrl-C; what is whole is kept"
    assert len(list((tmp_path / "images").iterdir())) == 4
    draw(sd_model, tmp_path)
    assert_same_within_rounding(pixels(drawn), pixels(tmp_path))


def test_a_model_may_lie_elsewhere_in_a_second_run(tmp_path, drawn, sd_model):
    """It is known by its weights; the folder keeps the name that it was begun with."""
    folder = shutil.copytree(drawn, tmp_path / "images")
    (folder / "images" / "00000-00.png").unlink()
    moved = copied(sd_model, tmp_path / "moved")
    assert draw(moved, folder).settings["model"] == str(sd_model)
    require_whole(open_pictures(folder))
    assert_same_within_rounding(pixels(drawn), pixels(folder))
    with pytest.raises(UserError, match=r"begun with other settings \(weights '"):
        draw(scaled(moved, "unet"), folder)


@pytest.mark.parametrize("scheduler", ["dpm++", "euler", "unipc"])
def test_other_samplers_draw_nothing_of_their_own(tmp_path, sd_model, scheduler):
    options = DrawOptions(images_per_prompt=1, steps=3, scheduler=scheduler, resolution=32)
    torch.manual_seed(0)
    draw(sd_model, tmp_path / "one", PROMPTS[:2], options)
    torch.manual_seed(1)
    draw(sd_model, tmp_path / "two", PROMPTS[:2], options)
    one, two = pixels(tmp_path / "one"), pixels(tmp_path / "two")
    assert one["00000-00.png"].shape == (32, 32, 3)
    assert all((one[name] == two[name]).all() for name in one)


def test_sdxl(tmp_path, sdxl_model):
    folder = draw(sdxl_model, tmp_path / "images").folder
    assert json.loads((folder / "manifest.json").read_text())["settings"]["guidance"] == 5.0
    draw(sdxl_model, tmp_path / "one", batch=1)
    assert_same_within_rounding(pixels(folder), pixels(tmp_path / "one"))


@pytest.mark.slow
def test_two_ranks(tmp_path, drawn, sd_model):
    """Half the images each, all of them those of one process; what one run left is kept by the next."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    folder = shutil.copytree(drawn, tmp_path / "images")
    for name in ("00000-00", "00000-01", "00002-01"):
        (folder / "images" / f"{name}.png").unlink()
    launcher = [LAUNCHER, "--num_gpus", "2", "--master_port", str(free_port()), "--quiet", ROOT / "launchers" / "generate.py"]
    arguments = ["--model", sd_model, "--prompts", prompts, "--images-per-prompt", "2", "--steps", "3", "--out", folder]
    run = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True, "timeout": 300}
    process = subprocess.run([*launcher, *arguments], **run)
    assert process.returncode == 0, process.stderr[-3000:]
    assert f"6 images: {folder}" in process.stdout
    require_whole(open_pictures(folder))
    assert_same_within_rounding(pixels(drawn), pixels(folder))

    alone = [sys.executable, ROOT / "launchers" / "generate.py", *arguments, "--steps", "4"]
    process = subprocess.run(alone, **run)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(f"error: --out {folder}: was begun with other settings (steps 3, now 4)")
    assert "Traceback" not in process.stderr
