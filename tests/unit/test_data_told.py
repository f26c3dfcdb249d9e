"""What loading would otherwise lose without a word is counted, and said wherever rows are looked at."""

import json

import pytest
from fake_tokenizer import FakeTokenizer

from ftlib.cli import doctor
from ftlib.data import load
from ftlib.data.streaming import open_stream
from ftlib.errors import UserError
from ftlib.sections import Data, Source
from ftlib.sections.stream import Stream
from ftlib.tokenizers.spans import render_with_spans

ASKED = {"role": "user", "content": "2+2?"}
WRITES = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{{ (m.reasoning_content or '') ~ '|' ~ m.content ~ eos_token }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}"
)


class Writing(FakeTokenizer):
    """A template that has a place for `reasoning_content`."""

    def render_with_spans(self, messages, tools=None, roles=("assistant",)):
        return render_with_spans(WRITES, messages, {"eos_token": "</s>", "tools": tools, "documents": None}, roles)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(file))


def told(tmp_path, rows, tokenizer=None, **changes):
    loaded = load(Data(sources=(write(tmp_path / "a.jsonl", rows),), **changes), tokenizer or FakeTokenizer(), seed=0)
    return "\n".join(loaded.report.lines())


REASONED = {"messages": [ASKED, {"role": "assistant", "content": "so 4", "reasoning_content": "4"}]}
THOUGHT = {"messages": [ASKED, {"role": "assistant", "content": "<think>two twice</think>\n4"}]}


def test_reasoning_that_a_template_leaves_out_is_told(tmp_path, capsys):
    """Whatever it is called, and though the answer holds the same words; not where it is rendered or unwanted."""
    other = {"messages": [ASKED, {"role": "assistant", "content": "4", "thinking": "two twice"}]}
    said = told(tmp_path, [REASONED, other, THOUGHT])
    assert "the reasoning of 2 messages is not in what the template renders" in said
    assert "data.template" in said and "data.thinking=drop" in said
    assert "the reasoning of 3 messages" in told(tmp_path, [REASONED, other, THOUGHT], thinking="split")
    said_before = {"messages": [ASKED, {"role": "assistant", "content": "two twice"}, *other["messages"]]}
    assert "the reasoning of 1 message" in told(tmp_path, [said_before])
    for quiet in (
        told(tmp_path, [REASONED, other, THOUGHT], thinking="drop"), told(tmp_path, [REASONED], Writing()),
        told(tmp_path, [THOUGHT], Writing()), told(tmp_path, [THOUGHT], Writing(), thinking="split"),
    ):  # fmt: skip
        assert "reasoning" not in quiet
    write(tmp_path / "a.jsonl", [REASONED, other, THOUGHT])
    assert doctor.main([str(tmp_path / "a.jsonl")]) == 0  # the demo model's template has no place for it
    assert "the reasoning of 2 messages is not in what" in capsys.readouterr().out


def test_reasoning_is_still_told_of_what_was_tokenised_before(tmp_path):
    for _ in range(2):
        said = told(tmp_path, [REASONED], cache=str(tmp_path / "cache"))
    assert "tokenised before" in said and "the reasoning of 1 message" in said


def test_reasoning_that_is_left_out_of_a_stream_is_told_of_its_beginning(tmp_path):
    def streamed(tokenizer, **changes):
        source = write(tmp_path / "a.jsonl", [REASONED, THOUGHT, {"messages": 3}] * 100)
        data = Data(sources=(source,), on_bad_row="skip", **changes)
        plan = open_stream(data, Stream(), tokenizer, rows=1, seed=0, vocab=1 << 20)
        return "\n".join(plan.report.lines())

    said = streamed(FakeTokenizer())
    assert "the reasoning of 86 messages in its first 256 rows is not in what the template renders" in said
    assert "data.thinking=drop" in said
    for quiet in (streamed(FakeTokenizer(), thinking="drop"), streamed(Writing())):
        assert "read while training" in quiet and "reasoning" not in quiet


def test_a_source_that_repeats_another_is_told(tmp_path):
    """By source, with what remains; and that a weight does nothing where no row remains."""
    zst = write(tmp_path / "zst.jsonl", [{"text": f"row {n}"} for n in (0, 1, 2, 3, 3)])
    pq = Source(path=write(tmp_path / "pq.jsonl", [{"text": f"row {n}"} for n in range(3)]).path, weight=0.5)
    lines = "\n".join(load(Data(sources=(zst, pq), deduplicate=True), FakeTokenizer(), seed=0).report.lines())
    assert "left out 4 exact repeats" in lines
    assert "zst: 5 rows, 1 are repeats of itself: 4 left" in lines
    assert "pq: 3 rows, 3 are repeats of zst: none left" in lines
    assert "warning: no row of pq is left to train on, so its weight 0.5 does nothing" in lines
    assert "zst: weight 1, 4 rows an epoch, 100.0% of the tokens" in lines


