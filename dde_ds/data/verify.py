"""Check that a set of shards is what its manifest says.

The check compares the checksums, then reads every pair and prompt as training would read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dde_ds.data.manifest import PROMPTS_PER_FILE
from dde_ds.data.shards import Index, ShardSet, member_names, member_size
from dde_ds.data.storage import DamagedData, LocalFolder
from dde_ds.errors import UserError
from dde_ds.files import sha256_of
from dde_ds.untrusted import open_regular


@dataclass(frozen=True)
class Problem:
    """A damaged file of a set of shards."""

    file: str
    """Name of the file in the folder."""
    what: str
    """Description of the damage."""


def verify(
    folder: str | Path, quick: bool = False, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Problem]:
    """Return everything that is wrong with the shards of a local folder, with one problem for each damaged file.

    Args:
        folder: the local folder.
        quick: check only sizes, indexes and the headers in the tars, and read no pair.
        on_progress: called with the number of files done and the number of all files.

    Raises:
        UserError: the manifest is missing or cannot be trusted, so that nothing can be said of the shards; or the
            folder is not local.
    """
    shards = ShardSet(folder, check_sizes=False, key="folder")
    storage = shards.storage
    if not isinstance(storage, LocalFolder):
        raise UserError(f"{folder}: only a local folder can be verified; every read of a remote one is checked as it is made")
    files = [*shards.manifest["prompts"]["files"], *shards.manifest["shards"]]
    problems = []
    for done, file in enumerate(files, 1):
        problem = _check(shards, storage, file, quick)
        if problem:
            problems.append(problem)
        on_progress(done, len(files))
    return problems


def _check(shards: ShardSet, storage: LocalFolder, file: dict, quick: bool) -> Problem | None:
    """Return what is wrong with one file of the manifest, or None."""
    tar, index = f"{file['name']}.tar", f"{file['name']}.json"
    for name, expected in ((index, file["index"]["bytes"]), (tar, file["bytes"])):
        size = storage.size(name)
        if size != expected:
            return Problem(
                name, "is missing, or no regular file" if size is None else f"has {size} bytes, manifest.json says {expected}"
            )
    try:
        members = shards.index(file)
    except UserError as error:
        return Problem(index, str(error))
    problem = _headers(storage.folder / tar, members)
    if problem or quick:
        return Problem(tar, problem) if problem else None
    if sha256_of(storage.folder / tar) != file["sha256"]:
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
    return Problem(tar, problem) if problem else None


def _headers(path: Path, index: Index) -> str | None:
    """Return what is wrong with the names, types and sizes of a tar's members, without reading their contents.

    ``tarfile`` is not used, because some of its versions loop for ever on a negative size.
    """
    end = 0
    try:
        with open_regular(path) as file:
            for number, offset, size in index.members.tolist():
                at, end = offset, offset + size
                for name in member_names(number):
                    file.seek(at)
                    at += 512 + -(-member_size(file.read(512), name, f"sample {number:09d}") // 512) * 512
                if at != end:
                    return f"sample {number:09d}: its members take {at - offset} bytes, its index says {size}"
            file.seek(end)
            while block := file.read(2**20):
                if block.count(0) < len(block):
                    return f"holds more than the {len(index.members)} samples of its index"
    except DamagedData as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"not readable: {error}"
    return None
