"""The exception for what a user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from dde_ds.text import printable, without_passwords


class UserError(ValueError):
    """Bad input. The message is one line that names the key or file, the value, and what would be right.

    Command lines print it after ``error:`` and exit with code 1. Any other exception is a bug and keeps its traceback.
    Terminal codes from a file's name or contents are escaped, and passwords in URLs are struck out.
    """

    def __init__(self, message: str):
        super().__init__(without_passwords(printable(str(message))))


class RankError(UserError):
    """Bad input that the other ranks may not have met, such as one damaged sample. The rank that meets it reports it."""


class OtherRankError(UserError):
    """Another rank met an error and reports it itself. This rank only has to end."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the known name closest to ``name``.

    If none is close, return the list of known names.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
