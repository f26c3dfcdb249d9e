"""Streams: every token once, in an order that no number of processes or restarts changes; shares are of tokens."""

import gzip
import json
import os
import signal
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_tokenizer import FakeTokenizer
from test_pieces import KINDS, of_kind
from tiny_model import ROOT

from ftlib import config, plugins
from ftlib.data import stream_rows, streaming
from ftlib.data.streaming import StreamLoader, open_stream
from ftlib.errors import UserError
from ftlib.observe import diagnose
from ftlib.sections import Data, Source
from ftlib.sections.stream import Mix, Stream

SEQ_LEN, ROWS = 48, 4
SMALL = ["model.path=ftlib:demo/model", "data.sources=[{path: rows.jsonl}]"]


class Letters(FakeTokenizer):
    """A token a character, no BOS; the first of a document is an upper-case letter, which is nowhere else."""

    bos_id = None


def write(file, count, letter, seed=0, lengths=(3, 90)):
    """Documents of random lower-case letters behind `letter`, their number and a colon."""
    dice = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        text = "".join(chr(97 + c) for c in dice.integers(0, 26, dice.integers(*lengths)))
        rows.append(json.dumps({"text": f"{letter}{number}:{text}"}) + "\n")
    text = "".join(rows).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return file


def lines(file):
    text = file.read_bytes()
    return (gzip.decompress(text) if file.suffix == ".gz" else text).decode().splitlines()


def plan_of(paths, weights=None, rows=ROWS, mix=(), eval=None, names=None, **settings):
    weights = weights or [1.0] * len(paths)
    names = names or [None] * len(paths)
    found = [Source(path=str(p), weight=w, name=n) for p, w, n in zip(paths, weights, names, strict=True)]
    data = Data(sources=tuple(found), seq_len=SEQ_LEN, eval=eval)
    return open_stream(data, Stream(mix=tuple(mix), **settings), Letters(), rows=rows, seed=3, vocab=1000)


def loaders(plan, ranks=1, workers=0, **more):
    """Loaders of all ranks; what they would gather from each other is at hand."""
    made = []

    def gather_of(rank):
        def gather(value):
            if isinstance(value, list):  # numbers of a step: the test looks at whole steps of one rank only
                return [value]
            parts = [{"rank": o._rank, "lanes": o._states} for o in made]
            return parts

        return gather

    for rank in range(ranks):
        made.append(
            StreamLoader(plan, micro_rows=1, pad_id=0, workers=workers, rank=rank, ranks=ranks, gather=gather_of(rank))
        )
    return made


def rows_of(made):
    """(ids, labels) of the next step over all ranks."""
    steps = [next(loader) for loader in made]
    batches = [batch for step in steps for batch in step.micro_batches]
    return [(b.input_ids[0].tolist(), b.labels[0].tolist(), b.layout.cu_seqlens.tolist()) for b in batches]


def texts(rows):
    """All pieces of rows as text, in order of rows."""
    found = []
    for ids, _, ends in rows:
        for start, stop in pairwise(ends):
            if ids[start:stop] and any(ids[start:stop]):
                found.append("".join(chr(i) if i != 2 else "$" for i in ids[start:stop]))
    return found


