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
        ("p.txt", b"\xff\xfe", "not UTF-8 at byte 0"),
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


def test_missing_file_and_column(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "p.txt")
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="no column caption or prompt or text; found words"):
        read_prompts(tmp_path / "p.parquet")
    pq.write_table(pa.table({"caption": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="row 1: the prompt is None"):
        read_prompts(tmp_path / "p.parquet")
