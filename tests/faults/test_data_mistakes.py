"""Wrong data: one message that names the file and line, or the key, and says what to do."""

import gzip
import json
from itertools import pairwise
from types import SimpleNamespace

import pytest

from ftlib.data import json_list, load
from ftlib.data.sources import read
from ftlib.errors import UserError
from ftlib.sections import Data, Source

CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


class Characters:
    """Enough of a tokenizer for rows that never reach one."""

    bos_id = eos_id = None
    chat_template = "chatml"
    special_tokens = {"</s>": 2}  # noqa: RUF012  what a tokenizer has

    def encode_with_offsets(self, text, special=True):
        return [ord(c) for c in text], [(i, i + 1) for i in range(len(text))]

    def render_with_spans(self, messages, tools=None, roles=("assistant",)):
        roles = [message["role"] for message in messages]
        if any(one == two for one, two in pairwise(roles)):
            raise UserError("the template says: roles must alternate", fix="mend the roles")
        text = "".join(message["content"] for message in messages) + "</s>"
        start = len(text) - len(messages[-1]["content"]) - 4
        return SimpleNamespace(
            text=text, spans=[SimpleNamespace(start=start, end=len(text), message_index=len(roles) - 1)]
        )


def mistake(path, tokenizer=None, seq_len=64, **source):
    with pytest.raises(UserError) as error:
        load(Data(sources=(Source(path=str(path), **source),), seq_len=seq_len), tokenizer or Characters(), seed=0)
    return str(error.value)


FILES = {
    # what is in the file, what its name is: what the message must contain
    ("bad.jsonl", b'{"text": "a"}\n{"text": "b"\n'): ["bad.jsonl:2:13", "invalid JSON"],
    ("cut.json", b'[\n {"text": "a"},\n {"text": "b"'): ["cut.json:3:14", "invalid JSON"],
    ("open.json", b'[\n {"text": "a"}\n'): ["open.json:3:1", "not closed"],
    ("comma.json", b'[{"text": "a"},\n]'): ["comma.json:2:1", "invalid JSON"],
    ("comma.json ", b'[{"text": "a"}\n{"text": "b"}]'): ["comma.json :2:1", "expected ','"],
    ("tail.json", b'[{"text": "a"}]\nx'): ["tail.json:2:1", "follows the list"],
    ("two.jsonl", b'{"text": "a"}{"text": "b"}'): ["two.jsonl:1:14", "Extra data"],
    ("nested.jsonl", b'{"text": ' + b"[" * 200_000): ["nested.jsonl:1", "invalid JSON"],
    ("object.json", b'{\n "rows": [{"text": "a"}]\n}'): ["[rows]", "no known format"],
    ("objects.json", b'{\n "text": "a"\n}\n{\n "text": "b"\n}'): ["objects.json:1", "several lines"],
    ("windows.json", b'{\r\n "text": "a"\r\n}\r\n{\r\n "text": "b"\r\n}'): ["windows.json:1", "several lines"],
    ("wrapped.json", b'{"data": [{"text": "a"}]}'): ["[data]", "no known format", "data.sources[0]"],
    ("numbers.jsonl", b"[1]\n"): ["numbers.jsonl:1", "object with named columns", "a int"],
    ("null.jsonl", b'{"text": "a"}\nnull\n'): ["null.jsonl:2", "null"],
    ("empty.jsonl", b""): ["empty.jsonl is empty (0 rows)"],
    ("blank.jsonl", b"\n \n"): ["blank.jsonl is empty (0 rows)"],
    ("none.json", b"[]"): ["none.json is empty (0 rows)"],
    ("empty.txt", b"\n\n"): ["empty.txt is empty (0 rows)"],
    ("latin.jsonl", '{"text": "a"}\n{"text": "für"}'.encode("latin1")): ["latin.jsonl:2:12", "0xfc", "iconv"],
    ("latin.json", '[\n{"text": "für"}]'.encode("latin1")): ["latin.json:2:12", "0xfc", "iconv"],
    ("latin.txt", "a\nfür".encode("latin1")): ["latin.txt:2:2", "0xfc", "iconv"],
    ("wide.jsonl", '{"text": "a"}'.encode("utf-16")): ["UTF-16", "iconv"],
    ("wide2.jsonl", '{"text": "a"}'.encode("utf-16-le")): ["wide2.jsonl", "not UTF-8"],
    ("lfs.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"): ["Git LFS pointer", "git lfs pull"],
    ("page.jsonl", b"<!DOCTYPE html><html></html>"): ["HTML page"],
    ("rows.parquet", b"PAR1rest"): ["Parquet", "where: "],
    ("none.parquet", b"some\0thing"): ["none.parquet is no Parquet file", "PAR1"],
    ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:40]): ["cut.jsonl.gz", "cannot be read", "where: "],
    ("words.data", b"hello"): ["words.data", "neither JSON", "begins with `hello`"],
    ("mixed.jsonl", b'{"text": "a"}\n{"text": 3}\n'): ["mixed.jsonl:2", "must be text", 'write it as text: "3"'],
    ("missing.jsonl", b'{"text": "a"}\n{"txt": "b"}\n'): ["missing.jsonl:2", "not found", "[txt]", "of their own"],
    ("dpo.jsonl", b'{"chosen": "a", "rejected": "b"}'): ["preference data"],
    ("odd.jsonl", b'{"ask": "a", "say": "b"}'): ["[ask, say]", "columns: {question: ask, answer: say}"],
    ("short.jsonl", b'{"text": "a"}'): ["all 1 rows were dropped", "1 no trained token", "Lengths seen: 1"],
    ("long.jsonl", json.dumps({"text": "a" * 99}).encode()): [
        "longer than data.seq_len=64",
        "99",
        "raise data.seq_len",
    ],
}


