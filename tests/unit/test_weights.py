"""Weights of tokens other than 0 and 1, from rows to batches: each stays with its label; without them nothing changes.

Faults that were planted, and the tests that saw them (`steps_are_those…` is of tests/recipes/test_weighted_rows.py):
weights left where tokens are, not where their labels are: `packed_rows…`, `a_stream…`, `steps_are_those…`; only a row's
first document keeps its weights: `packed_rows…`; a step's divisor counts tokens: `packed_rows…`, `steps_are_those…`.
"""

import hashlib
import json
from itertools import groupby

import numpy as np
import pytest
import torch
from fake_tokenizer import FakeTokenizer

from ftlib.cli import preview as shown
from ftlib.data import Documents, Loader, eval_batches, examples, load, prompts
from ftlib.data.doctor import examine
from ftlib.data.doctor_page import write
from ftlib.data.formats import choose_shape, read_example
from ftlib.data.masks import tokenize
from ftlib.data.preference import Wanted
from ftlib.data.streaming import StreamLoader, open_stream
from ftlib.errors import UserError
from ftlib.sections import Data, Source
from ftlib.sections.rl import Prompts
from ftlib.sections.stream import Stream

ASK, END = {"role": "user", "content": "Hi"}, "<|im_end|>"
DETAIL = [{"begin_offset": 0, "end_offset": 1, "weight": 0.5}, {"begin_offset": 4, "end_offset": 5, "train": True}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def said(content="Yes", **more):
    return {"messages": [ASK, {"role": "assistant", "content": content, **more}]}


def stretches(row, end="all"):
    """Text of neighbours that count alike, and how much, where that is not nothing."""
    ids, weights = tokenize(read_example(row, choose_shape(row, "auto", {}, {}, "key"), "file:1"), FakeTokenizer(), end)
    runs = groupby(zip(ids, weights, strict=True), key=lambda pair: float(pair[1]))
    found = [(FakeTokenizer().decode([i for i, _ in run]), weight) for weight, run in runs if weight]
    return found, weights.dtype


PARTS = [{"type": "text", "text": "so ", "weight": 0.5}, {"type": "text", "text": "yes"}]
ROWS = {
    "a message": (said(weight=0.25), [("Yes" + END, 0.25)]),
    "above one": (said(loss_weight=3), [("Yes" + END, 3)]),
    "a switch beside it": (said(weight=0.25, train=True), [("Yes" + END, 0.25)]),
    "parts": (said(PARTS), [("so ", 0.5), ("yes" + END, 1)]),
    "a part's own weight wins": (said(PARTS, weight=2), [("so ", 0.5), ("yes" + END, 2)]),
    "parts of a message that is off": (said(PARTS, weight=0), [("so ", 0.5)]),
    "parts alike": (said([{**part, "weight": 0.5} for part in PARTS]), [("so yes" + END, 0.5)]),
    "ranges": (said("so yes", train_detail=DETAIL), [("so", 0.5), ("es" + END, 1)]),
    "silence": (said(" ", weight=0.5), []),
    "a user": ({"messages": [{**ASK, "weight": 0.5}, said()["messages"][1]]}, [("Hi" + END, 0.5), ("Yes" + END, 1)]),
    "segments": (
        {"segments": [{"text": "ab", "label": True, "weight": 0.5}, {"text": "c", "label": False},
                      {"text": "d", "label": True}, {"text": "e", "label": True, "weight": 0}][:3]},
        [("ab", 0.5), ("d", 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_say_how_much_tokens_count(name):
    row, wanted = ROWS[name]
    found, dtype = stretches(row)
    assert found == wanted and dtype == (np.float32 if wanted else bool)


def test_ends_that_are_not_trained_and_weights_of_zero_and_one():
    assert stretches(said(weight=0.25), "none")[0] == [("Yes", 0.25)]
    for row in (said(), said(weight=1), said(weight=1.0, train=True), said([{"type": "text", "text": "Yes"}])):
        assert stretches(row) == ([("Yes" + END, 1)], bool)
    assert stretches(said(weight=0)) == stretches(said(train=False)) == ([], bool)


class Pairs(FakeTokenizer):
    """Two characters a token, wherever a part ends."""

    def encode_with_offsets(self, text, special=True):
        spans = [(at, min(at + 2, len(text))) for at in range(0, len(text), 2)]
        return list(range(len(spans))), spans


@pytest.mark.parametrize("weights", [(0.5, 2), (2, 0.5), (0.5, 0), (0, 0.5), (1, 0)])
def test_a_token_that_two_parts_share_counts_as_the_larger(weights):
    pairs = zip(("abc", "def"), weights, strict=True)
    row = {"segments": [{"text": text, "label": weight > 0, "weight": weight} for text, weight in pairs]}
    _, found = tokenize(read_example(row, choose_shape(row, "auto", {}, {}, "key"), "file:1"), Pairs())
    assert found.tolist() == [weights[0], max(weights), weights[1]]


def rows_file(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(folder / name))


def mixed(count=30):
    """Conversations of which every third has a weight, and one a part that is off."""
    rows = [said(f"number {n}", **({"weight": 0.1 * n} if n % 3 == 0 else {})) for n in range(1, count)]
    return [*rows, said([{"text": "only ", "weight": 0}, {"text": "this"}])]


def arrays(documents):
    columns = [(d.input_ids, d.labels, d.weights) for d in documents]
    return [[None if column is None else column.tolist() for column in document] for document in columns]


def test_memory_files_and_workers_hold_the_same(tmp_path, cache, monkeypatch):
    source = rows_file(tmp_path, mixed())
    plain = load(Data(sources=(source,), cache="none"), FakeTokenizer(), seed=0).train
    assert plain.weighted == 9 and [d.weights is None for d in plain][:4] == [True, True, False, True]
    monkeypatch.setattr("ftlib.data.store._FLUSH", 50)
    for settings in ({"workers": 2, "cache": "none"}, {"cache": str(cache)}, {"cache": str(cache)}):
        other = load(Data(sources=(source,), **settings), FakeTokenizer(), seed=0)
        assert arrays(other.train) == arrays(plain) and other.train.fingerprint == plain.fingerprint
        assert other.train.target_weights.tolist() == plain.target_weights.tolist()
    assert other.report.sources[0].cached
    (file,) = cache.glob("*/weights.bin")
    assert file.stat().st_size == 4 * sum(len(d.input_ids) for d in plain if d.weights is not None)
    file.write_bytes(file.read_bytes()[:-4])  # damaged: made again
    again = load(Data(sources=(source,), cache=str(cache)), FakeTokenizer(), seed=0)
    assert not again.report.sources[0].cached and arrays(again.train) == arrays(plain)
    text = (tmp_path / "rows.jsonl").read_text().replace('"weight": 1.5', '"weight": 1.25')
    (tmp_path / "other.jsonl").write_text(text)
    other = load(Data(sources=(Source(path=str(tmp_path / "other.jsonl")),)), FakeTokenizer(), seed=0).train
    assert other.fingerprint != plain.fingerprint and other.parts[0].trained.tolist() == plain.parts[0].trained.tolist()
    chosen = plain.select(np.arange(len(plain)) >= 5)
    assert arrays(chosen) == arrays(plain)[5:] and chosen.weighted == 8
    kept = load(Data(sources=(source,), eval=4.0, cache=str(cache)), FakeTokenizer(), seed=0).eval["held_out"]
    assert all(d.example.messages for d in kept)
    assert "9 with weights other than 0 and 1 (mean of all trained tokens 1.16)" in "\n".join(again.report.lines())


def test_rows_of_zero_and_one_are_stored_and_loaded_as_ever(tmp_path, cache):
    """No file, no tensor, no other fingerprint: the bits are those of before there were weights."""
    source = rows_file(tmp_path, [said(f"number {n}", weight=n % 2) for n in range(8)])
    documents = load(Data(sources=(source,), cache=str(cache)), FakeTokenizer(), seed=0).train
    assert not list(cache.glob("*/weights.bin")) and list(cache.glob("*/trained.bin"))
    (part,) = documents.parts
    columns = (part.input_ids, part.trained, part.lengths)
    text = "".join(hashlib.sha256(np.ascontiguousarray(column)).hexdigest() for column in columns)
    assert part.digest == hashlib.sha256(text.encode()).hexdigest() and part.weights is None
    assert documents.target_weights is documents.target_counts and not documents.weighted
    loader = Loader(documents, seq_len=64, rows=2, micro_rows=1, seed=0, pack=True, pad_id=0)
    step = next(loader)
    assert [batch.weights for batch in step.micro_batches] == [None, None]
    assert step.target_weight == step.target_tokens and isinstance(step.target_weight, int)


def told(token):
    """The weight of token `token` of `coded` documents: different for all of them."""
    return token / 4096


def coded(count=60, seed=0):
    """Documents whose tokens say which they are, half of them with a weight for each trained token."""
    dice, rows, first = np.random.default_rng(seed), [], 1
    for number in range(count):
        ids = np.arange(first, first + dice.integers(3, 30))
        trained, first = dice.random(len(ids)) < 0.7, first + len(ids)
        trained[1] = True
        rows.append((ids, trained * told(ids) if number % 2 else trained))
    return Documents.from_rows(rows), {int(i): float(w) for ids, mask in rows for i, w in zip(ids, mask, strict=True)}


@pytest.mark.parametrize("ranks,micro_rows,pack", [(1, 4, True), (2, 1, True), (2, 2, False)])
def test_packed_rows_keep_the_weight_of_each_label(ranks, micro_rows, pack):
    documents, known = coded()
    options = {"seq_len": 64, "rows": 4, "seed": 3, "pack": pack, "pad_id": 0, "ranks": ranks}
    loaders = [Loader(documents, micro_rows=micro_rows, rank=rank, **options) for rank in range(ranks)]
    seen = 0
    for _ in range(loaders[0].steps_per_epoch()):
        steps = [next(loader) for loader in loaders]
        total = 0.0
        for batch in (batch for step in steps for batch in step.micro_batches):
            wanted = [[known[i] if i != -100 else 0.0 for i in row] for row in batch.labels.tolist()]
            weights = torch.tensor(wanted) if batch.weights is None else batch.weights
            assert weights.tolist() == wanted
            assert batch.weights is not None or set(weights.unique().tolist()) <= {0.0, 1.0}
            total, seen = total + weights.double().sum().item(), seen + (batch.labels != -100).sum().item()
        assert len({step.target_weight for step in steps}) == 1, "the same to the bit on every process"
        assert steps[0].target_weight == pytest.approx(total, rel=1e-12)
    assert seen == documents.target_counts.sum()
    held_out = list(eval_batches(documents, 64, 2, 0))
    together = sum(b.target_tokens if b.weights is None else b.weights.double().sum().item() for b in held_out)
    assert together == pytest.approx(documents.target_weights.sum(), rel=1e-12)


def test_what_is_cut_keeps_its_weights(tmp_path):
    source = rows_file(tmp_path, [said("x" * 30 + "y" * 30, train_detail=[
        {"begin_offset": 0, "end_offset": 29, "weight": 0.5}, {"begin_offset": 30, "end_offset": 59, "weight": 2},
    ])])  # fmt: skip
    for overlong in ("truncate", "split"):
        documents = load(Data(sources=(source,), seq_len=40, overlong=overlong), FakeTokenizer(), seed=0).train
        for document in documents:
            for label, weight in zip(document.labels, document.weights, strict=True):
                assert weight == {ord("x"): 0.5, ord("y"): 2.0, 4: 2.0, -100: 0.0}[label]
        assert len(documents) == (1 if overlong == "truncate" else 3)


def test_a_stream_keeps_them_too(tmp_path):
    """Letters count a half and digits 2, wherever rows are cut; rows of words count 1."""
    dice, rows = np.random.default_rng(0), []
    for number in range(40):
        texts = ["".join(dice.choice(list(kind), 9)) for kind in ("abcdef", "012345", "ABCDEF")]
        weights = (0.5, 2, None) if number % 2 else (None, None, None)
        parts = [{"text": text, "label": True, "weight": w} for text, w in zip(texts, weights, strict=True)]
        rows.append({"segments": parts if number % 2 else parts[2:]})
    data = Data(sources=(rows_file(tmp_path, rows),), seq_len=32)
    plan = open_stream(data, Stream(), FakeTokenizer(), rows=2, seed=1, vocab=1000).train
    loader, plain, weighted = StreamLoader(plan, micro_rows=1, pad_id=0, workers=0), 0, 0
    for _ in range(20):
        step, total = next(loader), 0.0
        for batch in step.micro_batches:
            labels = batch.labels[0].tolist()
            wanted = [0.0 if i == -100 else 0.5 if i >= ord("a") else 2.0 if i < ord("A") else 1.0 for i in labels]
            plain, weighted = plain + (batch.weights is None), weighted + (batch.weights is not None)
            assert set(wanted) <= {0.0, 1.0} if batch.weights is None else batch.weights[0].tolist() == wanted
            total += sum(wanted)
        assert step.target_weight == total and step.target_tokens == sum(b.target_tokens for b in step.micro_batches)
    assert weighted > 5
    loader.close()


def test_people_are_shown_them(tmp_path):
    file = rows_file(tmp_path, [said("No"), said("so yes", train_detail=DETAIL), said("Yes", weight=0.3)]).path
    documents = load(Data(sources=(Source(path=file),)), FakeTokenizer(), seed=0).train
    lines = ["\n".join(shown.show(d, FakeTokenizer(), shown.PLAIN)) for d in documents]
    assert lines[0].startswith("--- rows: 25 tokens, 3 trained\n") and "[[No<|im_end|>]]" in lines[0]
    assert "5 trained, 2 of them with weight 0.5\n" in lines[1] and "[[0.5|so]] y[[es<|im_end|>]]" in lines[1]
    assert "4 trained, 4 of them with weight 0.3\n" in lines[2] and "[[0.3|Yes<|im_end|>]]" in lines[2]
    assert "\033[33m0.3|Yes" in "\n".join(shown.show(documents[2], FakeTokenizer(), shown.COLOURS))
    found = examine(file, FakeTokenizer(), seq_len=64)
    assert dict(found.facts())["weights other than 1"] == "6 trained tokens (0.3: 4, 0.5: 2); mean of all 0.683"
    assert [row.weight for row in found.rows] == [3, 4.0, 1.2]
    page = write(found, tmp_path / "out").read_text()
    assert '<mark class=weighted title="weight 0.3">Yes' in page and "other than 1" in page
    assert "weight" in (tmp_path / "out" / "rows.csv").read_text().splitlines()[0]
    plain = examine(rows_file(tmp_path, [said("No")], "plain.jsonl").path, FakeTokenizer(), seq_len=64)
    assert "weights other than 1" not in dict(plain.facts())
    assert "other than 1" not in write(plain, tmp_path / "plain").read_text()


GOOD, WEIGHED = said()["messages"], said(weight=0.5)["messages"]
REFUSED = {
    "chosen": ("pairs", {"chosen": WEIGHED, "rejected": said("No")["messages"]}),
    "rejected": ("pairs", {"chosen": GOOD, "rejected": said("No", weight=2)["messages"]}),
    "prompt": ("pairs", {"prompt": [{**ASK, "weight": 0.5}], "chosen": "a", "rejected": "b"}),
    "completion": ("rated", {"prompt": [ASK], "completion": WEIGHED[1:], "label": True}),
    "whole": ("rated", {"completion": WEIGHED, "label": False}),
    "messages": ("rated", {"messages": WEIGHED, "label": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_preferences_have_none(name, tmp_path):
    kind, row = REFUSED[name]
    good = json.loads(json.dumps(row).replace('"weight": 0.5', '"weight": 1').replace('"weight": 2', '"train": true'))
    source = rows_file(tmp_path, [good, row])
    with pytest.raises(UserError, match="weight other than 0 and 1, which preferences and prompts have no") as error:
        load(Data(sources=(source,)), FakeTokenizer(), seed=0, wanted=Wanted(kind))
    assert error.value.where.endswith("rows.jsonl:2")


@pytest.mark.parametrize("row", [{"prompt": [{**ASK, "weight": 0.5}]}, {"messages": WEIGHED}], ids=str)
def test_prompts_have_none(row, tmp_path):
    source = rows_file(tmp_path, [row])
    with pytest.raises(UserError, match="weight other than 0 and 1"):
        prompts.load(Prompts(sources=(source,)), FakeTokenizer(), 4, 0)
    with pytest.raises(UserError, match="weight is -1"):
        list(examples(rows_file(tmp_path, [said(weight=-1)]))[1])
