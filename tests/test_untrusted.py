"""Text and files from outside: what is refused, what is made safe to show, and that nothing waits for a pipe."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from dde_ds.errors import UserError
from dde_ds.text import printable, without_passwords
from dde_ds.untrusted import JSON_DEPTH, parse_json, read_json, read_regular


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, größer, 日本, 👩‍🚀", "plain, größer, 日本, 👩‍🚀"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("two\nlines\r\u2028", "two\\nlines\\r\\u2028"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("half \ud83c", "half \\ud83c"),
        ("\x9b2J", "\\x9b2J"),
    ],
)
def test_what_would_act_on_a_terminal_is_written_as_an_escape(text, shown):
    assert printable(text) == shown
    assert str(UserError(text)) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:secret@host/a?b=c", "http://user:***@host/a?b=c"),
        ("two: s3://key:s3c@r3t@bucket/x and https://a:b@c", "two: s3://key:***@bucket/x and https://a:***@c"),
        ("http://user@host:8080/x", "http://user@host:8080/x"),
        ("http://host:8080/mail@example.org", "http://host:8080/mail@example.org"),
        ("http://:secret@host/", "http://:***@host/"),
        (f"no folder {Path('http://user:secret@host/x')}", "no folder http:/user:***@host/x"),
        ("/mnt/a:/home/user@host and file:/host:80/@x", "/mnt/a:/home/user@host and file:/host:80/@x"),
        ("http://user:se/cr@et@host/x", "http://user:***@host/x"),
        ("path is 'http://user:secret@host/x': no", "path is 'http://user:***@host/x': no"),
        ("https://host/x?part=1&token=abc&part=2", "https://host/x?part=1&token=***&part=2"),
        ("s3://b/k?X-Amz-Credential=a%2Fb&X-Amz-Signature=0f", "s3://b/k?X-Amz-Credential=***&X-Amz-Signature=***"),
        ("'https://h/x?sv=1&sig=a%3D' is wrong", "'https://h/x?sv=1&sig=***' is wrong"),
        ("loss?x=1 and a&b, http://host:80/@x", "loss?x=1 and a&b, http://host:80/@x"),
    ],
)
def test_passwords_in_urls_are_struck_out(text, shown):
    assert without_passwords(text) == shown
    assert str(UserError(text)) == shown


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_nested_too_deeply_is_one_line(opening):
    closing = "]" if opening == "[" else "}"
    for depth in (JSON_DEPTH + 1, 900, 100_000):
        with pytest.raises(ValueError, match="nested deeper than 64 levels"):
            parse_json(opening * depth + "1" + closing * depth)
    assert parse_json(opening * JSON_DEPTH + "1" + closing * JSON_DEPTH)


def test_json_that_is_too_large_or_no_text_is_one_line(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{"key": "' + "x" * 100 + '"}')
    assert read_json(path) == {"key": "x" * 100}
    with pytest.raises(ValueError, match="larger than 50 bytes"):
        read_json(path, limit=50)
    path.write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match="not UTF-8 text: byte 1 is 0xff"):
        read_json(path)


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_is_one_character():
    assert parse_json(r'"\ud83c\udf89"') == "🎉"
    for text in (r'"\ud83c"', r'{"a": ["\udf89"]}', r'{"\ud83c": 1}'):
        with pytest.raises(ValueError, match="half a surrogate pair"):
            parse_json(text)


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            read_regular(path)


def test_a_password_in_a_path_of_the_run_reaches_no_file_that_others_may_read(tmp_path, monkeypatch):
    """Neither a file of the run nor a tracker, which may take the command line as well."""
    from accelerate import tracking

    from dde_ds.config import config_of
    from dde_ds.engine.export import model_card
    from dde_ds.training.track import open_trackers

    sent = {}

    class Recorder(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "recorder", False, None

        def __init__(self, project: str):
            super().__init__()

        def store_init_configuration(self, values: dict) -> None:
            sent.update(values=values, argv=[*sys.argv])

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["recorder"])
    url = "https://user:secret@host/shards"
    data = {
        "output": str(tmp_path),
        "steps": 1,
        "model": {"path": "base"},
        "batch": {"pairs": 1},
        "optimizer": {"learning_rate": 1.0},
    }
    data |= {"evaluation": {"path": url}, "log": {"trackers": ["recorder"]}}
    for source in ({"path": url}, {"sources": [{"path": "first"}, {"path": url}]}):
        run = config_of(data | {"data": source})
        monkeypatch.setattr(sys, "argv", ["train.py", f"data.path={url}"])
        open_trackers(run, 0)
        written = (run.to_yaml(), json.dumps(run.as_data()), model_card(run, 1, {}, "weight"), json.dumps(sent))
        for text in written:
            assert "https://user:***@host/shards" in text
            assert "secret" not in text
        assert run.data.weighted_paths[-1][0] == url, "what is read keeps it"
