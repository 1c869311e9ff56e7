"""Whether JSON that others may have written has the shape that its reader expects, so that the reader need not ask at every step."""

from __future__ import annotations

from typing import Any

NUMBER = "a finite number"
"""Below 1e100 in size, so that sums and distances are finite too."""
COUNT = "a whole number from 0"
"""Below 2^53, so that a float holds it."""


def require_shape(value: Any, shape: Any, where: str = "") -> None:
    """Refuse a value of another shape.

    Args:
        shape: ``str``, :data:`NUMBER` or :data:`COUNT`; ``object`` for anything; ``[shape]`` for a list of any length; ``(shape,)`` for an object of any keys whose
            values have the shape; or an object of the keys that must be there, beside which there may be others.

    Raises:
        ValueError: one line that names the place, such as ``results[0].beats.rate``, and what stands there.
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
    elif shape == COUNT:
        _require(type(value) is int and 0 <= value < 2**53, value, COUNT, where)
    elif shape is not object:
        _require(type(value) in (int, float) and abs(value) < 1e100, value, NUMBER, where)


def _require(holds: bool, value: Any, expected: str, where: str) -> None:
    if not holds:
        kind = {dict: "an object", list: "a list", type(None): "null"}.get(type(value))
        raise ValueError(f"{where or 'it'} is {kind or repr(value)[:40]}, expected {expected}")
