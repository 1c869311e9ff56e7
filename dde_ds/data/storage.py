"""Read shards where they lie: in a local folder, or in any object store or web server that fsspec reaches.

Both are read by ranges, and every range is checked before it is returned. Data that cannot be read raises an error.
Data that can be read, but differs from what was written, raises :class:`DamagedData`.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dde_ds.data.cache import Cache
from dde_ds.errors import UserError
from dde_ds.untrusted import open_regular, read_regular
from dde_ds.warn import reason

# `pipe:` and `::` chains are not allowed: a path in a configuration may only read bytes.
SCHEMES = ("http", "https", "s3", "gs", "gcs", "hf", "az", "abfs")
# Number of files that a process keeps open.
OPEN_FILES = 64
WHOLE_BYTES = 32 * 2**20
"""Limit of a file that is read whole without knowing its size, such as ``manifest.json``.

The manifest of 50,000 shards takes 14 MB.
"""
# Status codes of a web server that another attempt would not change.
FINAL_STATUS = frozenset(range(400, 500)) - {408, 425, 429}


class DamagedData(UserError):
    """Bytes are missing, or differ from those that were written.

    Every reader meets the same damage, so the sample may be counted and replaced.
    """


class LocalFolder:
    """Files of a local folder.

    File handles belong to the process that opened them. Loader workers are forked with the handles of their parent, so
    each process opens its own.
    """

    is_remote = False

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.counters: dict[str, int] = {"bytes": 0, "cache_hits": 0, "cache_misses": 0}
        self._owner, self._open = os.getpid(), OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}

    def where(self, name: str) -> str:
        """Return the name of a file for messages."""
        return str(self.folder / name)

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None if there is no regular file of this name."""
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def fetch(self, name: str, offset: int, length: int | None, is_whole: Callable[[bytes], bool], key: str | None = None) -> bytes:
        """Return ``length`` bytes from ``offset`` on, after checking them.

        Args:
            name: name of the file in the folder.
            offset: first byte.
            length: number of bytes; None reads the whole file, at most ``WHOLE_BYTES``.
            is_whole: must return True for the bytes.
            key: unused here; see :meth:`RemoteFolder.fetch`.

        Raises:
            DamagedData: the file is missing, not a regular file, too short or too long, or its bytes fail the check.
                The message does not name the file, because the caller knows what it was reading.
            UserError: the file cannot be read.
        """
        try:
            data = self._read(name, offset, length)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise DamagedData("the file is missing") from None
        except OSError as error:
            raise UserError(f"{self.where(name)}: not readable: {reason(error)}") from None
        except ValueError as error:  # a pipe or a device, or too large to be read whole
            raise DamagedData(str(error)) from None
        if (length is not None and len(data) != length) or not is_whole(data):
            raise DamagedData("checksum differs, the file was damaged")
        self.counters["bytes"] += len(data)
        return data

    def prefetch(self, name: str, offset: int, length: int) -> None:
        """Tell the kernel that a range will be fetched soon. Never fails: :meth:`fetch` will raise what is wrong."""
        with contextlib.suppress(OSError, ValueError, AttributeError):  # macOS has no posix_fadvise
            os.posix_fadvise(self._handle(name), offset, length, os.POSIX_FADV_WILLNEED)

    def _read(self, name: str, offset: int, length: int | None) -> bytes:
        if length is None:
            return read_regular(self.folder / name, WHOLE_BYTES)
        handle = self._handle(name)
        # Allocate no more memory than the file has bytes: the length comes from an index that anybody may have written.
        return os.pread(handle, max(0, min(length, os.fstat(handle).st_size - offset)), offset)

    def _handle(self, name: str) -> int:
        if self._owner != os.getpid():
            self._owner, self._open = os.getpid(), OrderedDict()
        if name not in self._open:
            self._open[name] = open_regular(self.folder / name)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name].fileno()


