"""Every shape of row: told by its columns, and read into the same record."""

import json

import pytest
from fake_tokenizer import FakeTokenizer
from shared_data import ROOT

from ftlib.data import examples, load
from ftlib.data.collect import opened
from ftlib.data.formats import FORMATS, choose_shape, kind, read_examples, unused
from ftlib.data.masks import tokenize
from ftlib.errors import UserError
from ftlib.sections import Data, Source

ASK, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CHAT = [ASK, ANSWER]


def read(row, format="auto", columns=None, roles=None, **more):
    shape = choose_shape(row, format, columns or {}, roles or {}, "key", **more)
    return shape, read_examples(row, shape, "file:1")


def said(example):
    return [(m["role"], m["content"]) for m in example.messages]


TALK = [("user", "2+2?"), ("assistant", "4")]
ROWS = [
    ("messages", {"messages": CHAT}, TALK),
    ("messages", {"messages": json.dumps(CHAT)}, TALK),
    ("messages", {"dialog": CHAT, "system": "S"}, [("system", "S"), *TALK]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, TALK),
    ("sharegpt", {"conversation": [{"human": "2+2?", "assistant": "4"}] * 2}, TALK * 2),
    ("alpaca", {"instruction": "2+2?", "input": "", "output": "4"}, TALK),
    ("alpaca", {"instruction": "2+2?", "input": None, "response": "4"}, TALK),
    ("alpaca", {"INSTRUCTION": "2+2?", "RESPONSE": "4"}, TALK),
    ("instances", {"instruction": "2+2?", "instances": [{"input": "", "output": "4"}]}, TALK),
    ("qa", {"question": "2+2?", "answer": "4"}, TALK),
    ("qa", {"system_prompt": "S", "question": "2+2?", "response": "4"}, [("system", "S"), *TALK]),
    ("qa", {"query": "2+2?", "response": "4", "history": [["a", "b"]]}, [("user", "a"), ("assistant", "b"), *TALK]),
    ("qa", {"message_1": "2+2?", "message_2": "4"}, TALK),
    ("qa", {"problem": "2+2?", "solution": "4", "level": 1}, TALK),
    ("qa", {"article": "Sums.", "question": "2+2?", "answer": "4"}, [("user", "Sums.\n\n2+2?"), TALK[1]]),
    ("qa", {"article": "Sums.", "summary": "S."}, [("user", "Sums."), ("assistant", "S.")]),
    ("qa", {"question": "2+2?", "choices": ["3", "4"], "solution": "4"}, [("user", "2+2?\n\n3\n4"), TALK[1]]),
    ("qa", {"prompt": "2+2?", "generation": "4"}, TALK),
    ("qa", {"input": "2+2?", "output": "4"}, TALK),
    ("completion", {"prompt": [ASK], "completion": [ANSWER]}, TALK),
    ("alpaca", {"instruction": "2+2?", "answer": "4", "scores": "S", "critiques": "C"}, TALK),
    ("alpaca", {"instruction": "2+2?", "answer": "5", "critiques": "C", "revision": "4"}, TALK),
    ("unanswerable", {"article": "Sums.", "unanswerable_question": "Who?"},
     [("user", "Sums.\n\nWho?"), ("assistant", "The text does not say.")]),
    ("alpaca", {"instruction": "2+2?", "completion": "4"}, TALK),
    ("alpaca", {"Instruction": "2+2?", "Input": "in words", "Output": "4"}, [("user", "2+2?\nin words"), TALK[1]]),
    ("qa", {"Question": "2+2?", "Response": "4", "ID": 1}, TALK),
    ("qa", {"System": "S", "question": "2+2?", "Answer": "4"}, [("system", "S"), *TALK]),
    ("messages", {"Messages": CHAT}, TALK),
    ("sharegpt", {"conversation": [{"system": "", "input": "2+2?", "output": "4"}] * 2}, TALK * 2),
    ("sharegpt", {"conversation": [{"system": "S", "input": "2+2?", "output": "4"}]}, [("system", "S"), *TALK]),
    ("oasst", {"message_tree_id": "x", "prompt": {"role": "prompter", "text": "2+2?", "replies": [
        {"role": "assistant", "text": "5", "rank": 1, "replies": []},
        {"role": "assistant", "text": "no", "rank": 0, "deleted": True},
        {"role": "assistant", "text": "4", "rank": 0}]}}, TALK),
]  # fmt: skip


@pytest.mark.parametrize("format,row,wanted", ROWS)
def test_conversations(format, row, wanted):
    shape, (example,) = read(row)
    assert shape.format == format and shape.evidence.startswith("it has ")
    assert said(example) == wanted
    assert example.trained == [role == "assistant" for role, _ in wanted]
    assert read(row, format)[0].evidence == "named in the config"


