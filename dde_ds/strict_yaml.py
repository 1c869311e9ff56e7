"""Read YAML in which a value is what it looks like.

The reader refuses duplicate keys and tags, and has limits on size and depth. PyYAML follows YAML 1.1, where ``0777`` is
511, ``1:00`` is 60, ``no`` is false, ``2024-01-01`` is a date and ``1e-5`` is text. This reader follows YAML 1.2 and
JSON: numbers are decimal and may be written as ``1e-5``, only ``true`` and ``false`` are truth values, and everything
else is text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dde_ds.text import half_surrogate
from dde_ds.untrusted import read_regular

YAML_BYTES = 2**18
"""Limit of a file, and of its contents once its aliases are written out. The project's recipes take 6 kB."""
YAML_DEPTH = 32
"""Limit on the nesting of lists and sections. A configuration needs 4."""
_MERGE = "tag:yaml.org,2002:merge"
_TEXT = "tag:yaml.org,2002:str"


def read_yaml(path: str | Path) -> Any:
    """Return what a YAML file holds.

    The file is UTF-8, or UTF-16 with a byte order mark. Raises what :func:`parse_yaml` and ``read_regular`` raise.
    """
    return parse_yaml(read_regular(path, YAML_BYTES))


def parse_yaml(data: bytes | str) -> Any:
    """Return what YAML text holds: dicts with text as keys, lists, text, numbers, truth values and None.

    Raises:
        ValueError: one line that says what is wrong and where. Refused are invalid YAML, a duplicate key, a key that is
            not text, a tag, half a surrogate pair, and more than :data:`YAML_BYTES` or :data:`YAML_DEPTH`.
    """
    if len(data) > YAML_BYTES:
        raise ValueError(f"larger than {YAML_BYTES:,} bytes")
    try:
        loader = _Loader(data)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"not valid YAML: {place}{error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        if error.encoding != "unicode":
            raise ValueError(
                f"not {error.encoding} text: byte {error.position} is {error.character:#04x}; save it as UTF-8"
            ) from None
        raise ValueError(f"not valid YAML: character {error.position} is {chr(error.character)!r}") from None
    except (
        ValueError,
        OverflowError,
    ) as error:  # PyYAML's conversions fail on an escape "\\UFFFFFFFF", or on %YAML with a huge number
        raise ValueError(f"not valid YAML: {error}") from None


def dump_yaml(value: Any) -> str:
    """Return plain data as YAML, from which :func:`parse_yaml` and readers of YAML 1.1 both read the same data."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper. It also puts text in quotes that :class:`_Loader` would take for a number."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with other rules for null, truth values and numbers (below).

    It also measures the size and depth of what it composes.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012  a class attribute, as in PyYAML

    def __init__(self, stream: bytes | str):
        super().__init__(stream)
        self._depth = self._size = 0
        self._measured: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent, index):
        """Compose a node.

        An alias counts as much as the node that it stands for: a few aliases could stand for gigabytes.
        """
        event = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            raise yaml.MarkedYAMLError(problem=f"the tag {event.tag!r} is not taken", problem_mark=event.start_mark)
        before, outer, self._depth = self._size, self._depth, self._depth + 1
        self._check(event)
        node = super().compose_node(parent, index)
        assert node is not None  # every event that begins a node has one
        if isinstance(event, yaml.AliasEvent):
            if node not in self._measured:
                raise yaml.MarkedYAMLError(problem=f"*{event.anchor} holds itself", problem_mark=event.start_mark)
            size, height = self._measured[node]
        else:
            size, height = self._size - before + 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0), 1
            if not isinstance(node, yaml.ScalarNode):
                parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
                height += max((self._measured[part][1] for part in parts), default=0)
            self._measured[node] = size, height
        self._size, self._depth = before + size, outer + height
        self._check(event)
        self._depth = outer
        return node

    def _check(self, event: yaml.Event) -> None:
        """Refuse what is nested too deep or too large."""
        if self._depth > YAML_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {YAML_DEPTH} levels", problem_mark=event.start_mark)
        if self._size > YAML_BYTES:
            raise yaml.MarkedYAMLError(
                problem=f"larger than {YAML_BYTES:,} bytes with its aliases written out", problem_mark=event.start_mark
            )

    def compose_scalar_node(self, anchor):
        """Compose a scalar. ``"\\ud83c\\udf89"``, JSON's form of a character beyond 16 bits, becomes one character."""
        node = super().compose_scalar_node(anchor)
        if half_surrogate(node.value):
            try:
                node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                raise yaml.MarkedYAMLError(
                    problem=f"text holds half a surrogate pair: {node.value[:40]!r}", problem_mark=node.start_mark
                ) from None
        return node

    def compose_mapping_node(self, anchor):
        """Compose a section. Refuse a key that occurs twice, of which PyYAML would take the last."""
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if key.tag not in (_TEXT, _MERGE):
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or section"
                raise yaml.MarkedYAMLError(problem=f"the key {shown} is no text; put it in quotes", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    # Leading zeros are not allowed, because they mean octal in YAML 1.1. Nor are more digits than Python itself reads.
    ("int", r"[-+]?(0|[1-9][0-9]{0,39})", [*"-+0123456789"]),
    (
        "float",
        r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9]+([eE][-+]?[0-9]+)?)"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+0123456789."],
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z", re.ASCII), _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z", re.ASCII), _first)
