"""The site of ``make docs`` is built without a warning, from the guides and the docstrings where they lie."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("myst_parser", reason="the extra docs is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        folder / "doctrees",
        "-c",
        "tools/docs",
        ".",
        folder / "html",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder / "html"


def test_every_key_of_the_configuration_is_there_with_its_text(site):
    page = (site / "tools/docs/configuration.html").read_text(encoding="utf-8")
    assert 'id="dde_ds.config.BatchConfig.pairs"' in page
    assert "Preference pairs of one optimizer step, over all ranks" in page
    assert ">Type:<" not in page, "a sentence before a colon was taken for a type"


def test_every_guide_is_a_page(site):
    guides = [
        path for room in ("dde_ds", "docker", "ds_configs", "launchers", "tools") for path in (ROOT / room).rglob("README.md")
    ]
    for guide in (ROOT / "README.md", ROOT / "BENCHMARKS.md", ROOT / "CHANGELOG.md", *guides):
        assert (site / guide.relative_to(ROOT).with_suffix(".html")).is_file(), guide


def test_the_public_names_are_documented(site):
    page = (site / "tools/docs/api.html").read_text(encoding="utf-8")
    import dde_ds

    shown = [
        name for name in dde_ds.__all__ if name not in ("__version__", "RunConfig")
    ]  # RunConfig is on the configuration's page
    assert [name for name in shown if f">{name}<" not in page] == []