NOT_USED = [
    ({"question": "2+2?", "solution": "2+2=4", "answer": "4"}, "it has question and answer; not used: solution"),
    ({"messages": CHAT, "system": "S", "tools": [], "source": "x"}, "it has messages; not used: source"),
    ({"text": "good", "label": 1}, "it has text; not used: label (classification is not trained here)"),
    ({"Question": "2+2?", "Answer": "4", "Context": "C", "Id": 1}, "it has Question and Answer; not used: Id"),
    ({"text": "a", **{f"m{i}": i for i in range(10)}},
     "it has text; not used: m0, m1, m2, m3, m4, m5, m6, m7 and 2 more"),
    ({"input_ids": [1], "labels": [1], "attention_mask": [1], "length": 1}, "it has input_ids; not used: length"),
    ({"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": 1}, "it has chosen and rejected; not used: margin"),
    ({"instruction": "2+2?", "instances": [{"input": "", "output": "4"}], "id": 1},
     "it has instruction and instances; not used: id"),
    ({"question": "2+2?", "choices": ["4"], "answer": "4"}, "it has question and answer"),
]  # fmt: skip


def test_columns_of_columns(tmp_path):
    row = {"task": {"ask": {"text": "2+2?"}, "id": 1}, "out.put": "4", "meta": {"by": "x"}}
    columns = {"question": "task.ask.text", "answer": "out.put", "system": "meta.by"}
    shape, (example,) = read(row, columns=columns)
    assert (shape.format, said(example)) == ("qa", [("system", "x"), *TALK])
    assert shape.evidence == "it has task.ask.text and out.put" and unused({**row, "id": 1}, shape) == ["id"]
    with pytest.raises(UserError, match=r"column 'task\.ask\.words' not found.*; the file has \[task, out.put, meta"):
        read(row, columns={**columns, "question": "task.ask.words"})
    with pytest.raises(UserError, match=r"column 'task\.ask\.text' not found"):
        read_examples({**row, "task": None}, shape, "file:2")


