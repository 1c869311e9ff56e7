"""``dde-ds recipe``: list the recipes that come with the package, or print one."""

from __future__ import annotations

import argparse
from typing import Any

from dde_ds.shipped import recipe_file, recipe_names

DESCRIPTION = """List the recipes, or write one, to be changed where its comments say so.

    dde-ds recipe
    dde-ds recipe sdxl_dde > run.yaml
"""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "recipe", help="list the recipes, or write one: dde-ds recipe NAME > run.yaml", description=DESCRIPTION
    )
    parser.set_defaults(act=show_recipes)
    parser.add_argument("name", nargs="?", help="of the recipe to write; default: list all")


def show_recipes(args: argparse.Namespace) -> None:
    """Print the named recipe unchanged. Without a name, list all recipes, each with its first line."""
    if args.name:
        print(recipe_file(args.name).read_text(encoding="utf-8"), end="")
        return
    names = recipe_names()
    for name in names:
        title = recipe_file(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        print(f"{name:{max(map(len, names))}}  {title}")