@pytest.mark.parametrize("name,content", FILES, ids=lambda value: value if isinstance(value, str) else "")
def test_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    message = mistake(tmp_path / name)
    for fact in FILES[name, content]:
        assert fact in message


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
def test_lists_are_wrong_in_the_same_place_however_they_are_read(tmp_path, chunk, monkeypatch):
    more = {
        "bom.json": b'\xef\xbb\xbf[\n {"text": "a"},\n {"text": \xff}]',
        "deep.json": b'[\n{"text": "a"},\n' + b"[" * 100_000,
        "half.json": b'[\n{"text": "' + "ü".encode()[:1],
        "quote.json": b'[{"text": "a"},\n\n {"text": "b" "c"}, {"text": "d"}]',
        "number.json": b'[{"text": "a"}, 12345]',
    }
    files = more | {name: content for name, content in FILES if content.lstrip()[:1] == b"["}
    messages = {}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        messages[name] = mistake(tmp_path / name)
    assert "bom.json:3:11" in messages["bom.json"] and "deep.json:3" in messages["deep.json"]
    assert "half.json:2:11" in messages["half.json"] and "quote.json:3:15" in messages["quote.json"]
    monkeypatch.setattr(json_list, "CHUNK", chunk)
    for name in files:
        found = mistake(tmp_path / name)
        assert found.split("near")[0] == messages[name].split("near")[0]


def messages(*changes):
    return {"messages": [{**CHAT[i % 2], **change} for i, change in enumerate(changes)]}


ROWS = [
    (messages({"role": "narrator"}), ["message 1", "'narrator'", "roles"]),
    (messages({"role": None}), ["message 1", "no 'role'"]),
    (messages({}, {"content": 7}), ["message 2", "string or a list"]),
    (messages({}, {"content": None}), ["message 2", "its 'content' is null", "write its text"]),
    (messages({}, {"content": [{"type": "image", "url": "x"}]}), ["message 2", "image"]),
    (messages({}, {"loss_weight": -0.5}), ["message 2", "-0.5", "a number from 0"]),
    (messages({}, {"train": "yes"}), ["message 2", 'train is "yes"', "true, false or a number from 0 on"]),
    (messages({}, {"train_detail": [{"begin_offset": 0, "end_offset": 9}]}), ["0 to 9", "1 characters", "count char"]),
    (messages({}, {"weight": 0.5, "train": False}), ["message 2", "disagree"]),
    (messages({}, {"loss_weight": 1, "train": False}), ["message 2", "disagree"]),
    (messages({"train": True}, {}), ["message 1 (user)", "does not show where it stands"]),
    ({"messages": ["hi"]}, ["message 1", "object with role"]),
    ({"messages": []}, ["at least one"]),
    ({"messages": None}, ["list of messages"]),
    ({"other": 1}, ["'messages' not found", "[other]"]),
    ({**messages({}, {}), "tools": "{"}, ["'tools'", "invalid JSON"]),
    ({**messages({}, {}), "tools": "3"}, ["'tools'", "list of objects"]),
    (messages({}, {}, {"role": "assistant"}), ["roles must alternate", "mend the roles"]),
]


