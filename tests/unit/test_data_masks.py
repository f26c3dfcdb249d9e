"""Which tokens are trained: roles, ends of turns, single messages, ranges, thinking; and what always holds."""

import random

import numpy as np
import pytest
from fake_tokenizer import FakeTokenizer
from shared_data import shared

from ftlib.data import Documents, load, preview, thinking
from ftlib.data.documents import SourceInfo
from ftlib.data.formats import choose_shape, read_example
from ftlib.data.masks import tokenize
from ftlib.data.preview import merged
from ftlib.errors import UserError
from ftlib.sections import Data, Source
from ftlib.tokenizers import BUILTIN, load_template
from ftlib.tokenizers.spans import render_with_spans

TALK = [
    {"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "No"},
]  # fmt: skip
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


class Rendering(FakeTokenizer):
    """The fake tokenizer with a real template."""

    def __init__(self, template):
        self.template = template

    def render_with_spans(self, messages, tools=None, roles=("assistant",)):
        return render_with_spans(self.template, messages, {**SPECIAL, "tools": tools, "documents": None}, roles)


def example(messages=TALK, train_on=("assistant",)):
    row = {"messages": messages}
    return read_example(row, choose_shape(row, "auto", {}, {}, "key", train_on), "file:1")


def pieces(example, tokenizer=None, end="all"):
    """Trained stretches of text."""
    tokenizer = tokenizer or FakeTokenizer()
    ids, trained = tokenize(example, tokenizer, end)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]])))
    return [tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_roles_that_are_trained():
    assert pieces(example()) == ["Yes<|im_end|>", "No<|im_end|>"]
    assert pieces(example(train_on=("user", "assistant"))) == [
        "Hi<|im_end|>", "Yes<|im_end|>", "Bye<|im_end|>", "No<|im_end|>",
    ]  # fmt: skip
    assert pieces(example(train_on=("user",))) == ["Hi<|im_end|>", "Bye<|im_end|>"]
    for name in ("chatml", "llama3", "vicuna"):
        found = "".join(pieces(example(train_on=("system", "user")), Rendering(load_template(name))))
        assert [part in found for part in ("S", "Hi", "Bye", "Yes", "No")] == [True, True, True, False, False]


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("end,ends", [("all", 2), ("last", 1), ("none", 0)])
def test_ends_of_turns(name, end, ends):
    found = [text.strip() for text in pieces(example(TALK[1:]), Rendering(load_template(name)), end)]
    assert [text.startswith(said) for text, said in zip(found, ("Yes", "No"), strict=True)] == [True, True]
    assert [text not in ("Yes", "No") for text in found] == [ends > 1, ends > 0]


def test_single_messages():
    talk = [dict(m) for m in TALK]
    talk[2]["train"], talk[1]["train"] = False, True
    assert pieces(example(talk)) == ["Hi<|im_end|>", "No<|im_end|>"]


def test_ranges_of_characters():
    detail = [{"begin_offset": 0, "end_offset": 1, "train": False}, {"begin_offset": 2, "end_offset": 4, "train": True}]
    talk = [TALK[1], {"role": "assistant", "content": "so yes", "train_detail": detail}]
    assert pieces(example(talk)) == [" ye"]
    detail = [{"begin_offset": 3, "end_offset": 5}]
    talk = [TALK[1], {"role": "assistant", "content": "so yes", "train_detail": detail}]
    assert pieces(example(talk)) == ["yes<|im_end|>"] and pieces(example(talk), end="none") == ["yes"]


GLM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_terminator_that_the_next_turn_writes_is_trained():
    assert pieces(example(TALK[1:]), Rendering(GLM)) == ["Yes<|user|>", "No</s>"]
    assert pieces(example(TALK[1:]), Rendering(GLM), "last") == ["Yes", "No</s>"]
    assert pieces(example(TALK[1:]), Rendering(GLM), "none") == ["Yes", "No"]
    outside = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    )
    assert pieces(example(TALK[1:]), Rendering(outside)) == ["Yes</s>", "No</s>"]
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    with pytest.raises(UserError, match="could not learn to stop"):
        pieces(example(TALK[1:]), Rendering(endless))


def test_real_glm_template():
    found = pieces(example(TALK[1:]), Rendering(shared("chat_templates/trl/glm4moe.jinja").read_text()))
    assert found[0].endswith("Yes<|user|>") and found[1].endswith("No</s>")


@pytest.mark.parametrize(
    "mode,content,reasoning",
    [("keep", "<think>so</think>\n\nYes", None), ("drop", "Yes", None), ("split", "Yes", "so")],
)
def test_thinking(mode, content, reasoning):
    said = {"role": "assistant", "content": "<think>so</think>\n\nYes"}
    made = example([TALK[1], said, {"role": "user", "content": "<think>mine</think>"}])
    made.trained[1] = [(20, 22, 0.5)]
    thinking.apply(made, mode)
    assert (made.messages[1]["content"], made.messages[1].get("reasoning_content")) == (content, reasoning)
    assert made.messages[2]["content"] == "<think>mine</think>"
    (start, end, weight), = made.trained[1]
    assert content[start:end] == "es" and weight == 0.5
    other = example([TALK[1], {"role": "assistant", "content": "Yes", "reasoning_content": "so"}])
    thinking.apply(other, mode)
    assert ("reasoning_content" in other.messages[1]) == (mode != "drop")


