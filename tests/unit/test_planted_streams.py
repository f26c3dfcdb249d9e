"""Streams: what a mixture, a restart, a second epoch and rows of several weights must not get wrong in silence."""

import json
from dataclasses import replace

import pytest
from fake_tokenizer import FakeTokenizer
from test_streaming import ROWS, SEQ_LEN, Letters, lines, loaders, plan_of, rows_of, texts, write

from ftlib.data.streaming import StreamLoader, open_stream
from ftlib.errors import UserError
from ftlib.sections import Data, Source
from ftlib.sections.stream import Mix, Stream


def opened(file, *, tokenizer=None, vocab=1000, rows=1, **settings):
    """The plan of one source with settings of `data`."""
    data = Data(sources=(Source(path=str(file)),), seq_len=SEQ_LEN, **settings)
    return open_stream(data, Stream(), tokenizer or Letters(), rows=rows, seed=3, vocab=vocab).train


def order_of(plan, count):
    """The first `count` whole documents of a plan of one lane, by number."""
    (loader,), stream = loaders(plan), ""
    while stream.count("$") < count:
        stream += "".join(texts(rows_of([loader])))
        assert len(stream) < 200 * count, "documents end"
    return [int(text[1:].split(":")[0]) for text in stream.split("$")[:count]]


def test_a_mixture_goes_on_at_the_step_where_it_stopped(tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", 80, n.upper(), seed=i) for i, n in enumerate("ab")]
    mix = [Mix(step=1, weights={"a": 1.0, "b": 0.0}), Mix(step=9, weights={"a": 0.0, "b": 1.0})]
    plan = plan_of(paths, mix=mix).train
    whole, part, again = (loaders(plan)[0] for _ in range(3))
    wanted = [rows_of([whole]) for _ in range(14)]
    assert [rows_of([part]) for _ in range(7)] == wanted[:7]
    again.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert [rows_of([again]) for _ in range(7)] == wanted[7:]


def test_sources_keep_their_own_weight_before_the_first_point_and_where_none_is_named(tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", 30, n.upper()) for n in "ab"]
    plan = plan_of(paths, weights=[3.0, 1.0]).train
    later = replace(plan, mix=(Mix(step=11, weights={"a": 0.0, "b": 2.0}),))
    assert [later.weights(step) for step in (1, 6, 11, 50)] == [[0.75, 0.25], [0.375, 0.625], [0.0, 1.0], [0.0, 1.0]]
    assert replace(plan, mix=(Mix(step=1, weights={"a": 1.0}),)).weights(1) == [0.5, 0.5]


def test_every_epoch_and_every_seed_has_an_order_of_its_own(tmp_path):
    plan = plan_of([write(tmp_path / "a.jsonl", 30, "A", lengths=(3, 9))], rows=1).train
    found = order_of(plan, 90)
    epochs = [found[start : start + 30] for start in (0, 30, 60)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order_of(replace(plan, seed=3), 30) == epochs[0] != order_of(replace(plan, seed=4), 30)


def test_the_first_step_is_mixed_though_documents_are_long(tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", 30, n.upper(), lengths=(200, 300)) for n in "ab"]
    (loader,) = loaders(plan_of(paths).train)
    assert min(next(loader).by_source.values()) > 0


def test_a_broken_row_far_in_is_left_out_where_the_config_says_so(tmp_path):
    file = write(tmp_path / "a.jsonl", 300, "A", lengths=(1, 3))
    written = lines(file)
    written[280] = '{"text": 5'
    file.write_text("\n".join(written))
    assert sorted(order_of(opened(file, on_bad_row="skip"), 299)) == [n for n in range(300) if n != 280]


def test_a_token_that_the_model_does_not_know_is_refused_far_in_too(tmp_path):
    file = write(tmp_path / "a.jsonl", 300, "A", lengths=(1, 3))
    file.write_text("\n".join([*lines(file)[:280], '{"text": "A280:é"}']))
    with pytest.raises(UserError, match="the tokenizer gives token 233, the model has embeddings for 128 tokens"):
        order_of(opened(file, vocab=128), 281)


def test_reasoning_is_dropped_from_streamed_answers(tmp_path):
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>hidden</think>Yes"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(8)))
    for mode, there in {"keep": True, "drop": False}.items():
        plan = opened(tmp_path / "a.jsonl", tokenizer=FakeTokenizer(), thinking=mode)
        said = "".join("".join(texts(rows_of(loaders(plan)))) for _ in range(2))
        assert "Yes" in said and ("hidden" in said) == there, mode


def test_each_label_brings_the_weight_of_its_own_token_over_cuts(tmp_path):
    """Capitals count 3, small letters a quarter, signs nothing."""
    parts = [("ABC", 3.0), ("-", 0), ("defghijklm", 0.25), ("+", 0), ("XY", 3.0), ("z" * 40, 0.25)]
    row = {"messages": [{"role": "user", "content": "?"}]}
    row["messages"] += [{"role": "assistant", "content": text, "weight": weight} for text, weight in parts]
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 12)
    (loader,) = loaders(opened(tmp_path / "a.jsonl", tokenizer=FakeTokenizer(), rows=2))
    seen = set()
    for _ in range(8):
        step = next(loader)
        for batch in step.micro_batches:
            for label, weight in zip(batch.labels[0].tolist(), batch.weights[0].tolist(), strict=True):
                letter = chr(max(label, 0))
                if label < 0 or not letter.isalpha():
                    assert label > 0 or weight == 0
                    continue
                assert weight == (3.0 if letter.isupper() else 0.25), letter
                seen.add(letter)
        assert step.target_weight == pytest.approx(sum(batch.weights.sum().item() for batch in step.micro_batches))
        assert step.target_tokens == sum(int((batch.labels >= 0).sum()) for batch in step.micro_batches)
    assert seen == set("ABCdefghijklmXYz")


def test_what_decides_the_order_is_in_the_fingerprint_and_shares_are_not(tmp_path):
    plan = plan_of([write(tmp_path / "a.jsonl", 30, "A")], buffer=16).train
    others = [replace(plan, block=plan.block + 1), replace(plan, max_documents=3)]
    others += [replace(plan, sources=(replace(plan.sources[0], skip=2),))]
    others += [replace(plan, cfg=replace(plan.cfg, thinking="drop"))]
    assert len({p.fingerprint for p in (plan, *others)}) == 5
    same = [replace(plan, mix=(Mix(step=1, weights={"a": 2.0}),)), replace(plan, lanes=8)]
    assert {p.fingerprint for p in same} == {plan.fingerprint}


def test_processes_that_share_rows_are_counted_once(tmp_path):
    """Ranks 0 and 1 of the data, each on two processes that have the same rows."""
    plan = plan_of([write(tmp_path / "a.jsonl", 60, "A")]).train
    whole = next(loaders(plan)[0])

    def of_all(value):
        if isinstance(value, list) and isinstance(value[1], list) and value[1] and not isinstance(value[1][0], list):
            return [[rank, value[1]] for rank in (1, 0, 1, 0)]
        return [value]

    step = next(StreamLoader(plan, micro_rows=1, pad_id=0, workers=0, rank=0, ranks=2, gather=of_all))
    assert step.tokens == whole.tokens == ROWS * SEQ_LEN and step.by_source == {"a": ROWS * SEQ_LEN}
    assert step.target_tokens == 2 * sum(batch.target_tokens for batch in step.micro_batches)
