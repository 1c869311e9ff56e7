"""Execute a Python file of the user's own, named as ``FILE.py:NAME``: a scorer, for example.

This is the only place where the project executes a file that it was given. It does so only for a file that the user names.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import re
import sys
import traceback
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from dde_ds.errors import UserError, nearest
from dde_ds.untrusted import read_regular
from dde_ds.warn import reason

LONGEST = 2**20
"""Upper limit of bytes of such a file."""


def split_name(text: str) -> tuple[Path, str] | None:
    """Return file and name of ``FILE.py:NAME``, or None for any other text."""
    found = re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)", text, re.DOTALL)
    return (Path(found[1]).expanduser(), found[2]) if found else None


def load_name(path: Path, name: str, key: str) -> tuple[Any, str]:
    """Return what the file calls ``name``, and the SHA-256 of the bytes that were executed. The same bytes are executed once.

    Args:
        key: names the option in error messages.

    Raises:
        UserError: the file cannot be read, fails when it is executed, or has no such name.
    """
    try:
        data = read_regular(path, LONGEST)
    except (OSError, ValueError) as error:
        raise UserError(f"{key} {path}: {reason(error).lower()}") from None
    try:
        module = _executed(str(path.absolute()), data)
    except Exception as error:  # the file may raise anything
        raise UserError(f"{key} {path}: could not be executed: {words(error, path)}") from error
    if not hasattr(module, name):
        raise UserError(f"{key} {path}: has no {name!r}{nearest(name, [each for each in vars(module) if each[0] != '_'])}")
    return getattr(module, name), hashlib.sha256(data).hexdigest()


def words(error: Exception, path: Path) -> str:
    """Return an error of a user's file in one line, with the last line of that file that led to it."""
    own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path.absolute())]
    line = error.lineno if isinstance(error, SyntaxError) else own[-1] if own else None
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}: {text}"


class _Bytes(importlib.abc.SourceLoader):
    """Load a module from bytes that were read already, so that the digest is that of the executed code. No ``.pyc`` is read or written."""

    def __init__(self, path: str, data: bytes):
        self._path, self._data = path, data

    def get_data(self, path: str) -> bytes:
        return self._data

    def get_filename(self, fullname: str) -> str:
        return self._path


@lru_cache(maxsize=64)
def _executed(path: str, data: bytes) -> ModuleType:
    name = f"_user_file_{hashlib.sha256(path.encode() + data).hexdigest()[:16]}"
    spec = importlib.util.spec_from_loader(name, _Bytes(path, data), origin=path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