def test_every_document_of_an_epoch_once_and_every_token_a_target_once(tmp_path):
    paths = [write(tmp_path / "a.jsonl", 60, "A"), write(tmp_path / "b.jsonl.gz", 60, "B", seed=1)]
    plan = plan_of(paths, rows=1, buffer=16).train
    written = Counter()
    for path in paths:
        written.update(json.loads(line)["text"] + "$" for line in lines(path))
    (loader,) = loaders(plan)
    stream, targets = "", 0
    while len([text for text in stream.split("$") if text]) < 200:
        (row,) = rows_of([loader])
        stream += "".join(texts([row]))
        assert 0 not in row[0], "no padding"
        assert [row[0][t + 1] for t in range(SEQ_LEN - 1) if row[1][t] >= 0] == [
            row[1][t] for t in range(SEQ_LEN - 1) if row[1][t] >= 0
        ]
        targets += sum(label >= 0 for label in row[1])
    documents = Counter(f"{text}$" for text in stream.split("$")[:-1])
    for letter in "AB":
        own = [text for text in stream.split("$")[:-1] if text[0] == letter]
        assert Counter(f"{text}$" for text in own[:60]) == Counter(t for t in written if t[0] == letter)
        assert own[:60] != sorted(own[:60], key=lambda text: int(text[1:].split(":")[0])), "shuffled"
    starts = sum(documents.values()) + (not stream.endswith("$"))
    assert targets == len(stream) - starts + (stream[-1] != "$")  # all but first tokens; the cut one's label is there


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_on_any_number_of_processes_to_the_token(tmp_path, workers):
    paths = [write(tmp_path / f"{n}.jsonl", 50, n.upper(), seed=i) for i, n in enumerate("abc")]
    plan = plan_of(paths, weights=[1.0, 2.0, 0.5], buffer=24).train
    (whole,) = loaders(plan)
    wanted = [rows_of([whole]) for _ in range(14)]
    now, at = loaders(plan, 1, workers), 0
    for ranks, steps in ((2, 3), (4, 5), (1, 3), (2, 3)):
        state = json.loads(json.dumps(now[0].state_dict()))
        for loader in now:
            loader.close()
        now = loaders(plan, ranks, workers)
        for loader in now:
            loader.load_state_dict(state)
        for _ in range(steps):
            assert rows_of(now) == wanted[at]
            at += 1
    for loader in now:
        loader.close()


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_goes_on_from_its_midst(tmp_path, name):
    file = of_kind(tmp_path / name, [{"text": f"A{n}:{'lorem ' * (n % 7)}".strip()} for n in range(110)])
    plan = plan_of([file], buffer=12).train
    (whole,) = loaders(plan)
    wanted = [rows_of([whole]) for _ in range(16)]
    for ranks, stop in ((2, 5), (1, 11)):
        (loader,) = loaders(plan)
        for _ in range(stop):
            rows_of([loader])
        state, now = json.loads(json.dumps(loader.state_dict())), loaders(plan, ranks)
        assert any(mark and mark[1] for lane in state["lanes"] for mark in lane["marks"])
        for again in now:
            again.load_state_dict(state)
        assert [rows_of(now) for _ in range(stop, 16)] == wanted[stop:]


def test_a_server_without_ranges_is_asked_for_the_whole_file_once(tmp_path, monkeypatch):
    """So a restart does not need it."""
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path / "cache"))
    away = tmp_path / "away"
    away.mkdir()
    paths = [write(away / "a.jsonl.gz", 40, "A"), write(away / "b.jsonl", 40, "B", seed=1)]
    names = ["first", "second"]

    def first_steps(sources):
        made = loaders(plan_of(sources, names=names).train)
        return [rows_of(made) for _ in range(5)]

    wanted = first_steps(paths)
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *words: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(away)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    remote = [f"http://127.0.0.1:{server.server_port}/a.jsonl.gz", paths[1]]
    found = first_steps(remote)
    server.shutdown(), server.server_close()
    paths[0].unlink()
    assert found == wanted == first_steps(remote)


def test_what_was_made_in_advance_is_not_lost(tmp_path):
    plan = plan_of([write(tmp_path / "a.jsonl", 80, "A")]).train
    one, two = loaders(plan)[0], loaders(plan)[0]
    rows_of([one]), rows_of([two])
    two.load_state_dict(two.state_dict())
    assert rows_of([one]) == rows_of([two])


def test_files_that_were_read_are_not_opened_again(tmp_path, monkeypatch):
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in range(4):
        write(folder / f"{number}.jsonl", 30, "A", seed=number)
    plan = plan_of([folder], buffer=4).train
    (loader,) = loaders(plan)
    for _ in range(25):
        rows_of([loader])
    state, opened = loader.state_dict(), []
    assert {lane["marks"][0][0] for lane in state["lanes"]} <= {1, 2, 3}
    read = stream_rows.read_file
    monkeypatch.setattr(stream_rows, "read_file", lambda file, *start: opened.append(file.name) or read(file, *start))
    (again,) = loaders(plan)
    again.load_state_dict(state)
    rows_of([again])
    assert "0.jsonl" not in opened and opened


def shares(plan, steps, names):
    (loader,) = loaders(plan)
    taken = Counter()
    for _ in range(steps):
        taken.update(next(loader).by_source)
    total = sum(taken.values())
    return [taken[name] / total for name in names]