@pytest.mark.parametrize("row,wanted", NOT_USED)
def test_columns_that_nothing_is_made_of_are_named(row, wanted, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    cfg = Data(sources=(Source(path=str(file)),))
    assert opened(cfg.sources[0], cfg, [file], "key")[0].evidence == wanted


def test_columns_of_prompts_and_of_a_function_are_for_whoever_reads_them(tmp_path):
    row = {"prompt": "2+2?", "answer": "4", "level": 1}
    assert unused(row, choose_shape(row, "prompt", {}, {}, "key")) == []
    (tmp_path / "mine.py").write_text("def rows(row): return {'text': row['prompt']}")
    assert unused(row, choose_shape(row, f"{tmp_path}/mine.py:rows", {}, {}, "key")) == []


ASSISTANT = [{"role": "assistant", "content": "4"}]
WRONG = [{"role": "assistant", "content": "5"}]
RECORDS = [
    ("preference", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
    ("preference", {"chosen": [*CHAT], "rejected": [ASK, *WRONG]}),
    ("preference", {"prompt": "2+2?", "chosen": [*CHAT], "rejected": [ASK, *WRONG]}),
    ("preference", {"conversations": [{"from": "human", "value": "2+2?"}],
                    "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}),
    ("preference", {"chosen_messages": CHAT, "rejected_messages": [ASK, *WRONG]}),
    ("preference", {"instruction": "2+2?", "chosen_response": "4", "rejected_response": "5"}),
    ("preference", {"instruction": "2+2?", "input": "", "output": "4", "chosen": "4", "rejected": "5"}),
    ("preference", {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"}),
    ("ranked", {"prompt": "2+2?", "answers": [{"answer": "5", "rank": 3}, {"answer": "4", "rank": 1}]}),
]  # fmt: skip


@pytest.mark.parametrize("format,row", RECORDS)
def test_preferences(format, row):
    shape, (example,) = read(row)
    assert (shape.format, kind(shape.format)) == (format, "preference")
    assert said(example) == [("user", "2+2?")]
    assert example.record == {"chosen": ASSISTANT, "rejected": WRONG}


def test_preferences_part_where_they_differ():
    again = {"role": "user", "content": "sure?"}
    (example,) = read({"chosen": [ASK, *ASSISTANT, again, *ASSISTANT], "rejected": [ASK, *WRONG, again, *WRONG]})[1]
    assert said(example) == [("user", "2+2?")]
    assert [len(example.record[side]) for side in ("chosen", "rejected")] == [3, 3]


def test_other_records():
    shape, (example,) = read({"messages": CHAT, "label": True})
    assert (shape.format, said(example), example.record) == (
        "unpaired", TALK[:1], {"completion": ASSISTANT, "label": True},
    )  # fmt: skip
    for asked in ("prompt", "instruction", "question"):
        assert read({asked: "2+2?", "completion": "4", "label": False})[1][0].record["label"] is False
    shape, (example,) = read({"completion": [ASK, *ASSISTANT], "label": True})
    assert (shape.format, said(example), example.record["completion"]) == ("unpaired", TALK[:1], ASSISTANT)
    shape, (example,) = read({"prompt": "2+2?", "completions": ["a", "b"], "labels": [True, False]})
    assert (shape.format, example.record) == ("stepwise", {"completions": ["a", "b"], "labels": [True, False]})
    with pytest.raises(UserError, match="'completions' has 2 steps and 'labels' 1: each step needs its label"):
        read({"prompt": "2+2?", "completions": ["a", "b"], "labels": [True]})
    with pytest.raises(UserError, match="'completions' must be a list, an entry a step, here it is \"a b\""):
        read({"prompt": "2+2?", "completions": "a b", "labels": [True]})
    shape, (example,) = read({"messages": [ASK], "ground_truth": "4", "dataset": "x"})
    assert (shape.format, said(example), example.extra) == ("judged", TALK[:1], {"ground_truth": "4", "dataset": "x"})
    shape, (example,) = read({"id": 1, "question": [[ASK]], "function": [{"name": "f"}]})
    assert (shape.format, said(example), example.tools) == ("prompt", TALK[:1], [{"name": "f"}])


def text_of(example, tokenizer=None):
    tokenizer = tokenizer or FakeTokenizer()
    ids, trained = tokenize(example, tokenizer)
    return tokenizer.decode(ids), tokenizer.decode(ids[trained])


def test_without_a_template():
    (example,) = read({"segments": [{"text": "<s>ab", "label": False}, {"text": "cd</s>", "label": True}]})[1]
    assert text_of(example) == ("<s>abcd</s>", "cd</s>")
    (example,) = read({"prompt": "ab", "completion": "cd"})[1]
    assert text_of(example) == ("<s>abcd</s>", "cd</s>")
    (example,) = read({"input_ids": [97, 98, 99, 0], "labels": [-100, 98, 99, -100], "attention_mask": [1, 1, 1, 0]})[1]
    assert text_of(example) == ("abc", "bc")
    assert text_of(read({"input_ids": [97, 98]})[1][0]) == ("ab", "ab")


def test_calls_and_reasoning_in_every_spelling():
    call = {"name": "add", "arguments": {"a": 2}}
    wanted = [{"type": "function", "function": call}]
    rows = [
        {"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value": json.dumps(call)},
                           {"from": "observation", "value": "4"}]},
        {"messages": [ASK, {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(call)}]},
                      {"role": "tool", "content": "4"}]},
    ]  # fmt: skip
    for row in rows:
        example = read(row)[1][0]
        assert example.messages[1]["tool_calls"] == wanted and example.trained == [False, True, False]
        assert example.messages[2] == {"role": "tool", "content": "4"}
    parts = [{"type": "reasoning", "value": "so"}, {"type": "text", "value": "4"}]
    example = read({"messages": [ASK, {"role": "assistant", "content": parts}]})[1][0]
    assert example.messages[1] == {"role": "assistant", "content": "4", "reasoning_content": "so"}


def test_a_function_of_the_user(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def turns(row): return [{'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': row['a']}]\n"
        "def plain(row): return row['q'] + row['a'] if row['q'] else None\n"
        "def number(row): return 3\n"
        "def fails(row): return row['nothing']\n"
        "def two(row, more): return row\n"
    )
    row = {"q": "2+2?", "a": "4"}
    assert said(read(row, f"{file}:turns")[1][0]) == TALK
    assert read(row, f"{file}:plain")[1][0].text == "2+2?4"
    assert read({"q": "", "a": ""}, f"{file}:plain")[1] == []
    for name, words in (("number", "returned int"), ("fails", "KeyError"), ("two", "two"), ("none", "defines no")):
        with pytest.raises(UserError, match=words):
            read(row, f"{file}:{name}")


def test_columns_and_roles_are_mapped():
    row = {"frage": "2+2?", "antwort": "4"}
    assert said(read(row, columns={"question": "frage", "answer": "antwort"})[1][0]) == TALK
    assert said(read(row, columns={"instruction": "frage", "output": "antwort"})[1][0]) == TALK
    row = {"messages": [{"role": "kunde", "content": "2+2?"}, {"role": "wir", "content": "4"}]}
    assert said(read(row, roles={"kunde": "user", "wir": "assistant"})[1][0]) == TALK
    assert text_of(read({"content": "ab"}, columns={"text": "content"})[1][0])[0] == "<s>ab</s>"


@pytest.mark.parametrize(
    "row,words",
    [
        ({"segments": [{"text": "a"}]}, "label: true or false"),
        ({"input_ids": "12"}, "whole numbers"),
        ({"input_ids": [1, 2], "labels": [1]}, "2"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "must not be shifted"),
        ({"question": 3, "answer": "b"}, "must be text"),
        ({"question": "a", "answer": "b", "choices": "c"}, "must be a list"),
        ({"instruction": "a", "instances": "b"}, "list of objects"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{"}]}, "invalid JSON"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{}"}]}, "a name"),
        ({"messages": [ASK, {**ANSWER, "train_detail": [{"begin_offset": 0, "end_offset": 9}]}]}, "no range"),
        ({"messages": [ASK, {**ANSWER, "train_detail": 3}]}, "list of ranges"),
        ({"messages": "[{"}, "invalid JSON"),
        ({"message_tree_id": 1, "prompt": {"role": "prompter"}}, "no text"),
    ],
)
def test_broken_rows(row, words):
    with pytest.raises(UserError, match=words) as error:
        read(row)
    assert error.value.where == "file:1"


