"""A run knows its base by what it holds: wherever it lies, and whatever else comes to lie under its path."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from dde_ds import UserError, load_config
from dde_ds.cli import main
from dde_ds.data.shards import ShardSet
from dde_ds.training.resume import identity, require_same_run
from tests.support.bases import changed, copied, in_half, scaled, with_checker
from tests.support.launching import Outcome, Run, launch_many, rows, write_config


@pytest.fixture(scope="module")
def ended(tmp_path_factory, sd_model, sd_shards) -> tuple[Path, dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("bases")
    base = copied(sd_model, folder / "base")
    (folder / "link").symlink_to(base)
    scaled(copied(sd_model, folder / "other"), "unet")
    changed(copied(sd_model, folder / "v") / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    with_checker(sd_model, folder / "pickled", pickled=True)
    with_checker(sd_model, folder / "whole")
    in_half(sd_model, folder / "half")
    scaled(copied(sd_model, folder / "vae"), "vae")
    config = write_config(folder / "run.yaml", base, sd_shards, steps=1)
    resumed = {name: Run(config, [f"model.path={folder / name}", "steps=3"], "required") for name in ("other", "v", "vae")}
    runs = {
        "first": Run(config),
        "link": Run(config, [f"model.path={folder / 'link'}", "steps=2"], "required"),
        **resumed,
        **{
            name: Run(config, [f"model.path={folder / name}", f"output={folder / 'runs' / name}", *more])
            for name, more in (
                ("pickled", ()),
                ("whole", ()),
                ("half", ("samples.prompts=[a lighthouse]", "samples.inference_steps=2")),
            )
        },
    }
    outcomes = launch_many(list(runs.values()))
    return folder, dict(zip(runs, outcomes, strict=True))


def test_another_path_goes_on_and_another_base_does_not(ended):
    folder, outcomes = ended
    assert outcomes["first"].code == outcomes["link"].code == 0
    assert [row["step"] for row in rows(folder / "run")] == [1, 2]
    for name, said in (
        ("other", r"its UNet has other weights than the base that .*step-00000002 was trained from"),
        ("v", "its scheduler has another noise schedule or prediction type"),
        ("vae", "whose VAE or text encoders have other weights"),
    ):
        assert outcomes[name].code == 1
        for error in outcomes[name].errors:
            assert re.search(said, error)


def test_exports_of_real_bases(ended):
    folder, outcomes = ended
    assert [outcomes[name].code for name in ("pickled", "whole", "half")] == [0, 0, 0]
    exports = {name: folder / "runs" / name / "export" for name in ("pickled", "whole", "half")}
    assert "safety checker of the base is left out: its weights are a pickle" in outcomes["pickled"].stdout
    pipelines = {name: StableDiffusionPipeline.from_pretrained(path) for name, path in exports.items()}
    assert pipelines["pickled"].safety_checker is None
    assert not pipelines["pickled"].config.requires_safety_checker
    assert pipelines["pickled"].feature_extractor is not None
    assert pipelines["whole"].safety_checker is not None
    assert all((path.parent / "DONE").exists() for path in exports.values())
    assert list((exports["half"].parent / "samples").glob("*.png"))


def test_export_from_a_moved_base(ended, capsys):
    folder, _ = ended
    moved = folder / "moved"
    (folder / "base").rename(moved)
    try:
        arguments = ["export", str(folder / "run"), "--output", str(folder / "exported")]
        assert main(arguments) == 1
        assert "no model_index.json in it" in capsys.readouterr().err
        assert main([*arguments, "--model", str(folder / "other")]) == 1
        assert "its UNet has other weights than the base" in capsys.readouterr().err
        assert main([*arguments, "--model", str(folder / "vae")]) == 1
        assert "its VAE or text encoder has other weights than the base" in capsys.readouterr().err
        assert not (folder / "exported").exists()
        assert main([*arguments, "--model", str(moved)]) == 0
        exported, own = (
            UNet2DConditionModel.from_pretrained(path / "unet") for path in (folder / "exported", folder / "run" / "export")
        )
        for name, value in own.state_dict().items():
            assert value.equal(exported.state_dict()[name])
        assert main([*arguments, "--variant", "fp16"]) == 1
        assert "--variant: belongs to --model" in capsys.readouterr().err
    finally:
        moved.rename(folder / "base")


def test_validate_compares_with_the_checkpoint(ended, capsys):
    folder, _ = ended
    config = str(folder / "run.yaml")
    for arguments, code, said in (
        ([], 1, "holds a run already; go on with --resume"),
        (["--resume", "steps=3"], 0, "3 steps"),
        (["--resume", "steps=3", f"model.path={folder / 'link'}"], 0, "3 steps"),
        (["--resume", "steps=3", f"model.path={folder / 'other'}"], 1, "its UNet has other weights"),
        (["--resume", "steps=1"], 1, "steps is 1, but"),
        (["--resume", f"output={folder / 'none'}"], 1, "--resume found no checkpoint"),
    ):
        assert main(["validate", config, *arguments]) == code
        assert said in "".join(capsys.readouterr())


def test_checkpoints_of_earlier_versions_know_their_base_by_its_path(ended, sd_shards):
    folder, _ = ended
    run, shards = load_config(folder / "run.yaml", ["steps=3"]), ShardSet(sd_shards)
    state = json.loads((folder / "run" / "checkpoints" / "step-00000002" / "state.json").read_text())
    base = {key: state["identity"].pop(key) for key in ("model.weights", "model.encoders", "model.schedule")}
    # As the first run wrote it; the second named the link.
    state["identity"]["model.path"] = run.model.path
    require_same_run(run, shards, base, Path("step"), state)
    assert identity(run, shards, base).keys() >= {"model.weights", "model.encoders", "model.schedule", "model.path"}
    moved = load_config(folder / "run.yaml", ["steps=3", f"model.path={folder / 'link'}"])
    with pytest.raises(UserError, match=r"model\.path is"):
        require_same_run(moved, shards, base, Path("step"), state)
