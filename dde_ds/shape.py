"""Check that JSON has the shape that its reader expects. Anybody may have written the JSON.

After this check, the reader need not check at every step.
"""

from __future__ import annotations

from typing import Any

NUMBER = "a finite number"
"""A number below 1e100 in size, so that sums and distances are finite too."""
COUNT = "a whole number from 0"
"""A count below 2^53, so that a float holds it exactly."""


def require_shape(value: Any, shape: Any, where: str = "") -> None:
    """Refuse a value that does not have the shape.

    Args:
            shape: one of these. ``str``, ``bool``, :data:`NUMBER` and :data:`COUNT` are for single values, and ``object`` is for any value.
            ``[shape]`` is for a list of any length. ``(shape,)`` is for an object with any keys, if all its values have the shape.
            ``{key: shape, …}`` is for an object that must have these keys and may have others.
        where: the place of the value, for the message.

    Raises:
        ValueError: the value has another shape. The message is one line: the place, such as ``results[0].beats.rate``, and the
            value there.
    """
    if isinstance(shape, dict):
        _require(isinstance(value, dict), value, "an object", where)
        for key, inner in shape.items():
            _require(key in value, value, f"an object with {key!r}", where)
            require_shape(value[key], inner, f"{where}.{key}".lstrip("."))
    elif isinstance(shape, tuple):
        _require(isinstance(value, dict), value, "an object", where)
        for key, inner in value.items():
            require_shape(inner, shape[0], f"{where}[{key[:40]!r}]")
    elif isinstance(shape, list):
        _require(isinstance(value, list), value, "a list", where)
        for number, inner in enumerate(value):
            require_shape(inner, shape[0], f"{where}[{number}]")
    elif shape is str:
        _require(isinstance(value, str), value, "text", where)
    elif shape is bool:
        _require(isinstance(value, bool), value, "true or false", where)
    elif shape == COUNT:
        _require(type(value) is int and 0 <= value < 2**53, value, COUNT, where)
    elif shape is not object:
        _require(type(value) in (int, float) and abs(value) < 1e100, value, NUMBER, where)


def _require(holds: bool, value: Any, expected: str, where: str) -> None:
    if not holds:
        raise ValueError(f"{where or 'it'} is {described(value)}, expected {expected}")


def described(value: Any) -> str:
    """Return a value of JSON in JSON's words, in short."""
    names = {dict: "an object", list: "a list", type(None): "null", bool: str(value).lower()}
    return names.get(type(value)) or repr(value)[:40]
