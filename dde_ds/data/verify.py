"""Whether a set of shards is what its manifest says: checksums, then every pair and prompt as training would read them."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dde_ds.data.manifest import PROMPTS_PER_FILE
from dde_ds.data.shards import ShardSet
from dde_ds.errors import UserError
from dde_ds.files import sha256_of


@dataclass(frozen=True)
class Problem:
    file: str
    """Its name in the folder."""
    what: str


def verify(
    folder: str | Path, quick: bool = False, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Problem]:
    """Everything that is wrong with the shards of a local folder, a line for each damaged file.

    Args:
        quick: sizes, indexes and the tars' headers only; reads no pair.
        on_progress: called with files done and files in all.

    Raises:
        UserError: no manifest, or one that cannot be believed: nothing can be said of the shards then.
    """
    shards = ShardSet(folder, check_sizes=False)
    if shards.storage.is_remote:
        raise UserError(f"{folder}: only a local folder can be verified; every read of a remote one is checked as it is made")
    files = [*shards.manifest["prompts"]["files"], *shards.manifest["shards"]]
    problems = []
    for done, file in enumerate(files, 1):
        problem = _check(shards, file, quick)
        if problem:
            problems.append(problem)
        on_progress(done, len(files))
    return problems


def _check(shards: ShardSet, file: dict, quick: bool) -> Problem | None:
    tar, index = f"{file['name']}.tar", f"{file['name']}.json"
    for name, expected in ((index, file["index"]["bytes"]), (tar, file["bytes"])):
        size = shards.storage.size(name)
        if size != expected:
            return Problem(name, "is missing" if size is None else f"has {size} bytes, manifest.json says {expected}")
    try:
        members = shards.index(file)
    except UserError as error:
        return Problem(index, str(error))
    problem = _headers(shards.folder / tar, members[:, 0].tolist())
    if problem or quick:
        return problem and Problem(tar, problem)
    if sha256_of(shards.folder / tar) != file["sha256"]:
        problem = "sha256 differs from manifest.json"
    is_prompts = file["name"].startswith("prompts-")
    number = int(file["name"].removeprefix("prompts-")) if is_prompts else shards.manifest["shards"].index(file)
    for row in range(file["samples"]):
        try:
            if is_prompts:
                shards.prompt(number * PROMPTS_PER_FILE + row)
            else:
                shards.read(number, row)
                shards.describe(number, row)
        except UserError as error:
            return Problem(tar, str(error))
    return problem and Problem(tar, problem)


def _headers(path: Path, numbers: list[int]) -> str | None:
    """What is wrong with the names and types of a tar's members, without reading what they hold."""
    expected = [f"{number:09d}{suffix}" for number in numbers for suffix in (".json", ".safetensors")]
    try:
        with tarfile.open(path, "r:") as tar:  # no compression
            found = [member.name if member.isreg() else f"{member.name} (no plain file)" for member in tar]
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        return f"not readable as a tar: {error}"
    for name, own in zip(expected, found, strict=False):
        if name != own:
            return f"holds the member {own[:80]!r} where {name!r} should be"
    return None if len(found) == len(expected) else f"holds {len(found)} members, its index says {len(expected)}"