class RemoteFolder:
    """Objects below a URL, read by ranges through fsspec, with bounded retries and an optional local cache.

    Args:
        url: ``s3://bucket/shards``, ``https://host/shards``, ``hf://datasets/owner/name/shards`` …. The driver looks
            for credentials in its usual places (environment, configuration files); none are given here.
        cache: keeps fetched ranges; None keeps none.
        timeout: seconds that one attempt may take.
        attempts: number of attempts at a range before it is an error.
        first_delay: seconds before the second attempt. The delay doubles before each further attempt, and is lengthened
            by a random part of up to a half.
        key: the name of the URL in messages.

    Raises:
        UserError: as :func:`filesystem` raises.
    """

    is_remote = True

    def __init__(
        self,
        url: str,
        cache: Cache | None = None,
        timeout: float = 60.0,
        attempts: int = 5,
        first_delay: float = 0.5,
        key: str = "data.path",
    ):
        self.url, self.key = url.rstrip("/"), key
        self.cache, self.timeout, self.attempts, self.first_delay = cache, timeout, attempts, first_delay
        self.counters: dict[str, int] = {"bytes": 0, "cache_hits": 0, "cache_misses": 0}
        self._owner, self._fs = os.getpid(), None
        self._filesystem()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fs": None}

    def where(self, name: str) -> str:
        """Return the name of an object for messages."""
        return f"{self.url}/{name}"

    def fetch(self, name: str, offset: int, length: int | None, is_whole: Callable[[bytes], bool], key: str | None = None) -> bytes:
        """Return bytes of an object after checking them, as :meth:`LocalFolder.fetch` does.

        Args:
            name, offset, length, is_whole: as :meth:`LocalFolder.fetch` takes them.
            key: a digest of what is asked for. With it, the range is looked for in the cache and kept there.

        Raises:
            DamagedData: the object is missing or too large, or its bytes fail the check at the last attempt.
            UserError: the object cannot be read.
        """
        if self.cache and key:
            data = self.cache.get(key)
            if data is not None and (length is None or len(data) == length) and is_whole(data):
                self.counters["cache_hits"] += 1
                return data
            self.counters["cache_misses"] += 1
        problem, damaged = "", False
        for attempt in range(self.attempts):
            if attempt:
                # The delay is not drawn from the generators of the training. It differs between ranks, which would
                # otherwise all return at once.
                time.sleep(self.first_delay * 2 ** (attempt - 1) * random.Random().uniform(1, 1.5))
            try:
                data = self._get(name, offset, length)
            except FileNotFoundError:
                raise DamagedData("the file is missing") from None
            except Exception as error:  # every driver raises its own exceptions
                problem = f"{type(error).__name__}: {_without_user(self.url, ' '.join(str(error).split()))[:300]}".rstrip(": ")
                damaged = False
                if isinstance(error, (PermissionError, ImportError)) or getattr(error, "status", None) in FINAL_STATUS:
                    raise UserError(f"{self.where(name)}: not readable: {problem}") from None
                continue
            self.counters["bytes"] += len(data)
            if length is None and len(data) > WHOLE_BYTES:
                raise DamagedData(f"larger than {WHOLE_BYTES:,} bytes")
            other = length is not None and len(data) != length
            if not other and is_whole(data):
                if self.cache and key:
                    self.cache.put(key, data)
                return data
            came = "more" if length is not None and len(data) > length else len(data)
            problem = f"{came} bytes came for {length} asked" if other else "checksum differs, the file was damaged"
            damaged = True
        if damaged:
            raise DamagedData(f"{problem} ({self.attempts} attempts)")
        raise UserError(f"{self.where(name)}: not readable after {self.attempts} attempts: {problem}")

    def _get(self, name: str, offset: int, length: int | None) -> bytes:
        fs = self._filesystem()
        # Whole files are read by a range too, one byte longer than allowed. So the driver never loads more than memory
        # is meant for.
        start, end = offset, offset + (WHOLE_BYTES + 1 if length is None else length)
        path = f"{self._root}/{name}"
        if getattr(fs, "async_impl", False):
            from fsspec.asyn import sync  # it returns what the coroutine returns, unlike its hints

            if "http" in fs.protocol:
                return sync(fs.loop, _http_range, fs, path, start, end, timeout=self.timeout)  # pyright: ignore[reportReturnType]
            return sync(fs.loop, fs._cat_file, path, start=start, end=end, timeout=self.timeout)  # pyright: ignore[reportReturnType]
        return fs.cat_file(path, start=start, end=end)

    def _filesystem(self) -> Any:
        """Return this process's driver. Its threads and connections do not survive a fork."""
        if self._fs is None or self._owner != os.getpid():
            self._fs, self._root = filesystem(self.url, self.key)
            self._owner = os.getpid()
        return self._fs