@pytest.mark.parametrize("row,facts", ROWS)
def test_conversations(tmp_path, row, facts):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n\n" + json.dumps(row))
    message = mistake(tmp_path / "chat.jsonl")
    assert "chat.jsonl:3" in message
    for fact in facts:
        assert fact in message


def test_what_nobody_can_train_on_says_what_would_help(tmp_path):
    """Not to raise data.seq_len where every message is switched off."""
    (file := tmp_path / "a.jsonl").write_text(json.dumps(messages({}, {"train": False})))
    message = mistake(file)
    assert "1 no trained token" in message and "data.seq_len" not in message and "`train: false`" in message
    file.write_text(json.dumps({"text": "a" * 99}))
    assert "fix: raise data.seq_len (now 64), or cut them: data.overlong=split\n" in mistake(file) + "\n"


@pytest.mark.parametrize("name,mark", [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", ","), ("a.tsv", ";")])
def test_csv_of_spreadsheets_is_read_by_the_mark_its_header_has(tmp_path, name, mark):
    (file := tmp_path / name).write_text(f'question{mark}answer\r\n"2{mark}2?"{mark}four\r\n')
    (row,) = read(file)
    assert row.value == {"question": f"2{mark}2?", "answer": "four"}
    file.write_text(f"question{mark}answer\na{mark}b{mark}c\n")
    marks = {";": "semicolons", "\t": "tabs", ",": "commas"}[mark]
    assert f"put texts that hold {marks} in quotes" in mistake(file) and f"{name}:2" in mistake(file)
    file.write_text("text\na\n")
    assert [row.value for row in read(file)] == [{"text": "a"}]


def test_many_bad_rows_are_one_message(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": n if n % 2 else "x"}) + "\n" for n in range(10)))
    message = mistake(tmp_path / "a.jsonl")
    assert "5 of 10 rows" in message and all(f"a.jsonl:{line}" in message for line in (2, 4, 6))
    assert "a.jsonl:8" not in message


def test_missing_file_names_what_is_near(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    message = mistake(tmp_path / "trian.jsonl")
    assert "no such file" in message and "train.jsonl" in message and "working directory" in message
    assert "data.sources[0].path" in message
    assert str(tmp_path) in mistake(tmp_path / "no" / "such" / "file.jsonl")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "page.pdf").write_text("x")
    assert "folder without data files" in mistake(tmp_path / "other") and "page.pdf" in mistake(tmp_path / "other")
    assert "no file matches" in mistake(tmp_path / "*.parquet")


def test_wrong_keys(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "a", "answer": "b"}')
    assert "did you mean 'alpaca'" in mistake(file, format="alpacca")
    assert "did you mean 'question'" in mistake(file, columns={"instruction": "questions"})
    assert "do not fit the format text" in mistake(file, format="text")
    assert "data.sources[0].roles" in mistake(file, roles={"bot": "robot"})
    columns = {"instruction": "question", "output": "answer", "inptu": "answer"}
    assert "did you mean 'input'" in mistake(file, columns=columns)
    for own in ("none.py:rows", "here.py:rows", "here.py:row"):  # no file, no function, a function that fails
        (tmp_path / "here.py").write_text("def row(row):\n    return row['x']\n")
        assert "  fix: " in mistake(file, format=f"{tmp_path}/{own}")
    assert "a.jsonl: the columns [question, answer]" in mistake(file, format="text")
    assert "not understood" in mistake(file, split="validation")
    assert "leaves no rows" in mistake(file, split="[5:]")


def test_no_chat_template(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    tokenizer = Characters()
    tokenizer.chat_template = None
    message = mistake(tmp_path / "a.jsonl", tokenizer)
    assert "no chat template" in message and "data.template" in message


@pytest.mark.parametrize("amount", [5, 9, 0.99])
def test_held_out_too_many(tmp_path, amount):
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 5)
    cfg = Data(sources=(Source(path=str(tmp_path / "a.jsonl")),), eval=amount, seq_len=64)
    with pytest.raises(UserError) as error:
        load(cfg, Characters(), seed=0)
    assert error.value.where == "data.eval"


def test_held_out_sets_of_one_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 5)
    source = Source(path=str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="two held-out sets"):
        load(Data(sources=(source,), eval=(source, source), seq_len=64), Characters(), seed=0)
