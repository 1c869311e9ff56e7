"""Check shards: checksums, shapes, types, finite values, prompt references, names of members.

    python tools/verify_shards.py shards/sdxl            # reads every byte
    python tools/verify_shards.py shards/sdxl --quick    # sizes, indexes and tar headers only

Exit code 0 where everything is whole; 1 otherwise, after a line for each damaged file and how to make it again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dde_ds.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="read no pair: sizes, indexes and tar headers only")
    args = parser.parse_args()
    from dde_ds.data.shards import ShardSet
    from dde_ds.data.verify import verify

    try:
        columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TextColumn("files"), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("checking", total=None)
            problems = verify(args.folder, args.quick, lambda done, total: progress.update(bar, completed=done, total=total))
        manifest = ShardSet(args.folder, check_sizes=False).manifest
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shards, prompts = len(manifest["shards"]), len(manifest["prompts"]["files"])
    if not problems:
        print(f"{shards} shards and {prompts} prompts files are whole: {manifest['samples']} pairs")
        return 0
    for problem in problems:
        print(f"{problem.file}: {problem.what}")
    stems = sorted({Path(problem.file).stem for problem in problems})
    remove = " ".join(shlex.quote(str(args.folder / f"{stem}{suffix}")) for stem in stems for suffix in (".tar", ".json"))
    print(f"\n{len(stems)} of {shards + prompts} files are damaged. To make them again, and nothing else:")
    print(f"  rm -f {remove}")
    print(f"  {remake(manifest['settings'], args.folder)}")
    return 1


def remake(settings: dict, folder: Path) -> str:
    """The command line that made the shards, as far as the manifest knows it: inputs are there by name only."""
    options = {
        "--input": " ".join(shlex.quote(file["name"]) for file in settings["input"][:2])
        + (" …" if len(settings["input"]) > 2 else ""),
        "--model": shlex.quote(settings["model"]),
        "--output": shlex.quote(str(folder)),
        "--resolution": json.dumps(settings["resolution"]),
        "--min-side": json.dumps(settings["min_side"]),
        "--pairs-per-shard": json.dumps(settings["pairs_per_shard"]),
        "--latents": settings["latents"],
        "--vae-dtype": settings["vae_dtype"].removeprefix("torch."),
        "--text-dtype": settings["text_dtype"].removeprefix("torch."),
    }
    return "python tools/shard_pickapic.py " + " ".join(f"{k} {v}" for k, v in options.items()) + " --flip" * settings["flip"]


if __name__ == "__main__":
    sys.exit(main())
