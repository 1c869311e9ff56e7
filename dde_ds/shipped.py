"""Find files that come with the project from any working directory, in a checkout or with the installed wheel."""

from __future__ import annotations

import re
from pathlib import Path

from dde_ds.errors import UserError, nearest

_PACKAGE = Path(__file__).parent
# The keys are folders inside the package, where setup.py puts the files in the wheel. The values are their folders in a
# checkout.
_PLACES = {"ds_configs": "ds_configs", "recipes": "launchers/recipes", "demo_files": "launchers/demo"}


def deepspeed_file(name: str | Path) -> Path:
    """Return the path of the DeepSpeed configuration that ``name`` means.

    An existing file is returned as it is. Otherwise ``ds_configs/zero2.json``, ``zero2.json`` and ``zero2`` all mean a
    shipped configuration. Any other name is returned unchanged.
    """
    shipped = re.fullmatch(r"(?:ds_configs/)?(\w+)(?:\.json)?", str(name))
    if shipped and not Path(name).is_file():
        file = _folder("ds_configs") / f"{shipped[1]}.json"
        if file.is_file():
            return file
    return Path(name)


def deepspeed_names() -> list[str]:
    """Return the names of the shipped DeepSpeed configurations, such as ``zero2``."""
    return _names("ds_configs", ".json")


def recipe_file(name: str) -> Path:
    """Return the path of the recipe ``name``, such as ``sdxl_dde``, with or without ``.yaml``.

    Raises:
        UserError: no recipe has this name.
    """
    stem, known = name.removesuffix(".yaml"), recipe_names()
    if stem not in known:
        raise UserError(f"recipe {name}: not known{nearest(stem, known)}")
    return _folder("recipes") / f"{stem}.yaml"


def recipe_names() -> list[str]:
    """Return the names of the recipes, such as ``sdxl_dde``."""
    return _names("recipes", ".yaml")


def demo_file(name: str) -> Path:
    """Return the path of one of the demo's files.

    Args:
        name: ``base``, ``pairs/train.parquet``, ``pairs/held_out.parquet`` or ``train.yaml``.
    """
    return _folder("demo_files") / name


def _folder(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / _PLACES[name]


def _names(folder: str, suffix: str) -> list[str]:
    return sorted(path.stem for path in _folder(folder).glob(f"*{suffix}"))
