"""Make text from outside safe to show: no terminal codes, no passwords."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

# Cc: control characters, such as ESC. Cf: invisible marks that change the direction of text. Cs: half a surrogate pair.
# Zl, Zp: line ends.
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# These characters join emoji and the letters of several scripts. By themselves they show nothing.
_HARMLESS = {"\u200d", "\u200c"}
# scheme://user:secret@host; or scheme:/user:secret@host, which a URL becomes that was taken for a path. The secret may
# hold an @. It may also hold a slash, unless the text before the slash could be a port.
_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}:/{1,2}[^\s/:@]*):(?:[^\s/]*|(?!\d*/)\S*)@", re.IGNORECASE)
# ?token=…, &X-Amz-Signature=…, &sig=… in signed URLs.
_SIGNED = re.compile(
    r"([?&][\w.-]{0,40}(?:token|signature|secret|password|passwd|credential|api[_-]?key|accesskeyid|sig|key)=)[^\s&#'\"]+",
    re.IGNORECASE,
)


def printable(text: str) -> str:
    """Return ``text`` with control characters, direction marks and half surrogate pairs written as escapes such as
    ``\\x1b``.

    So the name of a file or a caption cannot move the cursor, recolour a terminal or split a line of a log.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(char) if unicodedata.category(char) in _UNSAFE and char not in _HARMLESS else char for char in text)


def verbatim(text: str) -> Text:
    """Return ``text`` for rich to show letter by letter.

    It is :func:`printable`, and markup and names of emoji have no meaning in it.
    """
    from rich.text import Text

    return Text(printable(text))


def without_passwords(text: str) -> str:
    """Return ``text`` with the secrets of every URL struck out: ``http://user:***@host``,
    ``https://host/file?token=***``.
    """
    return _SIGNED.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))


def encodable(text: str) -> str:
    """Return ``text`` with half surrogate pairs written as escapes: the name of a file need not be UTF-8, what is written of it must."""
    return text.encode(errors="backslashreplace").decode()


def half_surrogate(text: str) -> bool:
    """Return whether ``text`` holds half of a surrogate pair, which no file or terminal accepts."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