@pytest.mark.parametrize("seed", range(30))
def test_random_conversations_train_exactly_what_was_said(seed):
    """Any template of ours, any roles, text that looks like markers: the trained text is the trained messages'."""
    draw = random.Random(seed)
    words = ["a", "<|im_end|>", "<|im_start|>assistant", "\n", "  ", "ü", "[INST]", "</s", "{{ x }}", "Yes"]
    talk = []
    for number in range(draw.randrange(1, 5)):
        for role in ("user", "assistant"):
            talk.append({"role": role, "content": f"{number}{role[0]} " + "".join(draw.choices(words, k=4)) + "."})
        if draw.random() < 0.3:
            talk[-1]["train"] = False
    name = draw.choice(sorted(BUILTIN))
    tokenizer = Rendering(load_template(name))
    found = pieces(example(talk), tokenizer)
    wanted = [m["content"] for m in talk if m["role"] == "assistant" and m.get("train", True)]
    assert len(found) == len(wanted)
    assert all(said.strip() in text and len(text) <= len(said) + 30 for text, said in zip(found, wanted, strict=True))


def write(tmp_path, texts):
    import json

    file = tmp_path / "a.jsonl"
    file.write_text("".join((t if t[:1] == "{" else json.dumps({"text": t})) + "\n" for t in texts))
    return (Source(path=str(file)),)


def test_selected_documents_keep_their_source():
    rows = [(np.array([n, n]), np.ones(2, bool)) for n in range(4)]
    infos = (SourceInfo("a", "a", 1.0), SourceInfo("b", "b", 2.0))
    found = Documents.from_rows(rows, sources=infos, source_ids=np.array([0, 1, 0, 1], np.int32))
    chosen = found.select(np.array([False, True, True, True]))
    assert [document.source for document in chosen] == ["b", "a", "b"]
    assert sorted(chosen.of_epoch(0, 0).tolist()) == [0, 0, 1, 2, 2]


def test_preview_is_the_text(tmp_path):
    found = load(Data(sources=write(tmp_path, ["hällo 👩"])), FakeTokenizer(), seed=0).train
    shown = preview(found, FakeTokenizer(), 0)
    assert "".join(text for text, _ in shown) == "<s>hällo 👩</s>"
    assert merged(shown) == [("<s>", False), ("hällo 👩</s>", True)]


def test_bad_rows_are_skipped_or_listed(tmp_path):
    sources = write(tmp_path, ["ab", "{broken", "cd", '{"text": 3}'])
    for policy in ("skip", "report"):
        loaded = load(Data(sources=sources, on_bad_row=policy), FakeTokenizer(), seed=0)
        lines = "\n".join(loaded.report.lines())
        assert len(loaded.train) == 2 and "dropped 2: a broken row" in lines
        assert ("a.jsonl:2:2: invalid JSON" in lines and "a.jsonl:4: column 'text'" in lines) == (policy == "report")
    sources = write(tmp_path, ["{broken", "ab"])
    assert len(load(Data(sources=sources, on_bad_row="skip"), FakeTokenizer(), seed=0).train) == 1
    with pytest.raises(UserError, match="invalid JSON"):
        load(Data(sources=write(tmp_path, ["{broken"]), on_bad_row="skip"), FakeTokenizer(), seed=0)


def test_repeats_and_overlap(tmp_path):
    sources = write(tmp_path, ["ab", "cd", "ab", "ef", "ab"])
    (tmp_path / "held.jsonl").write_text('{"text": "cd"}\n{"text": "gh"}')
    cfg = {"sources": sources, "eval": (Source(path=str(tmp_path / "held.jsonl")),)}
    plain = load(Data(**cfg), FakeTokenizer(), seed=0)
    lines = "\n".join(plain.report.lines())
    assert len(plain.train) == 5 and "2 of 5 training documents are exact repeats" in lines
    assert "warning: 1 of 2 documents of held are in the training data" in lines
    clean = load(Data(**cfg, deduplicate=True), FakeTokenizer(), seed=0)
    lines = "\n".join(clean.report.lines())
    assert [clean.train.where(i).rsplit(":")[-1] for i in range(len(clean.train))] == ["1", "4"]
    assert "left out 2 exact repeats" in lines and "left out 1 training documents" in lines and "warning" not in lines


def test_overlong_rows_are_split(tmp_path):
    loaded = load(Data(sources=write(tmp_path, ["x" * 60, "y"]), seq_len=25, overlong="split"), FakeTokenizer(), seed=0)
    assert loaded.train.lengths.tolist() == [25, 25, 12, 3]
    assert FakeTokenizer().decode(np.concatenate([d.input_ids for d in loaded.train])) == f"<s>{'x' * 60}</s><s>y</s>"
    assert loaded.report.sources[0].changed == {"split at data.seq_len=25 tokens": 1}
