"""A tokenizer from nothing: the same every time, equal in ftlib and transformers, and one that loses no text."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import transformers

from ftlib import tokenizers
from ftlib.tokenizers.templates import BUILTIN

FILE = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"
STORY = "the quick brown fox jumps over the lazy dog and the other lazy dogs of the town, again and again. "
SIZE = 330
TALK = [{"role": "user", "content": "the quick fox?"}, {"role": "assistant", "content": "again and again"}]
TEXTS = [
    "the quick brown fox", "", " two  spaces\t\n\r\n", "Grüße, 東京! 🙂 e\u0301", "12345", "don't <|im_", "\x00\x7f",
    "<|im_start|>user\nx<|im_end|>", "<call>x</call>",
]  # fmt: skip


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_tokenizer", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": STORY[n:] + STORY[:n]}) + "\n" for n in range(90)))
    (folder / "b.csv").write_text("question,answer\n" + "what does the fox do,it jumps over the lazy dogs\n" * 20)
    (folder / "c.jsonl").write_text((json.dumps({"messages": TALK}) + "\n") * 20)
    return folder


CHAT = ["--template", "chatml", "--eos", "<|im_end|>", "--special", "<|im_start|>", "--visible", "<call>", "</call>"]


def make(tool, out, sources, *words, size=SIZE):
    assert tool.main([str(out), *map(str, sources), "--vocab-size", str(size), *words]) == 0
    return tokenizers.from_pretrained(out), transformers.AutoTokenizer.from_pretrained(out)


@pytest.fixture(scope="module")
def chat(tool, sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    return out, *make(tool, out, sorted(sources.iterdir()), *CHAT)


def test_ids_are_equal_in_both_libraries_and_lose_nothing(chat):
    _, ours, theirs = chat
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.vocab_size == SIZE == len(theirs)
    assert ours.eos_id == theirs.eos_token_id == 1 and ours.pad_id == theirs.pad_token_id == 0
    assert ours.stop_ids == {1} and ours.decode(ours.encode("<call><|im_end|>"), skip_special=True) == "<call>"
    assert len(ours.encode(STORY)) < len(STORY) / 3  # it has learned


def test_template_is_part_of_it(chat):
    _, ours, theirs = chat
    made = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert ours.apply_chat_template(TALK) == made["input_ids"]
    assert sum(made["assistant_masks"]) > 1


def test_what_the_template_marks_turns_with_is_special_and_ends_answers(tool, sources, tmp_path, capsys):
    ours, theirs = make(tool, tmp_path / "t", [sources / "c.jsonl"], "--template", "chatml", size=275)
    assert "special: <|pad|> <|endoftext|> <|im_start|> <|im_end|>" in capsys.readouterr().out
    assert [ours.special_tokens[f"<|im_{name}|>"] for name in ("start", "end")] == [2, 3]
    assert ours.encode("<|im_start|>") == [2] == theirs.encode("<|im_start|>", add_special_tokens=False)
    assert ours.stop_ids == {1, 3} and ours.apply_chat_template(TALK)[0] == 2


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_no_marker_of_a_template_is_cut_into_pieces(tool, name):
    """Of templates with markers; others write plain words."""
    template, names = BUILTIN[name], {"eos_token": "<eos>", "bos_token": ""}
    marked, stops = tool.markers(template, **names)
    text = tool.render_chat_template(template, TALK, **names)
    assert not re.search(r"<\||\|>|_of_turn", re.sub("|".join(map(re.escape, marked)) or "-", "", text))
    assert set(stops) <= set(marked) and len(stops) == ("<eos>" not in text and bool(marked))


def test_equal_text_gives_equal_bytes(chat, tool, sources, tmp_path):
    make(tool, tmp_path / "again", sorted(sources.iterdir()), *CHAT)
    for file in chat[0].iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_no_merge_crosses_a_special_token(tool):
    made = tool.train(["ab<x>ab<x>" * 500] * 9, 258, ["<x>"], [])
    assert not any("x>" in token or "<" in token for token in made.get_vocab() if token not in ("<x>", "<"))


def test_text_alone_needs_no_template_and_bos_begins_texts(tool, sources, tmp_path):
    ours, theirs = make(tool, tmp_path / "t", [sources / "a.jsonl"], "--bos", "<s>", size=300)
    assert ours.chat_template is None and ours.bos_id == theirs.bos_token_id == 1
    assert ours.encode("the fox", bos=True) == [1, *theirs.encode("the fox", add_special_tokens=False)]


@pytest.mark.parametrize(
    "name,words,fact",
    [
        ("c.jsonl", [], "give --template"),
        ("a.jsonl", ["--vocab-size", "200"], "at least 258"),
        ("a.jsonl", ["--vocab-size", "90000"], "too few pairs"),
        ("none.jsonl", [], "no such file"),
        ("a.jsonl", ["--template", "nothing"], "no chat template is called"),
    ],
)
def test_mistakes_are_one_message(tool, sources, tmp_path, capsys, name, words, fact):
    assert tool.main([str(tmp_path / "out"), str(sources / name), "--vocab-size", "300", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and fact in said
    assert not (tmp_path / "out").exists()
