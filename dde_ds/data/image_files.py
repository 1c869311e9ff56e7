"""Find the pictures of a table: in its cells, in a folder, in an archive, or below a URL.

A cell holds bytes, a record of bytes and path, text (a path or a URL), or a list, in which the first item counts. Paths must stay below
the root. The root is a folder, a ``.zip`` or uncompressed ``.tar`` file, or a URL.

Under a local root, a URL in a cell stands for the file with the URL's path, or else with its last name, below the root. Nothing is fetched
from a host that the root does not name.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dde_ds.data.folder import IMAGE_BYTES
from dde_ds.data.storage import filesystem, is_url
from dde_ds.errors import UserError
from dde_ds.untrusted import read_regular
from dde_ds.warn import reason

Find = Callable[[str], "bytes | None"]


class ImageFiles:
    """The pictures of a table, found by the content of its cells.

    Args:
        root: folder, archive or URL. Paths are relative to ``root`` and must stay below it. None stands for ``default``.
        default: folder of the table, or None for a table without a folder.
        follow_links: read pictures behind symbolic links that lead out of the folder.

    Raises:
        UserError: the root does not exist or is not a readable archive.
    """

    def __init__(self, root: str | Path | None, default: Path | None, follow_links: bool = False):
        self.root = None if root is None and default is None else str(root or default)
        self._given = root is not None
        self._find: Find = _nowhere
        if self.root is not None:
            self._find = _finder(self.root, follow_links)

    def read(self, cell: Any) -> bytes | None:
        """Return a picture's bytes, or None for a missing picture.

        Raises:
            UserError: a path leaves the root, a path or URL needs a root and none is given, or a remote root is not readable.
        """
        if isinstance(cell, list | tuple):
            cell = cell[0] if cell else None
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path") or cell.get("url")
        if cell is None or isinstance(cell, bytes):
            return cell or None
        if not isinstance(cell, str):
            return None
        return self._by_url(cell) if "://" in cell else self._find(cell) if cell else None

    def _by_url(self, url: str) -> bytes | None:
        if self.root is not None and "://" in self.root:
            inside = url.startswith(self.root.rstrip("/") + "/")
            return self._find(url.removeprefix(self.root.rstrip("/") + "/")) if inside else None
        if not self._given:
            raise UserError(f"input: its pictures are URLs ({url[:80]}); download them, and name their folder or archive as root")
        path = unquote(urlsplit(url).path).lstrip("/")
        return self._find(path) or self._find(posixpath.basename(path))


def _nowhere(name: str) -> bytes | None:
    raise UserError(f"input: its pictures are paths ({name[:80]}); name the folder or archive that they are in as root")


def _finder(root: str, follow_links: bool) -> Find:
    if is_url(root) and "://" in root:
        return _below_url(root)
    path = Path(root)
    if path.is_dir():
        return _below_folder(path, follow_links)
    if not path.is_file():
        raise UserError(f"root {root}: no such folder or archive")
    try:
        return _in_zip(path) if zipfile.is_zipfile(path) else _in_tar(path)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, ValueError) as error:
        hint = "expected a folder, a .zip or a .tar that is not compressed"
        raise UserError(f"root {root}: not readable as an archive: {reason(error)}; {hint}") from None


def _below_folder(folder: Path, follow_links: bool) -> Find:
    root, roots = folder.resolve(), (folder.resolve(), folder.absolute())

    def find(name: str) -> bytes | None:
        place = Path(os.path.normpath(root / name)) if "\0" not in name else None
        if place is None or not any(place.is_relative_to(one) for one in roots):
            raise UserError(f"input: {name!r} lies outside of {folder}; name the folder that paths may point into as root")
        if not follow_links and not place.resolve().is_relative_to(root):
            raise UserError(f"input: {name!r} lies behind a link that leads out of {folder}; follow_links follows it")
        try:
            return read_regular(place, IMAGE_BYTES)
        except (OSError, ValueError):  # The file does not exist, is not a regular file, or is larger than an image may be.
            return None

    return find


def _in_zip(path: Path) -> Find:
    opened = {os.getpid(): zipfile.ZipFile(path)}
    sizes = {info.filename: info.file_size for info in opened[os.getpid()].infolist()}

    def find(name: str) -> bytes | None:
        name = posixpath.normpath(name)
        if sizes.get(name, IMAGE_BYTES + 1) > IMAGE_BYTES:
            return None
        if os.getpid() not in opened:  # Open the file again after a fork, because both processes would share one file position.
            opened.clear()
            opened[os.getpid()] = zipfile.ZipFile(path)
        try:
            return opened[os.getpid()].read(name)
        # The member is damaged, encrypted, or compressed by an unsupported method.
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, ValueError):
            return None

    return find


def _in_tar(path: Path) -> Find:
    """Return a function that reads an archive's members. The archive is scanned once for their offsets, then read at any place."""
    file = path.open("rb")
    places: dict[str, tuple[int, int]] = {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if member.isreg() and not member.issparse() and 0 <= member.size <= IMAGE_BYTES:
                places[posixpath.normpath(member.name)] = (member.offset_data, member.size)

    def find(name: str) -> bytes | None:
        offset, size = places.get(posixpath.normpath(name), (0, 0))
        return os.pread(file.fileno(), size, offset) if size else None

    return find


def _below_url(url: str) -> Find:
    fs, root = filesystem(url, "root")

    def find(name: str) -> bytes | None:
        path = posixpath.normpath(name)
        if path.startswith(("../", "/")) or "://" in path:
            raise UserError(f"input: {name!r} lies outside of root {url}")
        try:
            return fs.cat_file(f"{root}/{path}", start=0, end=IMAGE_BYTES)
        except FileNotFoundError:
            return None
        except Exception as error:  # Every driver raises its own kinds of exceptions.
            raise UserError(f"root {url}: {name}: not readable: {type(error).__name__} {reason(error)}") from None

    return find
