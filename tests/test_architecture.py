"""The floors of the house, read from the imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dde_ds"

# Every room may import these, which import nothing but one another.
GROUND = {"errors", "text", "untrusted", "warn", "strict_yaml", "shape", "shipped", "user_file"}
# A room may import from itself, from the ground, and from those listed.
FLOORS = {
    "text": set(),
    "errors": set(),
    "untrusted": set(),
    "warn": set(),
    "strict_yaml": set(),
    "shape": set(),
    "shipped": set(),
    "user_file": set(),
    "files": set(),
    "rows": {"files"},
    "config": set(),
    "distributed": set(),
    "objective": set(),
    "models": {"files"},
    "data": {"files", "models"},
    "engine": {"", "files", "config", "distributed", "models", "objective"},
    "planning": {"config", "data", "models", "objective", "engine"},
    "evaluation": {"", "files", "rows", "config", "distributed", "data", "models", "objective"},
    "report": {"", "files", "rows", "config", "models", "objective", "evaluation"},
    "training": {"", "files", "rows", "config", "distributed", "data", "models", "objective", "engine", "planning", "evaluation"},
    "doctor": {"config", "distributed", "data", "models", "engine", "planning"},
    "push": {"", "config", "models", "engine", "evaluation", "report"},
    "demo": {"rows", "config", "distributed", "data", "models", "objective", "evaluation", "report", "training"},
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


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_options_stand_in_the_command_line_alone(path):
    """Other code names its arguments, and cli/parsing.py says how these are typed. The demo starts commands, as a user does."""
    if path.relative_to(PACKAGE).parts[0] in ("cli", "demo"):
        return
    texts = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert not [f"{path}:{node.lineno}: {node.value}" for node in texts if re.match("--[a-z]", node.value)]


# Words by which code would tell one model family from another.
OF_A_FAMILY = (
    *("sdxl", "StableDiffusion", "stable-diffusion", "stable_diffusion", "sd_v1", "sd_v2", "text_encoder_2", "tokenizer_2"),
    *("cond_stage_model", "conditioner.embedders", "addition_embed_type", "time_ids", "pooled"),
)
# Public models by name, the tensors that a batch may hold, and what is no knowledge of a family: a layer and a module of diffusers'.
MAY_NAME_THEM = {
    "models/family.py": OF_A_FAMILY,
    "models/known.py": ("sdxl", "stable-diffusion"),
    "training/batches.py": ("time_ids", "pooled"),
    "evaluation/inception.py": ("pooled",),
    "models/parts.py": ("stable_diffusion",),
}


def words_of(path: Path) -> list[tuple[int, str]]:
    """(line, name or text) of all code in a file: comments and docstrings, which may give examples, are left out."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    # What a command says of itself gives examples too.
    prose |= {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DESCRIPTION"
    }
    words = []
    for node in ast.walk(tree):
        if id(node) not in prose:
            values = [value for _, value in ast.iter_fields(node)]
            words += [(getattr(node, "lineno", 0), value) for value in values if isinstance(value, str)]
    return words


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_file_knows_the_model_families(path):
    allowed = MAY_NAME_THEM.get(path.relative_to(PACKAGE).as_posix(), ())
    found = [
        f"{path}:{line}: {text[:80]!r}; ask models/family.py"
        for line, text in words_of(path)
        if (text in ("sd", "sd2") and not allowed) or any(word in text for word in OF_A_FAMILY if word not in allowed)
    ]
    assert not found


def test_importing_the_package_pulls_in_no_torch():
    code = "import sys, dde_ds; assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules; print(dde_ds.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    import dde_ds

    assert all(getattr(dde_ds, name) is not None for name in dde_ds.__all__)
    with pytest.raises(AttributeError):
        dde_ds.nothing_of_the_kind  # noqa: B018
