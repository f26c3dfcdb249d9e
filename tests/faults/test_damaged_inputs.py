"""Damaged data given to the command line: each is one message that names the file and line, or the key; exit code 2."""

import gzip
import io
import json

import pytest

from ftlib import cli
from ftlib.errors import UserError
from ftlib.models import own

ASK, SAY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
GOOD = b'{"text": "abcd"}\n'
ROW = "rows.jsonl:2"  # where damage is, behind a good row


def chat(*turns, **more):
    """A good row, and one of these messages."""
    rows = [{"messages": [ASK, SAY]}, {"messages": list(turns), **more}]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def second(good, damaged):
    return "".join(json.dumps(row) + "\n" for row in (good, damaged)).encode()


def parquet():
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["abcd"] * 50}), out)
    return out.getvalue()


def arrow():
    import pyarrow

    table, out = pyarrow.table({"text": ["abcd" * 50] * 50}), io.BytesIO()
    with pyarrow.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def zst():
    import pyarrow

    out = io.BytesIO()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(GOOD * 999)
        stream.flush()
        whole = out.getvalue()
    return whole


QA, SEGMENT = {"question": "a", "answer": "b"}, {"segments": [{"text": "abc", "label": True}]}
RANGE = {"begin_offset": 0, "end_offset": 0}
IDS = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
SHAREGPT = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
CALL = {"role": "assistant", "content": [{"type": "tool_call", "value": "{"}]}
FILES = {  # name of the file (up to a blank), its bytes: what the message must hold
    # JSON lines
    ("rows.jsonl cut", GOOD + b'{"text": "b"\n'): [ROW + ":13", "invalid JSON"],
    ("rows.jsonl two", GOOD + b'{"text": "a"}{"text": "b"}'): [ROW + ":14", "Extra data"],
    ("rows.jsonl quote", GOOD + b'{"text": "b}'): [ROW, "invalid JSON"],
    ("rows.jsonl single", GOOD + b"{'text': 'b'}"): [ROW + ":2", "invalid JSON"],
    ("rows.jsonl tab", GOOD + b'{"text": "a\tb"}'): [ROW, "control character"],
    ("rows.jsonl nul", GOOD + b"\x00\x00\x00\x00\n"): ["rows.jsonl holds binary data"],
    ("rows.jsonl deep", GOOD + b'{"text": ' + b"[" * 200_000): [ROW, "invalid JSON"],
    ("rows.jsonl digits", GOOD + b'{"text": ' + b"9" * 9000 + b"}"): [ROW, "invalid JSON"],
    ("rows.jsonl number", GOOD + b"12\n"): [ROW, "object with named columns", "a int"],
    ("rows.jsonl null", GOOD + b"null\n"): [ROW, "null"],
    ("rows.jsonl list", GOOD + b'["a"]\n'): [ROW, "a list"],
    ("rows.jsonl string", GOOD + b'"a"\n'): [ROW, "a string"],
    ("rows.jsonl latin", GOOD + '{"text": "für"}'.encode("latin1")): [ROW + ":12", "0xfc", "iconv"],
    ("rows.jsonl surrogate", GOOD + b'{"text": "a\\ud800 b"}'): [ROW, "half a character"],
    ("rows.jsonl column", GOOD + b'{"txt": "b"}'): [ROW, "'text' not found", "[txt]"],
    ("rows.jsonl type", GOOD + b'{"text": 3}'): [ROW, "must be text", "3"],
    ("rows.jsonl none", GOOD + b'{"text": null}'): [ROW, "must be text"],
    ("rows.jsonl empty", b""): ["is empty (0 rows)"],
    ("rows.jsonl blank", b"\n \n"): ["is empty (0 rows)"],
    ("rows.jsonl odd", b'{"ask": "a", "say": "b"}'): ["[ask, say]", "columns"],
    ("rows.jsonl dpo", b'{"chosen": "a", "rejected": "b"}'): ["preference data"],
    ("rows.jsonl short", b'{"text": ""}'): ["all 1 rows were dropped", "no trained token"],
    ("rows.jsonl long", json.dumps({"text": "ab " * 400}).encode()): ["longer than data.seq_len", "raise data.seq_len"],
    # JSON lists and objects
    ("list.json cut", b'[\n {"text": "a"},\n {"text": "b"'): ["list.json:3:14", "invalid JSON"],
    ("list.json open", b'[\n {"text": "a"}\n'): ["list.json:3:1", "not closed"],
    ("list.json comma", b'[{"text": "a"},\n]'): ["list.json:2:1", "invalid JSON"],
    ("list.json missing", b'[{"text": "a"}\n{"text": "b"}]'): ["list.json:2:1", "expected ','"],
    ("list.json tail", b'[{"text": "a"}]\nx'): ["list.json:2:1", "follows the list"],
    ("list.json none", b"[]"): ["is empty (0 rows)"],
    ("list.json object", b'{\n "text": "a"\n}\n{\n "text": "b"\n}'): ["list.json:1", "several lines"],
    ("list.json wrapped", b'{"data": [{"text": "a"}]}'): ["[data]", "no known format"],
    # what is no text of rows at all
    ("rows.jsonl utf16", '{"text": "a"}'.encode("utf-16")): ["UTF-16", "iconv"],
    ("rows.jsonl utf32", '{"text": "a"}'.encode("utf-32-le")): ["not UTF-8"],
    ("rows.jsonl pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"): ["Git LFS pointer"],
    ("rows.jsonl page", b"<!DOCTYPE html><html></html>"): ["HTML page"],
    ("rows.data words", b"hello"): ["neither JSON"],
    ("rows.zip zip", b"PK\x03\x04\x14\x00\x00\x00\x08\x00"): ["rows.zip"],
    ("rows.png image", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"): ["rows.png"],
    ("rows.txt latin", "a\nfür".encode("latin1")): ["rows.txt:2:2", "0xfc"],
    ("rows.txt empty", b"\n\n"): ["is empty (0 rows)"],
    # compressed, and tables
    ("rows.jsonl.gz cut", gzip.compress(GOOD * 999)[:40]): ["rows.jsonl.gz", "cannot be read"],
    ("rows.jsonl.gz crc", gzip.compress(GOOD * 9)[:-8] + b"12345678"): ["rows.jsonl.gz", "cannot be read"],
    ("rows.jsonl.gz inside", gzip.compress(GOOD + b"{\n")): ["rows.jsonl.gz:2", "invalid JSON"],
    ("rows.jsonl.zst cut", zst()[:-9]): ["rows.jsonl.zst"],
    ("rows.parquet start", b"PAR1rest"): ["Parquet"],
    ("rows.parquet cut", parquet()[:200]): ["Parquet"],
    ("rows.arrow start", b"ARROW1\x00\x00rest"): ["Arrow"],
    ("rows.arrow cut", arrow()[:600]): ["Arrow"],
    ("rows.csv cells", b"question,answer\na,b\nc,d,e\n"): ["rows.csv:3", "3 cells"],
    ("rows.csv quotes", b'question,answer\na,"b\n'): ["rows.csv:2", "broken CSV"],
    ("rows.csv twice", b"text,text\na,b\n"): ["rows.csv:1", "two columns"],
    ("rows.csv unnamed", b"question,\na,b\n"): ["rows.csv:1", "no name"],
    ("rows.csv header", b"question,answer\n"): ["is empty (0 rows)"],
    ("rows.csv latin", "question,answer\na,für\n".encode("latin1")): ["rows.csv:2", "0xfc"],
    ("rows.tsv cells", b"question\tanswer\na\n"): ["rows.tsv:2", "1 cells"],
    # conversations
    ("rows.jsonl role", chat({**ASK, "role": "narrator"}, SAY)): [ROW, "message 1", "'narrator'", "roles"],
    ("rows.jsonl no-role", chat({"content": "x"}, SAY)): [ROW, "message 1", "no 'role'"],
    ("rows.jsonl content", chat(ASK, {**SAY, "content": 7})): [ROW, "message 2", "string or a list"],
    ("rows.jsonl silent", chat(ASK, {"role": "assistant"})): [ROW, "message 2", "no 'content'"],
    ("rows.jsonl image", chat(ASK, {**SAY, "content": [{"type": "image", "url": "x"}]})): [ROW, "message 2", "image"],
    ("rows.jsonl weight", chat(ASK, {**SAY, "loss_weight": -0.5})): [ROW, "message 2", "loss_weight is -0.5", "from 0"],
    ("rows.jsonl weight-nan", chat(ASK, {**SAY, "weight": float("nan")})): [ROW, "message 2", "weight is NaN"],
    ("rows.jsonl weight-inf", chat(ASK, {**SAY, "weight": float("inf")})): [ROW, "message 2", "weight is Infinity"],
    ("rows.jsonl weight-text", chat(ASK, {**SAY, "weight": "0.5"})): [ROW, "message 2", 'weight is "0.5"'],
    ("rows.jsonl weight-part", chat(ASK, {**SAY, "content": [{"text": "a", "weight": -1}]})): [ROW, "message 2", "-1"],
    ("rows.jsonl weight-range", chat(ASK, {**SAY, "train_detail": [{**RANGE, "weight": -1}]})): [ROW, "weight is -1"],
    ("rows.jsonl weights", chat(ASK, {**SAY, "weight": 1, "train": False})): [ROW, "message 2", "disagree"],
    ("rows.jsonl words", chat("hi")): [ROW, "message 1", "object with role"],
    ("rows.jsonl no-turn", chat()): [ROW, "at least one"],
    ("rows.jsonl tools", chat(ASK, SAY, tools="{")): [ROW, "'tools'", "invalid JSON"],
    ("rows.jsonl tool", chat(ASK, SAY, tools="3")): [ROW, "'tools'", "list of objects"],
    ("rows.jsonl call", chat(ASK, CALL)): [ROW, "message 2", "tool call is invalid JSON"],
    ("rows.jsonl text", second({"messages": [ASK, SAY]}, {"messages": "[{"})): [ROW, "'messages'", "invalid JSON"],
    ("rows.jsonl range", chat(ASK, {**SAY, "train_detail": [{"begin_offset": 0, "end_offset": 9}]})): [ROW, "no range"],
    ("rows.jsonl ranges", chat(ASK, {**SAY, "train_detail": 3})): [ROW, "list of ranges"],
    ("rows.jsonl from", second(SHAREGPT, {"conversations": [{"from": "me", "value": "x"}]})): [ROW, "role 'me'"],
    # other shapes
    ("rows.jsonl answer", second(QA, {"question": "a", "answer": 3})): [ROW, "'answer' must be text"],
    ("rows.jsonl answerless", second(QA, {"question": "a"})): [ROW, "'answer' not found"],
    ("rows.jsonl choices", second(QA, {**QA, "choices": "c"})): [ROW, "must be a list"],
    ("rows.jsonl segment", second(SEGMENT, {"segments": [{"text": "a", "label": True, "weight": -2}]})):
        [ROW, "segment 1: weight is -2"],
    ("rows.jsonl unlabelled", second(SEGMENT, {"segments": [{"text": "a", "label": False, "weight": 0.5}]})):
        [ROW, "segment 1", "disagree"],
    ("rows.jsonl label", second(SEGMENT, {"segments": [{"text": "a"}]})): [ROW, "label: true or false"],
    ("rows.jsonl ids", second(IDS, {"input_ids": "12"})): [ROW, "whole numbers"],
    ("rows.jsonl lengths", second(IDS, {**IDS, "labels": [1]})): [ROW, "1 entries", "has 3"],
    ("rows.jsonl shifted", second(IDS, {**IDS, "labels": [6, 7, -100]})): [ROW, "must not be shifted"],
    ("rows.jsonl negative", second(IDS, {"input_ids": [-5, 1]})): [ROW, "-5", "no token id"],
    ("rows.jsonl huge", second(IDS, {"input_ids": [5, 2**40]})): [ROW, str(2**40), "no token id"],
    ("rows.jsonl vocabulary", second(IDS, {"input_ids": [5, 10**6]})): [ROW, "1,000,000", "none of this tokenizer"],
}
KEYS = {  # settings of a good source of questions and answers: what the message must hold
    ("path=none.jsonl",): ["no such file", "data.sources[0].path"],
    ("path=folder",): ["folder without data files"],
    ("path=*.parquet",): ["no file matches"],
    ("format=alpacca",): ["did you mean 'alpaca'", "data.sources[0].format"],
    ("format=text",): ["do not fit the format text"],
    ("format=./mine.py:rows",): ["mine.py"],
    ("columns={instruction: questions}",): ["did you mean 'question'"],
    ("roles={bot: robot}",): ["data.sources[0].roles"],
    ("split=validation",): ["not understood"],
    ("split='[5:]'",): ["leaves no rows"],
    ("weight=0",): ["weight", "above 0"],
    ("weight=.nan",): ["data.sources[0].weight", "nan"],
}


def run(folder, capsys, monkeypatch, *words):
    monkeypatch.chdir(folder)
    (folder / "c.yaml").write_text(
        "model: {path: ftlib:demo/model}\ndata: {sources: [{path: good.jsonl}], seq_len: 256}\n"
    )
    code = cli.main(["preview", "lora_sft", "--config", "c.yaml", *words])
    out, err = capsys.readouterr()
    assert code == 2 and not out
    assert err.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err
    assert len(err) < 1500  # a message, not a dump
    return err


@pytest.mark.parametrize("name,content", FILES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_damaged_file_is_one_message(tmp_path, capsys, monkeypatch, name, content):
    file = name.split(" ")[0]
    (tmp_path / file).write_bytes(content)
    message = run(tmp_path, capsys, monkeypatch, f"data.sources[0].path={file}")
    for fact in FILES[name, content]:
        assert fact in message, message
    assert file in message or "data.sources[0]" in message


@pytest.mark.parametrize("words", KEYS, ids=" ".join)
def test_a_wrong_setting_of_a_source_is_one_message(tmp_path, capsys, monkeypatch, words):
    (tmp_path / "good.jsonl").write_text(json.dumps(QA))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "page.pdf").write_text("x")
    message = run(tmp_path, capsys, monkeypatch, *(f"data.sources[0].{word}" for word in words))
    for fact in KEYS[words]:
        assert fact in message, message


def test_there_are_sixty_different_ones():
    assert len({content for _, content in FILES}) + len(KEYS) >= 60
    assert len({content for _, content in FILES}) == len(FILES)


RECORDS = ("[]", "x", '{"model.code": "a.py:B"}', '{"model.code": {"code": "a.py:B"}}', '{"model.code": {"sha256": 3}}')


@pytest.mark.parametrize("content", RECORDS)
def test_a_damaged_record_of_a_class_is_one_message(tmp_path, content):
    (tmp_path / "ftlib.json").write_text(content)
    with pytest.raises(UserError, match="is no record of a run") as error:
        own.recorded(tmp_path)
    assert error.value.where == str(tmp_path / "ftlib.json")
