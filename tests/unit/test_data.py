"""From files to documents: sources, formats, masks, held-out parts, the report."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fake_tokenizer import SPECIAL, FakeTokenizer

from ftlib import tokenizers
from ftlib.data import Documents, Example, load
from ftlib.data.formats import choose_shape, read_example
from ftlib.data.masks import tokenize
from ftlib.data.sources import locate, read
from ftlib.errors import UserError
from ftlib.sections import Data, Source

SHARED = Path(__file__).parents[3] / "shared" / "data" / "instruct"
CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def load_rows(tmp_path, rows, **changes):
    sources = (Source(path=write(tmp_path / "rows.jsonl", rows)),)
    return load(Data(sources=sources, **{"seq_len": 100, **changes}), FakeTokenizer(), seed=0)


def example(row, **source):
    shape = choose_shape(row, source.get("format", "auto"), source.get("columns", {}), source.get("roles", {}), "key")
    return read_example(row, shape, "file:1")


def read_pairs(path):
    return [(row.line, row.value) for row in read(path)]


def trained_text(example):
    """What is trained, character by character; `·` stands for what is not."""
    tokenizer = FakeTokenizer()
    ids, trained = tokenize(example, tokenizer)
    names = {number: name for name, number in SPECIAL.items()}
    return "".join(names.get(i, chr(i)) if t else "·" for i, t in zip(ids.tolist(), trained, strict=True)).strip("·")


# ---- sources


def test_json_lines_know_their_lines(tmp_path):
    text = '\ufeff{"text": "a"}\r\n\r\n{"text": "ü"}\n'
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert read_pairs(tmp_path / name) == [(1, {"text": "a"}), (3, {"text": "ü"})]


def test_json_list_knows_its_lines(tmp_path):
    rows = [{"text": "a", "more": [1, {"b": 2}]}, {"text": "c"}]
    (tmp_path / "one.json").write_text(json.dumps(rows))
    assert [row.value for row in read(tmp_path / "one.json")] == rows
    (tmp_path / "many.json").write_text("\n" + json.dumps(rows, indent=2))
    assert [row.line for row in read(tmp_path / "many.json")] == [3, 12]


@pytest.mark.parametrize("chunk", [1, 5, 64, 1 << 20])
def test_json_lists_are_read_in_windows(tmp_path, chunk, monkeypatch):
    from ftlib.data import json_list

    monkeypatch.setattr(json_list, "CHUNK", chunk)
    rows = [{"text": "ü \\ \" 😀 ]}, " * (n % 7), "n": [n, {"x": None}], "f": 1e-5} for n in range(40)]
    for form, first in (({"indent": 1}, 2), ({}, 1), ({"ensure_ascii": False, "indent": 3}, 2)):
        (tmp_path / "a.json").write_text("\ufeff" + json.dumps(rows, **form) + " \n", encoding="utf-8")
        found = list(read(tmp_path / "a.json"))
        assert [row.value for row in found] == rows and found[0].line == first
        lines = (tmp_path / "a.json").read_text(encoding="utf-8-sig").split("\n")
        assert all("{" in lines[row.line - 1] for row in found)


def test_text_is_paragraphs_or_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n\n")
    assert read_pairs(tmp_path / "a.txt") == [(1, {"text": "one\ntwo"}), (5, {"text": "three"})]
    (tmp_path / "b.txt").write_text("one\ntwo\n\n")
    assert read_pairs(tmp_path / "b.txt") == [(1, {"text": "one"}), (2, {"text": "two"})]


@pytest.mark.parametrize(
    "split,kept",
    [
        (None, range(10)),
        ("train", range(10)),
        ("[:90%]", range(9)),
        ("train[90%:]", range(9, 10)),
        ("[3:]", range(3, 10)),
        ("[:3]", range(3)),
        ("[2:4]", range(2, 4)),
        ("[-2:]", range(8, 10)),
        ("[:-20%]", range(8)),
        ("[:1000]", range(10)),
    ],
)
def test_split(tmp_path, split, kept):
    file = Path(write(tmp_path / "rows.jsonl", [{"n": n} for n in range(10)]))
    assert [row.value["n"] for row in read(file, split)] == list(kept)


def test_shipped_files_go_through_the_hub_module():
    with pytest.raises(UserError, match="ships no such file"):
        locate("ftlib:demo/data/nothing.jsonl")


# ---- formats


def test_messages_in_all_spellings():
    wanted = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    rows = [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"messages": [{"role": m["role"], "content": [{"type": "text", "value": m["content"]}]} for m in CHAT]},
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]},
    ]
    assert all(example(row).messages == wanted for row in rows)
    row = {"chat": [{"who": "kunde", "says": "2+2?"}, {"who": "bot", "says": "4"}]}
    columns = {"messages": "chat", "role": "who", "content": "says"}
    assert example(row, columns=columns, roles={"kunde": "user"}).messages == wanted


def test_tools_and_calls_are_carried():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "x", "name": None},
    ]
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        got = example({"messages": messages, "tools": tools, "system": "S"})
        assert got.tools == [{"name": "add"}]
        assert got.messages[0] == {"role": "system", "content": "S"}
        assert got.messages[1:4] == messages[:3]
        assert got.messages[4] == {"role": "tool", "content": "4", "tool_call_id": "x"}
        assert got.trained == [False, False, True, True, False]
    assert example({"messages": messages, "tools": "[]"}).tools is None


def test_alpaca():
    got = example({"instruction": "Add", "input": "2 2", "output": "4", "system": "S", "history": [["a", "b"]]})
    assert [(m["role"], m["content"]) for m in got.messages] == [
        ("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "Add\n2 2"), ("assistant", "4"),
    ]  # fmt: skip
    got = example({"q": "Add", "output": "4"}, columns={"instruction": "q"})
    assert [m["content"] for m in got.messages] == ["Add", "4"]


def test_detection_gives_its_evidence():
    shape = choose_shape({"conversations": CHAT, "text": "x"}, "auto", {}, {}, "key")
    assert (shape.format, shape.evidence) == ("messages", "it has conversations")
    assert choose_shape({"messages": CHAT, "text": "x"}, "text", {}, {}, "key").format == "text"


# ---- masks


def test_the_assistant_and_its_terminator_are_trained():
    system = {"role": "system", "content": "S"}
    assert trained_text(example({"messages": [system, *CHAT]})) == "4<|im_end|>"
    assert trained_text(example({"messages": [*CHAT, *CHAT]})).replace("·", "") == "4<|im_end|>4<|im_end|>"


@pytest.mark.parametrize("key", ["loss_weight", "train", "weight"])
@pytest.mark.parametrize("off", [0, 0.0, False])
def test_weight_of_a_message(key, off):
    messages = [CHAT[0], {**CHAT[1], "content": "no", key: off}, {**CHAT[0], key: off}, {**CHAT[1], key: 1}]
    got = example({"messages": messages})
    assert trained_text(got) == "4<|im_end|>"
    assert all(message.keys() == {"role", "content"} for message in got.messages)


@pytest.mark.parametrize(
    "parts,wanted",
    [
        ([("so, ", 0), ("4", 1)], "4<|im_end|>"),
        ([("so, ", 1), ("4", 0)], "so, "),
        ([(" a", 1), ("b", 0), ("c ", None)], "a·c<|im_end|>"),
        ([("a", 0), ("b", 0)], ""),
        ([("a", 1), ("b", None)], "ab<|im_end|>"),
    ],
)
def test_weight_of_a_part(parts, wanted):
    content = [{"type": "text", "text": text, "weight": weight} for text, weight in parts]
    assert trained_text(example({"messages": [CHAT[0], {"role": "assistant", "content": content}]})) == wanted


def test_a_part_outweighs_its_message():
    content = [{"text": "a"}, {"text": "b", "train": True}]
    message = {"role": "assistant", "content": content, "train": False}
    assert trained_text(example({"messages": [CHAT[0], message]})) == "b<|im_end|>"


def test_labels_are_shifted_once(tmp_path):
    documents = load_rows(tmp_path, [{"messages": CHAT}]).train
    document = documents[0]
    ids, labels = document.input_ids, document.labels
    assert (ids.dtype, labels.dtype) == (np.int32, np.int32)
    assert labels[-1] == -100
    kept = labels != -100
    assert (labels[:-1][kept[:-1]] == ids[1:][kept[:-1]]).all()
    assert FakeTokenizer().decode(labels[kept]) == "4<|im_end|>"
    assert documents.target_counts.tolist() == [2] and documents.lengths.tolist() == [len(ids)]


@pytest.mark.parametrize("text", ["ab", "<s>ab", "ab</s>", "<s>ab</s>"])
def test_text_has_one_bos_and_one_eos(text):
    ids, trained = tokenize(example({"text": text}), FakeTokenizer())
    assert FakeTokenizer().decode(ids) == "<s>ab</s>"
    assert trained.all()


# ---- loading


def test_overlong_rows(tmp_path):
    rows = [{"text": "x" * n} for n in (10, 30, 20)]
    loaded = load_rows(tmp_path, rows, seq_len=25)
    assert loaded.train.lengths.tolist() == [12, 22]
    assert loaded.report.sources[0].dropped == {"longer than data.seq_len=25 tokens": 1}
    loaded = load_rows(tmp_path, rows, seq_len=25, overlong="truncate")
    assert loaded.train.lengths.tolist() == [12, 25, 22]
    assert FakeTokenizer().decode(loaded.train[1].input_ids) == "<s>" + "x" * 24
    with pytest.raises(UserError, match="32 tokens") as error:
        load_rows(tmp_path, rows, seq_len=25, overlong="error")
    assert error.value.where.endswith("rows.jsonl:2")


def test_rows_with_nothing_to_train_on_are_counted(tmp_path):
    long = {"messages": [{"role": "user", "content": "x" * 200}, CHAT[1]]}
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": [CHAT[0], {**CHAT[1], "content": " "}]}, long]
    loaded = load_rows(tmp_path, rows, overlong="truncate")
    assert len(loaded.train) == 1
    assert loaded.report.sources[0].dropped == {
        "no trained token": 2, "no trained token left after truncation": 1,
    }  # fmt: skip
    assert any("warning: 50%" in line for line in loaded.report.lines())


def test_report_says_what_was_found(tmp_path):
    lines = "\n".join(load_rows(tmp_path, [{"messages": CHAT}] * 3, eval=1).report.lines())
    for fact in ("rows: 3 rows, format messages (it has messages)", "2 documents", "% trained", "held_out"):
        assert fact in lines


@pytest.mark.parametrize("amount,count", [(0.2, 10), (7, 7), (0.001, 1)])
def test_held_out_rows_are_disjoint(tmp_path, amount, count):
    rows = [{"messages": [CHAT[0], {**CHAT[1], "content": str(n)}]} for n in range(50)]
    loaded = load_rows(tmp_path, rows, eval=amount)
    held_out = loaded.eval["held_out"]
    assert len(held_out) == count and len(loaded.train) == 50 - count
    answers = [int(document.messages[1]["content"]) for document in held_out]
    lines = [int(loaded.train.where(i).rsplit(":")[-1]) - 1 for i in range(len(loaded.train))]
    assert sorted(answers + lines) == list(range(50))
    assert [held_out.examples[i].messages for i in range(count)] == [document.messages for document in held_out]
    assert loaded.train.examples is None
    again = load_rows(tmp_path, rows, eval=amount)
    assert again.eval["held_out"].fingerprint == held_out.fingerprint
    for index in range(count):
        assert str(answers[index]) in FakeTokenizer().decode(held_out[index].input_ids)


def test_eval_sources_are_named(tmp_path):
    sources = [
        Source(path=write(tmp_path / f"{name}.jsonl", [{"messages": CHAT}] * n)) for name, n in (("a", 2), ("b", 3))
    ]
    cfg = Data(
        sources=(sources[0],), eval=(*sources, Source(path=sources[0].path, name="c", split="[:1]")), seq_len=100
    )
    loaded = load(cfg, FakeTokenizer(), seed=0)
    assert {name: len(documents) for name, documents in loaded.eval.items()} == {"a": 2, "b": 3, "c": 1}
    assert loaded.eval["b"][0].messages == CHAT


def test_several_sources_keep_their_weights(tmp_path):
    one, two = write(tmp_path / "one.jsonl", [{"text": "abc"}] * 4), write(tmp_path / "two.jsonl", [{"text": "de"}] * 6)
    cfg = Data(sources=(Source(path=one, weight=1.5), Source(path=two, name="zwei", weight=0.5)), seq_len=16)
    documents = load(cfg, FakeTokenizer(), seed=0).train
    assert [document.source for document in documents] == ["one"] * 4 + ["zwei"] * 6
    assert [len(documents.of_epoch(0, epoch)) for epoch in range(2)] == [9, 9]
    assert documents.where(5).endswith("two.jsonl:2")


def test_documents_are_a_sequence():
    documents = Documents.from_rows(
        [(np.array([5, 6, 7]), np.array([True, True, False])), (np.array([8]), np.array([True]))]
    )
    assert [document.labels.tolist() for document in documents] == [[6, -100, -100], [-100]]
    assert documents.target_counts.tolist() == [1, 0]
    assert documents[-1].input_ids.tolist() == [8] and documents.max_token_id == 8
    with pytest.raises(IndexError):
        documents[2]
    other = Documents.from_rows(
        [(np.array([5, 6, 7]), np.array([True, True, True])), (np.array([8]), np.array([True]))]
    )
    assert other.fingerprint != documents.fingerprint


# ---- real files


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
@pytest.mark.parametrize(
    "name,format,rows",
    [
        ("lf_v1_sft_demo.jsonl", "messages", 500),
        ("lf_alpaca_en_demo.json", "alpaca", 750),
        ("lf_identity.json", "alpaca", 91),
    ],
)
def test_real_files(name, format, rows):
    cfg = Data(sources=(Source(path=str(SHARED / name)),), seq_len=32768)
    loaded = load(cfg, FakeTokenizer(), seed=0)
    report = loaded.report.sources[0]
    assert (report.format, report.rows, len(loaded.train)) == (format, rows, rows - report.dropped["no trained token"])
    assert 0.1 < loaded.train.target_counts.sum() / loaded.train.lengths.sum() < 1


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
def test_real_tokenizer_and_template():
    tokenizer = tokenizers.from_pretrained(SHARED.parent / "tiny_models" / "stories260K" / "hf")
    tokenizer.chat_template = tokenizers.load_template("chatml")
    cfg = Data(sources=(Source(path=str(SHARED / "lf_v1_sft_demo.jsonl")),), seq_len=512, eval=20)
    with pytest.warns(UserWarning, match="no token for"):
        loaded = load(cfg, tokenizer, seed=0)
    assert len(loaded.train) + 20 + sum(loaded.report.sources[0].dropped.values()) == 500
    for document in loaded.eval["held_out"]:
        answer = tokenizer.decode(document.labels[document.labels != -100].tolist())
        expected = document.messages[-1]["content"] + "<|im_end|></s>"  # the marker is text here, so an EOS follows
        assert answer.split() == expected.split()  # this vocabulary folds runs of spaces


def golden_masks():
    if not SHARED.exists():
        return []
    cases = json.loads((SHARED.parent / "chat_templates" / "qwen_sft_mask_golden.json").read_text())["cases"]
    return [case for case in cases if any(case["assistant_mask"])]  # the others end in a generation prompt


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
@pytest.mark.parametrize("case", golden_masks(), ids=lambda case: f"{case['model']}-{case['case']}")
def test_golden_masks(case, tmp_path):
    """Ids and masks of Qwen's training templates, written down by another program."""
    shutil.copy(SHARED.parent / "tokenizers" / "qwen" / "qwen.tiktoken", tmp_path)
    special = {
        151643: "<|endoftext|>",
        151644: "<|im_start|>",
        151645: "<|im_end|>",
        151667: "<think>",
        151668: "</think>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": special}))
    tokenizer = tokenizers.from_pretrained(tmp_path)
    templates = SHARED.parent / "chat_templates"
    tokenizer.chat_template = tokenizers.load_template(str(templates / case["template"]))
    row = json.loads((templates / "golden_render_conversations.json").read_text())[case["case"]]
    conversation = Example("golden", messages=[])
    for message in row["messages"]:
        conversation.add(**message)
    conversation.tools = row.get("tools")
    ids, trained = tokenize(conversation, tokenizer)
    assert ids.tolist() == case["input_ids"]
    assert trained.astype(int).tolist() == case["assistant_mask"]
