"""``dde-ds verify`` and ``tools/verify_shards.py``: check that shards are whole, and say how to make damaged ones again."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from dde_ds.data.columns import ROLES
from dde_ds.text import printable

DESCRIPTION = """Check shards: checksums, shapes, types, finite values, prompt references, names of members.

    dde-ds verify shards/sdxl            # reads every byte
    dde-ds verify shards/sdxl --quick    # sizes, indexes and tar headers only

Exit code 0 where everything is whole; 1 otherwise, after a line for each damaged file and how to make it again.
"""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("verify", help="check every byte of shards", description=DESCRIPTION)
    parser.set_defaults(act=verify_shards)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="read no pair: sizes, indexes and tar headers only")


def verify_shards(args: argparse.Namespace) -> int:
    """Print what is wrong with a folder of shards. Return 0 if nothing is, otherwise 1."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dde_ds.data.manifest import FORMAT
    from dde_ds.data.shards import ShardSet
    from dde_ds.data.verify import verify

    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TextColumn("files"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("checking", total=None)
        problems = verify(args.folder, args.quick, lambda done, total: progress.update(bar, completed=done, total=total))
    manifest = ShardSet(args.folder, check_sizes=False, key="folder").manifest
    shards, prompts = len(manifest["shards"]), len(manifest["prompts"]["files"])
    if not problems:
        print(f"{shards} shards and {prompts} prompts files are whole: {manifest['samples']} pairs")
        if manifest["format"] != FORMAT:
            print(f"{manifest['format']}: made by an earlier version; on reading, each pair is checked by CRC32, not by SHA-256")
        return 0
    for problem in problems:
        print(printable(f"{problem.file}: {problem.what}"))
    stems = sorted({Path(problem.file).stem for problem in problems})
    remove = ["rm", "-f", "--", *(str(args.folder / f"{stem}{suffix}") for stem in stems for suffix in (".tar", ".json"))]
    print(f"\n{len(stems)} of {shards + prompts} files are damaged. To make them again, and nothing else:")
    print(f"  {printable(shlex.join(remove))}")
    if manifest["format"] != FORMAT:
        print("  and, with the version that made them, since this one makes another format:")
    print(f"  {printable(remake(manifest['settings'], args.folder))}")
    return 1


def remake(settings: dict, folder: Path) -> str:
    """Return the command line that made the shards, as far as the manifest records it. Inputs are recorded by name only.

    A user pastes the command into a shell, and anybody may have written the manifest. So every word is quoted, and no name can be
    taken for an option.
    """
    try:
        names = [str(file["name"]) for file in settings["input"]]
        inputs = [f"./{name}" if name.startswith("-") else name for name in names[:2]] + ["…"] * (len(names) > 2)
        options = {
            "model": settings["model"],
            "output": folder,
            "resolution": settings["resolution"],
            "min-side": settings["min_side"],
            "pairs-per-shard": settings["pairs_per_shard"],
            "latents": settings["latents"],
            "vae-dtype": str(settings["vae_dtype"]).removeprefix("torch."),
            "text-dtype": str(settings["text_dtype"]).removeprefix("torch."),
        }
        reading = _reading_words(settings.get("reading", {}))
        if "background" in settings:  # manifests of earlier versions have none
            options["background"] = "#" + bytes(list(settings["background"])).hex()
    except (KeyError, TypeError, ValueError, AttributeError):
        return "dde-ds shard …  # the manifest does not say with which options"
    words = [
        "--input",
        *inputs,
        *(f"--{name}={value}" for name, value in options.items()),
        *reading,
        *(["--flip"] if settings["flip"] else []),
        *(["--keep-no-caption"] if settings.get("no_caption") == "kept" else []),
    ]
    return shlex.join(["dde-ds", "shard", *words])


def _reading_words(reading: dict) -> list[str]:
    """The options of a table's columns and of its labels. A file of labels is known by its name alone, as inputs are."""
    words = [f"--{name.replace('_', '-')}={reading[name]}" for name in ("pairs", "min_margin") if name in reading]
    if "columns" in reading:
        words += ["--columns", *(f"{role}={name}" for role, name in reading["columns"].items() if role in ROLES)]
    if "labels" in reading:
        words += [f"--labels={reading['labels']['name']}", f"--labels-as={reading['labels']['as']}"]
    return words
