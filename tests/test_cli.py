from __future__ import annotations

from dde_ds.cli import main
from tests.launching import write_config


def test_validate(tmp_path, sd_model, sd_shards, capsys):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    assert main(["validate", str(config), "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert "dde, ZeRO-2, fp32, latents 4x8x8" in out
    assert "8 pairs a step = 2 ranks x 2 micro-batches of 2" in out
    assert "4 steps = 32 pairs = 1.60 epochs of 20" in out
    assert not (tmp_path / "run").exists()


def test_validate_finds_what_would_stop_a_run(tmp_path, sd_model, sd_shards, sdxl_shards, capsys):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards)
    for override, named in (
        (f"data.path={sdxl_shards}", "was made for 'sdxl' models"),
        ("batch.micro=3", "not a multiple of 2 ranks"),
    ):
        assert main(["validate", str(config), override, "--ranks", "2"]) == 1
        assert named in capsys.readouterr().err
