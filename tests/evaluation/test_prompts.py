from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dde_ds.errors import UserError
from dde_ds.evaluation.prompts import read_prompts

PROMPTS = ["a fox", "ein Fuchs – schön", "a | b\u2028c"]


def test_the_same_prompts_from_every_kind_of_file(tmp_path):
    repeated = [*PROMPTS, PROMPTS[0]]
    (tmp_path / "p.txt").write_text("\n\n".join(repeated) + "\r\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"id": 3, "prompt": p}) for p in repeated))
    (tmp_path / "strings.jsonl").write_text("\n".join(json.dumps(p) for p in repeated))
    pq.write_table(pa.table({"caption": repeated, "label_0": [1.0, 0.0, 0.5, None]}), tmp_path / "p.parquet")
    for name in ("p.txt", "p.jsonl", "strings.jsonl", "p.parquet"):
        assert read_prompts(tmp_path / name) == (PROMPTS, 1), name
        assert read_prompts(tmp_path / name, limit=2) == (PROMPTS[:2], 1), name


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("p.csv", b"a", "unknown kind of file '.csv'"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "line 1: not UTF-8 at byte 0"),
        ("p.txt", b"a\nb \xed\xa0\xbc", "line 2: not UTF-8 at byte 4"),
        (
            "p.jsonl",
            b'{"prompt": "\\ud83d\\udc15"}\n{"prompt": "party \\ud83c"}',
            r"line 2: text holds half a surrogate pair: 'party \\ud83c'",
        ),
        ("p.jsonl", b'"\\udc15"', "line 1: text holds half a surrogate pair"),
        ("p.jsonl", b"[" * 100_000, "line 1: nested deeper"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt', "line 2: not valid JSON"),
        ("p.jsonl", b'{"words": "a"}', "no key caption or prompt or text; found words"),
        ("p.jsonl", b'{"prompt": 3}', "line 1: the prompt is 3"),
        ("p.jsonl", b'{"prompt": " "}', "the prompt is ' '"),
        ("p.parquet", b"PAR1", "not readable as parquet"),
    ],
)
def test_bad_files(tmp_path, name, data, named):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=named):
        read_prompts(tmp_path / name)


def test_half_a_surrogate_pair_in_parquet(tmp_path):
    halves = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0])), pa.py_buffer(b"a\xed\xa0\xbc")]
    )
    pq.write_table(pa.table({"prompt": halves}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet, row 1: the caption is not UTF-8 text"):
        read_prompts(tmp_path / "p.parquet")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_columns_as_other_programs_write_them(tmp_path, kind, monkeypatch):
    (tmp_path / "v2:a [b]").mkdir()
    pq.write_table(pa.table({"prompt": pa.array(PROMPTS).cast(kind)}), tmp_path / "v2:a [b]" / "p.parquet")
    monkeypatch.chdir(tmp_path)
    assert read_prompts("v2:a [b]/p.parquet") == (PROMPTS, 0)


def test_missing_file_and_column(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "p.txt")
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="no column caption or prompt or text; found words"):
        read_prompts(tmp_path / "p.parquet")
    pq.write_table(pa.table({"caption": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="row 1: the prompt is None"):
        read_prompts(tmp_path / "p.parquet")
