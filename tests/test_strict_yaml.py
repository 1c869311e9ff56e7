from __future__ import annotations

import re
import time

import pytest
import yaml

from dde_ds.strict_yaml import YAML_BYTES, dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("2.048e-5", 2.048e-5),
        ("1E5", 1e5),
        ("5.", 5.0),
        (".5", 0.5),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        # Numbers, truth values and dates of YAML 1.1 only.
        ("0777", "0777"),
        ("1:00", "1:00"),
        ("1_000", "1_000"),
        ("0x1f", "0x1f"),
        ("0b11", "0b11"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("On", "On"),
        ("9" * 5000, "9" * 5000),
        ("=", "="),
        (r'"\ud83c\udf89"', "🎉"),
        (r'"a\ud83d\udc4d\ud83c\udffd b"', "a👍🏽 b"),
        ("'🎉'", "🎉"),
    ],
)
def test_a_value_is_what_it_looks_like(text, value):
    found = parse_yaml(f"key: {text}")
    assert found == {"key": value}
    assert type(found["key"]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key a is there twice"),
        ('a: {b: 1, "b": 2}', "line 1, column 11: the key b is there twice"),
        ("1: a", "line 1, column 1: the key 1 is no text; put it in quotes"),
        ("no: a\n~: b", "line 2, column 1: the key ~ is no text"),
        ("? [a]\n: 1", "the key a list or section is no text"),
        ("a: !!python/object/apply:os.system [ls]", "line 1, column 4: the tag"),
        ("a: !!binary YQ==", "line 1, column 4: the tag"),
        ("a: !!set {b}", "line 1, column 4: the tag"),
        ("a: !!int 0777", "line 1, column 4: the tag"),
        ("a: !mine 1", "the tag '!mine' is not taken"),
        ("a: &a [*a]", "line 1, column 8: *a holds itself"),
        ("a: *b", "found undefined alias 'b'"),
        ("a: [", "line 1, column 5: expected the node content"),
        ("a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
        (r'a: "\ud83c"', r"line 1, column 4: text holds half a surrogate pair: '\ud83c'"),
        (r'a: "\udf89\ud83c"', "text holds half a surrogate pair"),
        (r'"\ud83c": 1', "text holds half a surrogate pair"),
        (r'a: "\UFFFFFFFF"', "not valid YAML"),
        ("%YAML " + "9" * 5000 + ".1\n---\na", "not valid YAML"),
        ("a: b\0c", r"character 4 is '\x00'"),
        ("a: é".encode("latin-1"), "not utf-8 text: byte 3 is 0xe9; save it as UTF-8"),
        ("a: é".encode("utf-16")[:-1], "not utf-16-le text: byte 8 is 0xe9"),
        ("[" * 100_000, "nested deeper than 32 levels"),
        ("a: " + "{a: " * 40 + "}" * 40, "nested deeper than 32 levels"),
        ("- " * 40 + "a", "nested deeper than 32 levels"),
        ("".join(f"k{i}: &a{i} [{f'*a{i - 1}' if i else ''}]\n" for i in range(40)), "nested deeper than 32 levels"),
        ("a: " + "x" * YAML_BYTES, "larger than 262,144 bytes"),
    ],
)
def test_one_line_that_says_where(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_yaml(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["[{}]", "{{<<: [{}]}}"], ids=["lists", "merge keys"])
def test_a_few_aliases_that_stand_for_gigabytes(part):
    first = "&a0 {x: 1}"
    lines = [f"k{i}: &a{i} {part.format(','.join([f'*a{i - 1}'] * 9))}" for i in range(1, 12)]
    text = "\n".join([f"k0: {first}", *lines])
    assert len(text) < 1000
    started = time.perf_counter()
    with pytest.raises(ValueError, match="larger than 262,144 bytes with its aliases written out"):
        parse_yaml(text)
    assert time.perf_counter() - started < 5
    with pytest.raises(
        ValueError, match="with its aliases written out"
    ):  # text is shared in memory, and written out in config.yaml
        parse_yaml(f"a: &a {'x' * 100_000}\nb: [{'*a,' * 100}]")


def test_harmless_aliases():
    assert parse_yaml("a: &n 5\nb: *n\nc: &m {x: 1, y: 2}\nd: {<<: *m, y: 3}") == {
        "a": 5,
        "b": 5,
        "c": {"x": 1, "y": 2},
        "d": {"x": 1, "y": 3},
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path, encoding):
    (tmp_path / "a.yaml").write_text("output: é🎉", encoding=encoding)
    assert read_yaml(tmp_path / "a.yaml") == {"output": "é🎉"}


def test_what_is_written_is_read_as_it_was():
    texts = [
        "1e5",
        "1E-5",
        "5.e3",
        "0777",
        "1:00",
        "no",
        "true",
        "null",
        "~",
        "",
        "1_000",
        "2024-01-01",
        "<<",
        "=",
        "0x1f",
        ".5",
        "🎉",
    ]
    values = {
        "texts": [*texts, "a\nb", "- a", "# a", "9" * 50, ".nan"],
        "numbers": [1e-5, 1e17, 5e-324, 1e300, -3.0, 10**18, 0, True, None],
    }
    assert parse_yaml(dump_yaml(values)) == yaml.safe_load(dump_yaml(values)) == values
