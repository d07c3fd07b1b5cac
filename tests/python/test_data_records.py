"""Reading records: every format, and an error with file and line for everything else."""

import gzip
import json

import pytest
from data_helpers import chat, write_jsonl

from topk_attn.data import DataError, read_records


def read(path, **options):
    return list(read_records([path], **options))


def only(tmp_path, record, **options):
    [item] = read(write_jsonl(tmp_path / "r.jsonl", [record]), **options)
    return item


def test_formats_are_told_by_their_keys(tmp_path):
    records = [
        {"messages": chat("a", "b"), "id": 7},
        {"instruction": "Add", "input": "1+1", "output": "2"},
        {"instruction": "Say hi", "input": "", "output": "hi", "system": "s", "history": [["q", "r"]]},
        {"prompt": "p", "completion": "c"},
        {"text": "t"},
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]},
        {"input_ids": [1, 2, 3]},
    ]
    got = [(r.kind, r.payload) for r in read(write_jsonl(tmp_path / "r.jsonl", records))]
    assert got == [
        ("messages", chat("a", "b")),
        ("messages", chat("Add\n\n1+1", "2")),
        ("messages", chat("q", "r", "Say hi", "hi", system="s")),
        ("pair", ["p", "c"]),
        ("text", "t"),
        ("tokens", [[1, 2, 3], [0, 1, 1]]),
        ("tokens", [[1, 2, 3], [0, 0, 1]]),
        ("tokens", [[1, 2, 3], [1, 1, 1]]),
    ]


def test_render_chooses_conversation_or_plain_text(tmp_path):
    pair, alpaca = {"prompt": "p", "completion": "c"}, {"instruction": "i", "input": "x", "output": "o"}
    assert only(tmp_path, pair, render="chat").payload == chat("p", "c")
    assert only(tmp_path, alpaca, render="plain").payload == ["i\n\nx\n\n", "o"]


def test_files_of_other_shapes(tmp_path):
    records = [{"text": "a"}, {"text": "b\u2028c"}]
    (tmp_path / "array.json").write_text("\n" + json.dumps(records, indent=1))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(records[0]).encode() + b"\r\n\n  \n")
    (tmp_path / "lines.jsonl.gz").write_bytes(
        gzip.compress("\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode())
    )
    (tmp_path / "book.txt").write_text("whole\n\nfile\n")
    assert [r.payload for r in read(tmp_path / "array.json")] == ["a", "b\u2028c"]
    assert read(tmp_path / "array.json")[1].where.endswith("array.json: record 2")
    assert [r.payload for r in read(tmp_path / "bom.jsonl")] == ["a"]
    assert [r.payload for r in read(tmp_path / "lines.jsonl.gz")] == ["a", "b\u2028c"]
    assert [r.payload for r in read(tmp_path / "book.txt")] == ["whole\n\nfile\n"]


BAD = [
    ("{", "not valid JSON"),
    ('{"text": NaN}', "NaN is not JSON"),
    ('{"text": "a", "text": "b"}', "duplicate key 'text'"),
    ("[" * 100000, "nested too deeply"),
    ("3", "must be a JSON object, got 3"),
    ({}, "cannot tell the format"),
    ({"foo": 1}, r"cannot tell the format from the keys \(foo\)"),
    ({"text": "a", "messages": []}, "formats messages and text"),
    ({"messages": []}, "non-empty list"),
    ({"messages": {}}, "non-empty list"),
    ({"messages": ["hi"]}, "message 1 must be an object"),
    ({"messages": [{"content": "a"}]}, "message 1 has no role"),
    ({"messages": [{"role": "robot", "content": "a"}]}, 'role must be one of .*, got "robot"'),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "role must be one of"),
    ({"messages": [{"role": "user"}]}, r"message 1 \(user\) has no content"),
    ({"messages": [{"role": "user", "content": None}]}, "content must be a string, got null"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content must be a string"),
    (
        {"messages": [*chat("a"), {"role": "assistant", "content": " "}]},
        r"message 2 \(assistant\): content is empty",
    ),
    ({"messages": chat("a", "b"), "tools": [{}]}, "tools are not supported"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "tool_calls are not supported"),
    ({"instruction": 1, "output": "a"}, "instruction must be a string, got 1"),
    ({"instruction": "a", "input": 0, "output": "b"}, "input must be a string, got 0"),
    ({"instruction": "a", "output": ""}, "content is empty"),
    ({"instruction": "a", "output": "b", "history": [["q"]]}, r"history 1 must be \[question, answer\]"),
    ({"prompt": "a", "completion": ["b"]}, "completion must be a string"),
    ({"prompt": "a", "completion": ""}, "completion is empty"),
    ({"text": ""}, "text is empty"),
    ({"text": 5}, "text must be a string, got 5"),
    ('{"text": "\\ud800"}', "half of a surrogate pair"),
    ({"input_ids": "1 2"}, "input_ids must be a list"),
    ({"input_ids": [1]}, "at least 2 tokens"),
    ({"input_ids": [1, True]}, r"input_ids\[1\] must be an integer, got true"),
    ({"input_ids": [1, 2.0]}, r"input_ids\[1\] must be an integer"),
    ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries for 2 input_ids"),
    ({"input_ids": [1, 2], "labels": [2, -100]}, r"labels\[0\] must be input_ids\[0\] \(1\) or -100, got 2"),
    ({"input_ids": [1, 2], "mask": [0, 2]}, "mask must hold 0 and 1, got 2"),
    ({"input_ids": [1, 2], "mask": [0, 1], "labels": [1, 2]}, "labels and mask both"),
    ({"input_ids": [1, 2], "attention_mask": [0, 1]}, "attention_mask has zeros"),
]


@pytest.mark.parametrize("record, message", BAD)
def test_bad_records_name_file_and_line(tmp_path, record, message):
    path = write_jsonl(tmp_path / "r.jsonl", [{"text": "good"}, "", record, {"text": "good too"}])
    good, bad, also_good = read(path)
    assert (good.payload, also_good.payload) == ("good", "good too")
    assert isinstance(bad, DataError)
    with pytest.raises(DataError, match=f"^{path}:3: .*{message}"):
        raise bad


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="r.jsonl:2: not UTF-8: byte 0xff at offset 10"):
        raise read(tmp_path / "r.jsonl")[1]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="none.jsonl: No such file"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="bad.jsonl.gz"):
        read(tmp_path / "bad.jsonl.gz")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-9])
    with pytest.raises(DataError, match="cut.jsonl.gz"):
        read(tmp_path / "cut.jsonl.gz")
    (tmp_path / "array.json").write_text('[{"text": "a"},]')
    with pytest.raises(DataError, match="array.json: not valid JSON"):
        read(tmp_path / "array.json")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="plain text file needs format text"):
        read(tmp_path / "a.txt", format="messages")


def test_a_forced_format_is_not_guessed(tmp_path):
    with pytest.raises(DataError, match="no 'messages' in the record"):
        raise only(tmp_path, {"text": "a"}, format="messages")
    with pytest.raises(DataError, match="format must be one of"):
        read(tmp_path / "x", format="csv")