def test_weighted_sources_say_their_shares(tmp_path):
    rows = [{"text": "row"}] * 10
    plain, half = write(tmp_path / "a.jsonl", rows), Source(path=write(tmp_path / "b.jsonl", rows).path, weight=0.5)
    lines = "\n".join(load(Data(sources=(plain, half)), FakeTokenizer(), seed=0).report.lines())
    assert "a: weight 1, 10 rows an epoch, 66.7% of the tokens" in lines
    assert "b: weight 0.5, 5 rows an epoch, 33.3% of the tokens" in lines and "none left" not in lines
    assert "weight" not in "\n".join(load(Data(sources=(plain,)), FakeTokenizer(), seed=0).report.lines())


def test_a_column_that_mixes_text_and_lists_is_told(tmp_path):
    plain = {"prompt": "2+2 =", "completion": " 4"}
    lists = {"prompt": [ASKED], "completion": [{"role": "assistant", "content": "4"}]}
    said = told(tmp_path, [plain, lists, plain])
    assert "warning: 1 of 3 rows hold lists of messages, which the chat template writes; the others are text" in said
    for alike in ([plain] * 3, [lists] * 3):
        said = told(tmp_path, alike)
        assert "chat template" not in said
    for name, value, what in (("completion", "4", "at least one in it"), ("prompt", ["2+2?"], "role and content")):
        with pytest.raises(UserError, match=f"{what}, here it is"):
            told(tmp_path, [lists, {**lists, name: value}])


LEAVES_OUT = """
def rows(row):
    return row["text"] if len(row["text"]) > 1 else None
"""


def test_rows_that_a_function_leaves_out_are_told(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(LEAVES_OUT)
    source = write(tmp_path / "a.jsonl", [{"text": "long"}, {"text": "s"}, {"text": "h"}])
    source = Source(path=source.path, format=f"{tmp_path}/mine.py:rows")
    lines = "\n".join(load(Data(sources=(source,)), FakeTokenizer(), seed=0).report.lines())
    assert "3 rows" in lines and "dropped 2: format" in lines and "mine.py:rows made nothing of it" in lines
    assert doctor.main([source.path, "--format", source.format]) == 0
    said = capsys.readouterr().out
    assert "rows: 3" in said and "mine.py:rows made nothing of it: 2 rows" in said


OTHER_KINDS = [  # a row, another one: what doctor says of them
    ({"prompt": "2+2?", "chosen": "4", "rejected": "five"}, {"prompt": "3+3?", "chosen": "6", "rejected": "six"},
     ["pairs of answers", "recipes/dpo.py", "tokens of a prompt: ", "of a chosen answer: ", "of a rejected answer: "]),
    ({"prompt": "2+2?", "completion": "4", "label": True}, {"prompt": "2+2?", "completion": "5", "label": False},
     ["good or bad", "dpo.loss=kto", "tokens of a good answer: ", "tokens of a bad answer: "]),
    ({"prompt": "2+2?", "ground_truth": "4"}, {"prompt": "3+3?", "ground_truth": "6"},
     ["prompts without answers", "recipes/grpo.py", "tokens of a prompt: "]),
    ({"id": 1, "ground_truth": "4"}, {"id": 2, "ground_truth": "6"}, ["references", "nothing trains on them"]),
    ({"prompt": "2+2?", "completions": ["two", "4"], "labels": [True, True]},
     {"prompt": "2+2?", "completions": ["two", "5"], "labels": [True, False]}, ["reward.kind=steps", "steps: "]),
]  # fmt: skip


@pytest.mark.parametrize("row,other,facts", OTHER_KINDS)
def test_doctor_reports_on_data_of_every_kind(tmp_path, capsys, row, other, facts):
    source = write(tmp_path / "a.jsonl", [row, other, row, {"odd": 1}])
    held_out = write(tmp_path / "b.jsonl", [other])
    words = [source.path, "--eval", held_out.path, "--out", str(tmp_path / "out")]
    assert doctor.main(words) == 0
    said = capsys.readouterr().out
    broken = [] if "id" in row else ["broken: 1 rows", "a.jsonl:4: broken"]
    for fact in ("rows: 4", "exact repeats: 1 rows", "held out as well: 1 rows", *broken, *facts):
        assert fact in said, said
    assert (tmp_path / "out" / "rows.csv").read_text().count("\n") == 5
    assert "<mark>" not in (tmp_path / "out" / "report.html").read_text()


def test_doctor_counts_pairs_that_teach_nothing(tmp_path, capsys):
    good, same = ({"prompt": "2+2?", "chosen": "4", "rejected": said} for said in ("five", "4"))
    source = write(tmp_path / "a.jsonl", [good, same])
    assert doctor.main([source.path, "--seq-len", "4"]) == 0
    said = capsys.readouterr().out
    assert "chosen and rejected are the same: 1 rows" in said and "longer than 4 tokens: 1 rows" in said
    thought = {"role": "assistant", "content": "4", "reasoning_content": "two twice"}
    write(tmp_path / "a.jsonl", [{"prompt": "2+2?", "chosen": [thought], "rejected": "five"}])
    assert doctor.main([source.path]) == 0 and "the reasoning of 1 message" in capsys.readouterr().out
    (tmp_path / "a.jsonl").write_text('{"chosen": 3, "rejected": "b"}')
    with pytest.raises(UserError, match="chosen"):
        doctor.main([source.path])
