"""The floors of the house, read from the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dde_ds"

# Every room may import these, which import nothing but one another.
GROUND = {"errors", "text", "untrusted", "warn", "strict_yaml", "shipped"}
# A room may import from itself, from the ground, and from those listed.
FLOORS = {
    "text": set(),
    "errors": set(),
    "untrusted": set(),
    "warn": set(),
    "strict_yaml": set(),
    "shipped": set(),
    "files": set(),
    "rows": {"files"},
    "config": {"errors"},
    "ranks": {"errors"},
    "distributed": {"errors", "ranks"},
    "objective": {"errors"},
    "models": {"errors", "files"},
    "data": {"errors", "files", "models"},
    "engine": {"", "errors", "files", "config", "distributed", "models", "objective"},
    "evaluation": {"", "errors", "files", "rows", "config", "distributed", "data", "models", "objective"},
    "training": {
        "",
        "ranks",
        "errors",
        "files",
        "rows",
        "config",
        "distributed",
        "data",
        "models",
        "objective",
        "engine",
        "evaluation",
    },
    "doctor": {"errors", "config", "ranks", "distributed", "data", "models", "engine"},
    "planner": {"errors", "config", "data", "models", "engine", "training"},
    "push": {"", "errors", "config", "models", "engine", "evaluation"},
    "demo": {"errors", "rows", "config", "data", "models", "objective", "evaluation", "training"},
    "cli": None,
}
# `distributed` joins the process group, which DeepSpeed must do.
IMPORT_DEEPSPEED = {"engine", "distributed"}


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "dde_ds" else [node.module or ""]
        found |= {name for name in names if name.partition(".")[0] in ("dde_ds", "deepspeed")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lower_floors_never_import_upper_ones(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__" or FLOORS[room] is None:
        return
    for name in rooms_imported(path):
        top, _, rest = name.partition(".")
        if top == "deepspeed":
            assert room in IMPORT_DEEPSPEED, f"{path} imports {name}"
        else:
            target = rest.partition(".")[0]
            allowed = FLOORS[room] | GROUND | {room}
            assert target in allowed or (target.startswith("__") and "" in allowed), f"{path} imports {name}"


def test_importing_the_package_pulls_in_no_torch():
    code = "import sys, dde_ds; assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules; print(dde_ds.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    import dde_ds

    assert all(getattr(dde_ds, name) is not None for name in dde_ds.__all__)
    with pytest.raises(AttributeError):
        dde_ds.nothing_of_the_kind  # noqa: B018