@pytest.mark.parametrize("row", [row for _, row in RECORDS] + [{"prompt": "x"}, {"id": 1, "ground_truth": 2}])
def test_what_cannot_be_imitated_says_so(tmp_path, row):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"not trained on|nothing to imitate") as error:
        load(Data(sources=(Source(path=str(file)),)), FakeTokenizer(), seed=0)
    assert error.value.where == "data.sources[0]"


SHAPES = {
    "lf_alpaca_en_demo": "alpaca", "lf_glaive_toolcall_en_demo": "sharegpt", "lf_reason_tool_use_demo_50": "messages",
    "lf_identity": "alpaca", "lf_v1_sft_demo": "messages", "self_instruct_seed_tasks": "instances",
    "rasbt_instruction-data": "alpaca", "fastchat_dummy_conversation": "sharegpt", "oasst_en_100_tree": "oasst",
    "axolotl_sharegpt_conversation": "sharegpt", "chatml": "messages", "conversations": "sharegpt",
    "sharegpt": "sharegpt", "alpaca": "alpaca", "swift_multi": "qa", "ifeval_input_data": "prompt",
    "BFCL_v4_simple_python": "prompt", "possible_answer": "reference", "gsm8k_train": "qa", "gsm8k_test": "qa",
    "gsm8k_example_model_solutions": "qa", "MATH_test": "qa", "openinstruct_rlvr_test": "judged",
    "humaneval": "completion", "math_verify_cases": "equivalence", "hendrycks_equivalence_cases": "equivalence",
    "lf_dpo_en_demo": "preference", "lf_kto_en_demo": "unpaired", "lf_v1_dpo_demo": "preference",
    "hh_harmless-base_test": "preference", "rasbt_instruction-data-with-preference": "preference",
    "torchtune_hh_rlhf_tiny": "preference", "tinyshakespeare": "text", "lf_wiki_demo": "text", "lf_c4_demo": "text",
    "botchan": "text", "the-verdict": "text",
}  # fmt: skip


def manifest():
    if not (ROOT / "MANIFEST.json").exists():
        return []
    kinds = ("instruct", "preference", "math", "pretrain")
    return [e for e in json.loads((ROOT / "MANIFEST.json").read_text()) if e["file"].split("/")[0] in kinds]


@pytest.mark.skipif(not manifest(), reason="the shared data is not on this machine")
@pytest.mark.parametrize("entry", manifest(), ids=lambda entry: entry["file"])
def test_real_files_are_told_by_their_columns(entry):
    """Every row of every real file becomes a record of its shape; what can be trained on is."""
    file = ROOT / entry["file"]
    folder, name = entry["file"].split("/")[-2:]
    shape, found = examples(Source(path=str(file)))
    found = list(found)
    assert shape.format == SHAPES[folder if folder in SHAPES and folder != "instruct" else name.split(".")[0]]
    assert shape.format in FORMATS
    if entry["records"] is not None:
        assert len({example.where for example in found}) == entry["records"]
    assert all(e.messages or e.text or e.segments or e.record is not None for e in found)
    if kind(shape.format) == "train":
        trained = [tokenize(example, FakeTokenizer())[1].any() for example in found[:50]]
        assert sum(trained) >= 0.9 * len(trained)


def test_every_format_is_met_by_a_row():
    seen = {format for format, _, _ in ROWS} | {format for format, _ in RECORDS} | {"text", *SHAPES.values()}
    assert seen | {"segments", "pretokenized", "stepwise"} == set(FORMATS)
