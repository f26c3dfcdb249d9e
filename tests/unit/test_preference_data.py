"""Rows with better and worse answers: what becomes of them, what is dropped and why, and how they lie in batches."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from shared_data import shared
from tiny_model import write_model, write_tokenizer

from ftlib import data, models, tokenizers
from ftlib.data import Preferences, Wanted
from ftlib.errors import UserError
from ftlib.models import hub
from ftlib.preference.answers import answer_logprobs
from ftlib.sections import Data, Source

PAIRS, RATED, STEPS = Wanted("pairs"), Wanted("rated"), Wanted("steps")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return tokenizers.from_pretrained(folder)


def tiny(name, folder):
    return models.from_pretrained(write_model(folder / "model", name))


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def load(rows, tokenizer, folder, wanted=PAIRS, **settings):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = Data(sources=(Source(path=str(file)),), **{"seq_len": 200, **settings})
    return data.load(cfg, tokenizer, seed=0, wanted=wanted)


def texts(preferences, index, tokenizer):
    """Of each answer of a unit: all of its text, and what is trained."""
    found = []
    for piece in preferences.pieces(index):
        assert np.array_equal(piece.ids[piece.rows + 1], piece.targets)
        found.append((tokenizer.decode(piece.ids.tolist()), tokenizer.decode(piece.targets.tolist())))
    return found


ONE = ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "four<|im_end|>", "five<|im_end|>")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "four", "rejected": "five"},
        {"prompt": [user("2+2?")], "chosen": [assistant("four")], "rejected": [assistant("five")]},
        {"chosen": [user("2+2?"), assistant("four")], "rejected": [user("2+2?"), assistant("five")]},
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: four", "rejected": "\n\nHuman: 2+2?\n\nAssistant: five"},
        {"instruction": "2+2?", "input": "", "output": "4", "chosen": "four", "rejected": "five"},
        {"conversations": [{"from": "human", "value": "2+2?"}],
         "chosen": {"from": "gpt", "value": "four"}, "rejected": {"from": "gpt", "value": "five"}},
        {"prompt": "2+2?", "answers": [{"answer": "5 or so", "rank": 1}, {"answer": "five", "rank": 2},
                                       {"answer": "four", "rank": 0}]},
    ],
    ids=["text", "messages", "common prefix", "hh", "alpaca", "sharegpt", "ranked"],
)  # fmt: skip
def test_every_shape_gives_the_same_pair(row, tokenizer, tmp_path):
    preferences = Preferences(load([row], tokenizer, tmp_path).train)
    (chosen, rejected) = texts(preferences, 0, tokenizer)
    prompt, good, bad = ONE
    assert chosen == (prompt + good + "\n", good)
    assert rejected == (prompt + bad + "\n", bad)
    assert preferences.lengths.tolist() == [sum(len(text) for text, _ in map(_plain, (chosen, rejected)))]


def _plain(texts):
    """A special token is one token: count it as one letter."""
    return tuple(text.replace("<|im_start|>", "#").replace("<|im_end|>", "#") for text in texts)


def test_only_what_differs_is_trained_in_a_long_conversation(tokenizer, tmp_path):
    history = [user("a"), assistant("b"), user("c")]
    call = assistant("look", name="x")
    row = {"chosen": [*history, call, user("seen"), assistant("yes")], "rejected": [*history, assistant("no")]}
    chosen, rejected = texts(Preferences(load([row], tokenizer, tmp_path).train), 0, tokenizer)
    assert chosen[1] == "look<|im_end|>yes<|im_end|>" and rejected[1] == "no<|im_end|>"


def test_calls_of_tools_are_trained_and_what_tools_say_is_not(tmp_path):
    tokenizer = tokenizers.from_pretrained(hub.resolve("ftlib:demo/model"))
    tool = {"name": "add", "description": "Sum.", "parameters": {"type": "object", "properties": {}}}
    asks = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}]}
    chosen = [{"role": "assistant", "content": None, **asks}, {"role": "tool", "content": "4"}, assistant("It is 4.")]
    row = {"tools": [{"type": "function", "function": tool}], "prompt": [user("2+2?")], "chosen": chosen}
    pair = load([row | {"rejected": [assistant("5")]}], tokenizer, tmp_path, seq_len=400).train
    (whole, trained), (other, rejected) = texts(Preferences(pair), 0, tokenizer)
    called = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 2}}</tool_call><|im_end|>'
    assert trained == f"{called}It is 4.<|im_end|>"
    assert rejected == "5<|im_end|>" and all('"description": "Sum."' in text for text in (whole, other))


def test_answers_that_begin_alike_are_trained_from_their_first_token(tokenizer, tmp_path):
    """Losses that look at each answer alone, and lengths, need what both have in common too."""
    row = {"prompt": "2+2?", "chosen": "it is four", "rejected": "it is five"}
    for wanted in (PAIRS, RATED):
        found = Preferences(load([row], tokenizer, tmp_path, wanted).train)
        trained = [text for index in range(len(found)) for _, text in texts(found, index, tokenizer)]
        assert trained == ["it is four<|im_end|>", "it is five<|im_end|>"]


def test_what_is_dropped_and_cut_is_counted(tokenizer, tmp_path):
    rows = [
        {"prompt": "q", "chosen": "right", "rejected": "wrong"},
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": "", "rejected": "wrong"},
        {"prompt": "long " * 60, "chosen": "right", "rejected": "wrong"},
        {"prompt": "q", "chosen": "long " * 60, "rejected": "wrong"},
    ]
    found = load(rows, tokenizer, tmp_path)
    (report,) = found.report.sources
    assert report.dropped == {
        "chosen and rejected are the same": 1,
        "an answer has no trained token": 1,
        "longer than data.seq_len=200 tokens (both answers, each behind its prompt)": 2,
    }
    cut = load(rows, tokenizer, tmp_path, overlong="truncate")
    (report,) = cut.report.sources
    assert [n for reason, n in report.dropped.items() if "longer than" in reason] == [1], "answers keep their end"
    assert report.changed == {"beginning of the prompt cut off at data.seq_len=200 tokens": 1}
    preferences = Preferences(cut.train)
    assert preferences.lengths.max() <= 200
    chosen, rejected = texts(preferences, 1, tokenizer)
    assert chosen[1] == "right<|im_end|>" and rejected[1] == "wrong<|im_end|>"
    assert chosen[0].startswith("ong long") or chosen[0].endswith("right<|im_end|>\n")
    with pytest.raises(UserError, match="both answers, each"):
        load(rows[3:4], tokenizer, tmp_path, overlong="error")


@pytest.mark.parametrize(
    ("wanted", "noun"), [(PAIRS, "1 pair (both answers, each"), (RATED, "2 rated answers (1 good, 1 bad)")]
)
def test_lengths_are_told_as_they_are_judged(wanted, noun, tokenizer, tmp_path):
    """What the report calls the length of a row is what the loader packs, and the least seq_len that holds it."""
    row = {"prompt": "long " * 20, "chosen": "right", "rejected": "wrong!"}
    found = load([row], tokenizer, tmp_path, wanted, seq_len=400)
    lengths = Preferences(found.train).lengths
    assert list(found.report.sources[0].lengths) == lengths.tolist()
    (line,) = found.report.totals
    assert noun in line and f"{lengths.sum()} tokens" in line and f"lengths {lengths.min()} to {lengths.max()}" in line
    assert len(load([row], tokenizer, tmp_path, wanted, seq_len=int(lengths.max())).train) == len(found.train)
    with pytest.raises(UserError, match=f"{lengths.max()} tokens"):
        load([row], tokenizer, tmp_path, wanted, seq_len=int(lengths.max()) - 1, overlong="error")


SHOWN = [
    (PAIRS, {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2}, ["chosen, better by 2", "rejected"]),
    (RATED, {"prompt": "q", "completion": "a", "label": False}, ["bad"]),
    (STEPS, {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, ["right, wrong"]),
]


@pytest.mark.parametrize(("wanted", "row", "said"), SHOWN, ids=lambda value: getattr(value, "kind", None))
def test_what_is_shown_says_which_answer_is_which(wanted, row, said, tokenizer, tmp_path):
    documents = Preferences(load([row], tokenizer, tmp_path, wanted).train).shown(0)
    assert [document.source.partition(", ")[2] for document in documents] == said
    ends = [document.input_ids[np.flatnonzero(document.labels != -100) + 1].tolist() for document in documents]
    if wanted is STEPS:
        assert ends == [[tokenizer.encode("\n")[0]] * 2], "the tokens that end the steps"
    else:
        assert all(tokenizer.decode(ids).endswith("<|im_end|>") for ids in ends)


def test_rows_that_say_nothing_of_better_and_worse_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="nothing says how good they are") as error:
        load([{"question": "a", "answer": "b"}], tokenizer, tmp_path)
    assert "`chosen` and `rejected`" in str(error.value)
    with pytest.raises(UserError, match="not trained on here") as error:
        load([{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer, tmp_path, Wanted())
    assert "recipes/dpo.py or recipes/reward.py (reward.kind=pairs) learns from these" in str(error.value)
    with pytest.raises(UserError, match="answers with a label") as error:
        load([{"prompt": "a", "completion": "b", "label": True}], tokenizer, tmp_path)
    assert "recipes/dpo.py with dpo.loss=kto (or bco) learns from these" in str(error.value)
    with pytest.raises(UserError, match='true or false for `label`, here: "yes"'):
        load([{"prompt": "a", "completion": "b", "label": "yes"}], tokenizer, tmp_path, RATED)
    with pytest.raises(UserError, match=r"message of data.train_on \(assistant\) with a text"):
        load([{"prompt": "a", "chosen": "", "rejected": ""}], tokenizer, tmp_path)
    own = tmp_path / "own.py"
    own.write_text("def rows(row):\n    return {'prompt': row['q'], 'chosen': row['a'], 'rejected': row['b']}\n"
                   "def messages(row):\n    return [{'role': 'user', 'content': row['q']}]\n")  # fmt: skip
    file = tmp_path / "own.jsonl"
    file.write_text('{"q": "2+2?", "a": "four", "b": "five"}\n')
    cfg = {name: Data(sources=(Source(path=str(file), format=f"{own}:{name}"),)) for name in ("rows", "messages")}
    found = data.load(cfg["rows"], tokenizer, seed=0, wanted=PAIRS)
    assert texts(Preferences(found.train), 0, tokenizer)[0][1] == "four<|im_end|>"
    with pytest.raises(UserError, match="gives no chosen and rejected"):
        data.load(cfg["messages"], tokenizer, seed=0, wanted=PAIRS)


def test_rated_answers_and_pairs_as_two_of_them(tokenizer, tmp_path):
    rows = [
        {"messages": [user("q"), assistant("good")], "label": True},
        {"prompt": "q", "completion": "bad", "label": False},
    ]
    found = Preferences(load(rows[:1], tokenizer, tmp_path, RATED).train)
    assert texts(found, 0, tokenizer)[0][1] == "good<|im_end|>" and found.values.tolist() == [1.0]
    found = Preferences(load(rows[1:], tokenizer, tmp_path, RATED).train)
    assert texts(found, 0, tokenizer)[0][1] == "bad<|im_end|>" and found.values.tolist() == [0.0]
    pair = [{"prompt": "q", "chosen": "good", "rejected": "bad"}]
    found = Preferences(load(pair, tokenizer, tmp_path, RATED).train)
    assert [texts(found, i, tokenizer)[0][1] for i in range(2)] == ["good<|im_end|>", "bad<|im_end|>"]
    assert found.values.tolist() == [1.0, 0.0] and found.answers == 1


def test_mismatched_answers_come_from_another_row(tokenizer, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": f"answer {i}" * (i + 1), "label": i % 2 == 0} for i in range(7)]
    loaded = load(rows, tokenizer, tmp_path, RATED)
    found = Preferences(loaded.train, mismatched=True, seed=3, seq_len=200)
    assert sorted(found.other) == list(range(7)) and (found.other != np.arange(7)).all()
    for index in range(7):
        (piece,) = found.with_other_answer(index, 200)
        text = tokenizer.decode(piece.ids.tolist())
        assert f"q{index}<" in text and text.endswith(f"answer {found.other[index]}<|im_end|>\n")
        assert found.lengths[index] == max(len(piece.ids), len(found.pieces(index)[0].ids))
    (short,) = found.with_other_answer(0, 40)
    assert len(short.ids) == 40


def test_margins(tokenizer, tmp_path):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [pair | {"margin": 1.5}, pair | {"score_chosen": 4, "score_rejected": 1}, pair]
    assert Preferences(load(rows, tokenizer, tmp_path).train).values.tolist() == [1.5, 3.0, 0.0]
    with pytest.raises(UserError, match="must be numbers"):
        load([pair | {"margin": "much"}], tokenizer, tmp_path)


def test_a_batch_says_which_hidden_state_predicts_what(tokenizer, tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "yes" * (i + 1), "rejected": "no"} for i in range(3)]
    found = Preferences(load(rows, tokenizer, tmp_path).train)
    batch = found.batch([[2, 0], [], [1]], 200, pad_id=256, max_documents=2)
    answers = batch.answers
    assert batch.input_ids.shape == (3, 200) and (batch.labels == -100).all()
    assert answers.units.tolist() == [2, 0, 1] and batch.target_tokens == len(answers.rows)
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[answers.rows + 1], answers.targets)
    for k, (unit, side) in enumerate((u, s) for u in (2, 0, 1) for s in (0, 1)):
        mine = answers.owners == k
        text = ("yes" * (unit + 1), "no")[side] + "<|im_end|>"
        assert tokenizer.decode(answers.targets[mine].tolist()) == text
        assert answers.lengths[k] == mine.sum() and answers.places[mine].tolist() == list(range(int(mine.sum())))
        assert tokenizer.decode([int(flat[answers.ends[k]])]) == "\n"
        ids = batch.layout.document_ids.flatten()
        assert (ids[answers.rows[mine]] == ids[answers.ends[k]]).all(), "an answer lies in one document"
    assert len(batch.layout.cu_seqlens) == 3 * (2 * 2 + 1) + 1


def test_steps_of_an_answer(tokenizer, tmp_path):
    rows = [
        {"prompt": "2+2+2?", "completions": ["2+2=4", "4+2=7"], "labels": [True, False]},
        {"prompt": "q", "completions": ["two\nlines"], "labels": [True]},
        {"prompt": "q", "completions": [], "labels": []},
    ]
    loaded = load(rows, tokenizer, tmp_path, Wanted("steps"))
    assert loaded.report.sources[0].dropped == {"a step holds the separator": 1, "no step": 1}
    found = Preferences(loaded.train)
    (piece,) = found.pieces(0)
    assert tokenizer.decode(piece.ids.tolist()).endswith("assistant\n2+2=4\n4+2=7\n")
    assert [tokenizer.decode([int(piece.ids[row])]) for row in piece.rows] == ["\n", "\n"]
    assert piece.targets.tolist() == [1, 0] and found.lengths.tolist() == [len(piece.ids)]
    last = Preferences(load(rows, tokenizer, tmp_path, Wanted("steps", last_only=True)).train)
    assert last.pieces(0)[0].targets.tolist() == [0]
    with pytest.raises(UserError, match="is 2 tokens"):
        load(rows, tokenizer, tmp_path, Wanted("steps", separator="\n\n"))


def test_cached_pairs_are_the_same(tokenizer, tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "a" * i + "!", "rejected": "b", "margin": i} for i in range(5)]
    fresh = load(rows, tokenizer, tmp_path, cache="none").train
    for said in (False, True):
        kept = load(rows, tokenizer, tmp_path, cache=str(tmp_path / "cache"), eval=0.2)
        assert kept.report.sources[0].cached == said
    again = load(rows, tokenizer, tmp_path, cache=str(tmp_path / "cache"), eval=0.2)
    everything = [*Preferences(again.train).values, *Preferences(again.eval["held_out"]).values]
    assert sorted(everything) == [0, 1, 2, 3, 4]
    assert Preferences(fresh).fingerprint != Preferences(again.train).fingerprint
    rated = load(rows, tokenizer, tmp_path, RATED, cache=str(tmp_path / "cache"))
    assert not rated.report.sources[0].cached and len(rated.train) == 10


REAL = {
    "lf_dpo_en_demo.json": (PAIRS, 20),
    "lf_v1_dpo_demo.jsonl": (PAIRS, 10),
    "rasbt_instruction-data-with-preference.json": (PAIRS, 20),
    "torchtune_hh_rlhf_tiny.json": (PAIRS, 1),
    "lf_kto_en_demo.json": (RATED, 20),
    "hh_harmless-base_test.jsonl.gz": (PAIRS, 20),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name, tokenizer):
    wanted, rows = REAL[name]
    source = Source(path=str(shared(f"preference/{name}")), split=f"[:{rows}]")
    found = data.load(Data(sources=(source,), seq_len=100_000), tokenizer, seed=0, wanted=wanted)
    (report,) = found.report.sources
    assert report.rows == rows == len(found.train) + sum(report.dropped.values())
    preferences = Preferences(found.train)
    for index in range(len(found.train)):
        answers = texts(preferences, index, tokenizer)
        assert len(answers) == (2 if wanted is PAIRS else 1)
        for whole, trained in answers:
            assert trained.endswith("<|im_end|>") and whole.rstrip("\n").endswith(trained)
            assert whole.startswith(("<|im_start|>user\n", "<|im_start|>system\n"))
        assert answers[0][0].split("assistant\n")[0] == answers[-1][0].split("assistant\n")[0]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "gemma-2-2b"])
def test_packed_padded_and_shared_prompts_are_one(name, backend, tokenizer, tmp_path):
    """Log-probabilities and gradients in float64, of answers that begin alike; the second model has short windows."""
    model = tiny(name, tmp_path).double()
    model.model.use_attention("reference" if name.startswith("gemma") else backend)
    rows = [
        {"prompt": "tell me more " * (i + 1), "chosen": "no, yes" * (i + 1), "rejected": "no, not " * (3 - i)}
        for i in range(3)
    ]
    documents = load(rows, tokenizer, tmp_path).train
    apart, shared = Preferences(documents), Preferences(documents, shared=True)
    assert shared.shared and shared.lengths.sum() < apart.lengths.sum()
    assert not Preferences(documents, shared="auto").shared or shared.lengths.sum() < 0.8 * apart.lengths.sum()
    found = []
    for batch in (
        apart.batch([[0, 1], [2]], 500, 256, 2),
        apart.batch([[0], [1], [2]], 300, 256, 1),
        shared.batch([[0, 1], [2]], 400, 256, 2),
        shared.batch([[0, 1, 2]], 500, 256, 4),
    ):
        logprobs = answer_logprobs(model(batch), model.lm_head.weight, batch.answers, **model.logit_terms)
        slopes = torch.linspace(-1, 1, len(logprobs), dtype=torch.float64)
        gradients = torch.autograd.grad(logprobs @ slopes, list(model.parameters()))
        flat = batch.input_ids.flatten()
        assert [tokenizer.decode([int(flat[end])]) for end in batch.answers.ends] == ["\n"] * 6
        found.append((logprobs, *gradients))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert (one - two).norm() <= 1e-11 * one.norm()


def test_keys_that_segments_read_are_those_that_the_mask_shows(tokenizer, tmp_path):
    """What the GPU's kernel is told: each segment's queries stand at the end of its keys. Prompts are so long, and rows
    so full, that there are more than twice as many keys as queries."""
    rows = [{"prompt": "q" * (9 * i + 50), "chosen": "yes" * (i + 1), "rejected": "no"} for i in range(3)]
    pairs = Preferences(load(rows, tokenizer, tmp_path).train, shared=True)
    length = int(pairs.lengths[0] + pairs.lengths[2])
    layout = pairs.batch([[2, 0], [1]], length, 256, 3).layout
    half, both = length, 2 * length
    layout.prepare("varlen", {None})
    layout.prepare("sdpa", {None})
    index, cu_keys = layout._keys
    assert 2 * both < cu_keys[-1] + half and cu_keys[-1] <= len(index) and len(cu_keys) == len(layout.cu_seqlens)
    mask, seen = layout.masks[None][:, 0], torch.zeros(both, both, dtype=torch.bool)
    for (start, end), (first, last) in zip(pairwise(layout.cu_seqlens), pairwise(cu_keys), strict=True):
        for query in range(start, end):
            keys = index[first : last - (end - 1 - query)]
            assert len(set(keys.tolist())) == len(keys)
            seen[query, keys] = True
    assert torch.equal(seen[:half, :half], mask[0]) and torch.equal(seen[half:, half:], mask[1])
    assert not seen[:half, half:].any() and not seen[half:, :half].any()