def _without_user(url: str, text: str) -> str:
    """Return a driver's message about ``url`` without the user and password in the URL.

    A driver may show them outside of a URL, where :func:`dde_ds.text.without_passwords` would not recognise them.
    """
    user = url.partition("://")[2].partition("/")[0].rpartition("@")[0]
    return text.replace(user, "***") if ":" in user else text


async def _http_range(fs: Any, url: str, start: int, end: int) -> bytes:
    """Return the bytes [start, end), as fsspec's own ``_cat_file`` does, or one byte more if the server sends more.

    Reading stops there, so that a server cannot fill the memory.
    """
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), headers={"Range": f"bytes={start}-{end - 1}"}) as answer:
        fs._raise_not_found_for_status(answer, url)
        if (encoding := answer.headers.get("Content-Encoding", "identity")) != "identity":
            raise ValueError(f"the server sends it compressed ({encoding[:20]}) though asked not to")
        data = bytearray()
        async for chunk in answer.content.iter_any():
            data += chunk
            if len(data) > end - start:
                break
        return bytes(data[: end - start + 1])


def filesystem(url: str, key: str = "data.path") -> tuple[Any, str]:
    """Return a new fsspec file system for an allowed URL, and the path in it.

    Args:
        url: the URL of a folder.
        key: the name of the URL in messages.

    Raises:
        UserError: the scheme is not allowed, its driver is not installed, or the URL has a ``?`` or ``#``.
    """
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES or "::" in url:
        raise UserError(f"{key} {url}: expected a folder or a URL of {', '.join(f'{s}://' for s in SCHEMES)}")
    if "?" in url or "#" in url:
        raise UserError(f"{key} {url}: expected the URL of a folder, without ? or #")
    try:
        from fsspec.core import url_to_fs

        # A compressed answer may unpack to any size. Besides, a range of compressed data is not the range that was
        # asked for.
        plain = {"auto_decompress": False, "headers": {"Accept-Encoding": "identity"}}
        options = {"client_kwargs": plain} if scheme in ("http", "https") else {}
        fs, root = url_to_fs(url, skip_instance_cache=True, **options)
        return fs, root.rstrip("/")
    except ImportError as error:
        raise UserError(f"{key} {url}: {error}; `pip install -e '.[remote]'` has drivers for http and s3") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{key} {url}: {' '.join(str(error).split())}") from None


def is_url(path: str) -> bool:
    """Return whether ``path`` names something other than a local file. ``pipe:ls`` does too."""
    head = str(path).split("/", 1)[0]
    return ":" in head and not Path(path).exists()


def open_storage(
    path: str | Path, cache: Cache | None = None, timeout: float = 60.0, key: str = "data.path"
) -> LocalFolder | RemoteFolder:
    """Return the folder at a path or URL.

    Args:
        path: a local folder, ``file://…`` or a URL.
        cache: keeps ranges of remote files; None keeps none.
        timeout: seconds that one attempt at a remote range may take.
        key: the name of the path in messages.

    Raises:
        UserError: as :func:`filesystem` raises.
    """
    path = str(path).removeprefix("file://")
    return RemoteFolder(path, cache, timeout, key=key) if is_url(path) else LocalFolder(path)