def test_shares_are_of_tokens_whatever_the_lengths(tmp_path):
    long = write(tmp_path / "long.jsonl", 40, "L", lengths=(100, 300))
    short = write(tmp_path / "short.jsonl", 400, "S", lengths=(5, 20))
    plan = plan_of([long, short], weights=[3.0, 1.0], names=["long", "short"]).train
    assert shares(plan, 100, ["long", "short"]) == pytest.approx([0.75, 0.25], abs=0.02)


def test_shares_change_over_training(tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", 200, n.upper(), seed=i) for i, n in enumerate("ab")]
    mix = [Mix(step=1, weights={"a": 1.0, "b": 0.0}), Mix(step=41, weights={"a": 0.0, "b": 4.0})]
    plan = plan_of(paths, mix=mix).train
    assert plan.weights(1) == [1.0, 0.0] and plan.weights(21) == [0.5, 0.5] and plan.weights(99) == [0.0, 1.0]
    (loader,) = loaders(plan)
    steps = [next(loader).by_source for _ in range(60)]
    assert sum(step["b"] for step in steps[:1]) == 0
    assert sum(step["a"] for step in steps[43:]) == 0
    half = sum((Counter(step) for step in steps[:41]), Counter())
    assert half["a"] / sum(half.values()) == pytest.approx(0.5, abs=0.03)


def test_a_share_that_changes_is_not_told_as_if_it_did_not(tmp_path):
    data = Data(sources=(Source(path=str(write(tmp_path / "a.jsonl", 30, "A")), name="a"),), seq_len=SEQ_LEN)
    said = [
        "".join(open_stream(data, Stream(mix=mix), Letters(), vocab=123, rows=ROWS, seed=3).report.lines())
        for mix in ((), (Mix(step=1, weights={"a": 2.0}),))
    ]
    assert "100.0%" in said[0] and "100.0%" not in said[1] and "its share by stream.mix" in said[1]


def test_step_numbers_count_tokens_and_targets(tmp_path):
    plan = plan_of([write(tmp_path / "a.jsonl", 80, "A")]).train
    step = next(loaders(plan)[0])
    labels = torch.cat([batch.labels for batch in step.micro_batches])
    assert step.target_tokens == int((labels >= 0).sum())
    assert step.tokens == ROWS * SEQ_LEN == sum(step.by_source.values())


def test_many_short_documents_close_a_row_early(tmp_path):
    plan = plan_of([write(tmp_path / "a.jsonl", 300, "A", lengths=(1, 3))], max_documents=3).train
    rows = rows_of(loaders(plan))
    assert all(0 in ids for ids, _, _ in rows)
    assert len({len(ends) for _, _, ends in rows}) == 1


def test_the_first_rows_of_each_source_are_held_out(tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", 30, n.upper(), seed=i) for i, n in enumerate("ab")]
    opened = plan_of(paths, eval=5, rows=1)
    assert {name: len(documents) >= 5 for name, documents in opened.eval.items()} == {"a": True, "b": True}
    held = "".join("".join(chr(i) for i in d.input_ids) for docs in opened.eval.values() for d in docs)
    (loader,) = loaders(opened.train)
    stream = "".join("".join(texts(rows_of([loader]))) for _ in range(100))
    for letter in "AB":
        assert all(f"{letter}{n}:" in held for n in range(5)) and not any(f"{letter}{n}:" in stream for n in range(5))
        assert all(f"{letter}{n}:" in stream for n in range(5, 30))


def test_held_out_rows_of_another_vocabulary_are_refused_before_anything_is_trained(tmp_path):
    data = Data(sources=(Source(path=str(write(tmp_path / "a.jsonl", 30, "A"))),), seq_len=SEQ_LEN, eval=4)
    options = {"rows": ROWS, "seed": 3}
    with pytest.raises(UserError, match=r"the tokenizer gives token 1.., the model has embeddings for 100 tokens"):
        open_stream(data, Stream(), Letters(), vocab=100, **options)
    assert len(open_stream(data, Stream(), Letters(), vocab=123, **options).eval) == 1


def test_fewer_rows_than_lanes_is_an_error_that_says_so(tmp_path):
    plan = plan_of([write(tmp_path / "a.jsonl", 3, "A")], rows=8).train
    with pytest.raises(UserError, match="no row to train on for each of the 8 rows"):
        rows_of(loaders(plan))


def test_holding_everything_out_is_about_the_held_out_rows(tmp_path):
    file = write(tmp_path / "a.jsonl", 12, "A")
    with pytest.raises(UserError, match="leaves none of source 'a', which has 12") as caught:
        plan_of([file], eval=5000)
    assert caught.value.where == "data.eval"
    with pytest.raises(UserError, match="first 12, which are held out") as caught:  # told by reading on
        rows_of(loaders(plan_of([file], eval=12).train))
    assert caught.value.where.startswith("data.eval") and caught.value.fix.startswith("lower data.eval")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_row_is_named_or_left_out(tmp_path, workers):
    file = write(tmp_path / "a.jsonl", 300, "A")
    written = lines(file)
    written[280] = '{"text": 5'
    file.write_text("\n".join(written))
    (loader,) = loaders(plan_of([file], rows=1).train, workers=workers)
    with pytest.raises(UserError, match="invalid JSON") as caught:
        for _ in range(600):
            next(loader)
    assert "a.jsonl:281" in caught.value.where
    loader.close()


@pytest.mark.parametrize("row", ['{"text": 5}', '{"text": 5', '{"txet": "a"}'])
def test_a_broken_row_near_the_beginning_is_named_before_training(tmp_path, row):
    """Of the second file, as the first has few rows; others are left out where the config says so."""
    first, second = write(tmp_path / "a.jsonl", 3, "A"), write(tmp_path / "b.jsonl", 40, "B")
    second.write_text("\n".join([lines(second)[0], row, *lines(second)[1:]]))
    with pytest.raises(UserError) as caught:
        plan_of([f"{tmp_path}/*.jsonl"])
    assert f"{second.name}:2" in caught.value.where
    data = Data(sources=(Source(path=f"{tmp_path}/*.jsonl"),), seq_len=SEQ_LEN, on_bad_row="skip")
    opened = open_stream(data, Stream(), Letters(), rows=1, seed=0, vocab=1000)
    assert len(opened.train.sources[0].files) == 2 and first.is_file()
    assert "checked are the first 256 of each source" in "\n".join(opened.report.lines())


def test_a_worker_that_is_killed_ends_the_run(tmp_path):
    (loader,) = loaders(plan_of([write(tmp_path / "a.jsonl", 40, "A")]).train, workers=1)
    next(loader)
    os.kill(loader._processes._processes[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended") as caught:
        for _ in range(10_000):
            next(loader)
    loader.close()
    said = str(diagnose.explain(caught.value, SimpleNamespace()))
    assert "where: stream.workers, stream.buffer" in said and "host memory" in said and "the same command" in said
    assert "the device" not in said, "no GPU's memory ran out"


def test_what_saves_memory_is_a_recipe_or_a_key_that_is_near():
    asked = {name: config.load(plugins.load_file(ROOT / f"recipes/{name}.py").Config, words) for name, words in (
        ("full_sft", SMALL), ("pretrain", SMALL), ("dpo", [*SMALL, "lora=null"]),
    )}  # fmt: skip
    told = {name: "\n".join(diagnose.knobs(cfg)) for name, cfg in asked.items()}
    assert "full_sft -> lora_sft" in told["full_sft"] and "lora" not in told["pretrain"]
    assert "lora: null -> {}" in told["dpo"] and "lora_sft" not in told["dpo"]


def test_what_a_stream_cannot_do_is_refused():
    data = Data(sources=(Source(path="a.jsonl", name="a"),))
    change = {"sources": data.sources}
    for changed, steps, words in [
        (data, None, "no end"),
        (Data(**change, pack=False), 5, "packed"),
        (Data(**change, deduplicate=True), 5, "repeats"),
        (Data(**change, eval=0.1), 5, "share of a stream"),
        (Data(sources=(Source(path="a.jsonl", split="train[:10]"),)), 5, "whole files"),
    ]:
        with pytest.raises(UserError, match=words):
            streaming.check(changed, Stream(), steps)
    with pytest.raises(UserError, match="no source is called 'x'"):
        streaming.check(data, Stream(mix=(Mix(step=1, weights={"x": 1.0}),)), 5)
    with pytest.raises(UserError, match="all weights are 0"):
        streaming.check(data, Stream(mix=(Mix(step=1, weights={"a": 0.0}),)), 5)
    with pytest.raises(ValueError, match="steps must rise"):
        Stream(mix=(Mix(step=5, weights={"a": 1.0}), Mix(step=5, weights={"a": 1.0})))
