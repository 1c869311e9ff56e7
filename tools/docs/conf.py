"""Sphinx configuration of ``make docs``. The site holds the guides, in their own folders, and the docstrings of configuration and API."""

from __future__ import annotations

from pathlib import Path

import dde_ds

project, author, release = "dde_ds", "The dde_ds contributors", dde_ds.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
include_patterns = [
    "*.md",
    "dde_ds/README.md",
    "dde_ds/**/README.md",
    "ds_configs/README.md",
    "launchers/README.md",
    "launchers/**/README.md",
    "tests/README.md",
    "tools/README.md",
]
include_patterns += ["docker/README.md", "tools/docs/*.md"]
root_doc = "tools/docs/index"
html_theme = "furo"
html_title = f"dde_ds {release}"
myst_heading_anchors = 3  # With anchors, links such as README.md#section lead to the heading, as on GitHub.
autodoc_member_order = "bysource"
napoleon_google_docstring = True
# The tests check links to sources and pictures that are not pages of the site. So Sphinx need not warn about them.
suppress_warnings = ["myst.xref_missing", "misc.highlighting_failure"]


FIELDS: dict[str, list[str]] = {}


def setup(app) -> None:
    # Save a field's docstring before napoleon runs and restore it afterwards. Napoleon would take the text before the first colon for a type.
    app.connect("autodoc-process-docstring", keep_field, priority=400)
    app.connect("autodoc-process-docstring", restore_field, priority=600)
    app.connect("build-finished", write_entrance)


def keep_field(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    if what in ("attribute", "data"):
        FIELDS[name] = list(lines)


def restore_field(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    if what in ("attribute", "data"):
        lines[:] = FIELDS[name]


def write_entrance(app, error: Exception | None) -> None:
    """Write ``index.html``, which redirects to the site's first page."""
    if not error:
        target = '<!doctype html><meta http-equiv="refresh" content="0; url=tools/docs/index.html">'
        (Path(app.outdir) / "index.html").write_text(target, encoding="utf-8")
