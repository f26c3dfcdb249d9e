"""Where rows come from: every kind of file, folders, patterns, the Hub, https, fsspec, the cache, prepare, doctor."""

import contextlib
import csv
import gzip
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_tokenizer import FakeTokenizer

from ftlib.cli import doctor, prepare
from ftlib.data import load
from ftlib.data.sources import files_of, read, read_all
from ftlib.errors import UserError
from ftlib.sections import Data, Source

ROWS = [{"question": f"what is {n}, \"{n}\"?\nsay", "answer": f"it is ü {n}"} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def table():
    import pyarrow

    return pyarrow.Table.from_pylist(ROWS)


def write(file):
    """The same rows in the kind of file that its name says."""
    name = file.name
    if name.endswith(".parquet"):
        from pyarrow import parquet

        parquet.write_table(table(), file, row_group_size=2)
    elif name.endswith(".arrow"):
        import pyarrow

        make = pyarrow.ipc.new_stream if "stream" in name else pyarrow.ipc.new_file
        with make(str(file), table().schema) as sink:
            sink.write_table(table(), max_chunksize=2)
    elif name.endswith((".csv", ".tsv")):
        with open(file, "w", newline="", encoding="utf-8-sig") as opened:
            writer = csv.DictWriter(opened, ["question", "answer"], delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif name.endswith(".zst"):
        import pyarrow

        with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(file), "wb"), "zstd") as sink:
            sink.write(LINES)
    elif name.endswith(".json"):
        file.write_text(json.dumps(ROWS, indent=1))
    else:
        file.write_bytes(gzip.compress(LINES) if name.endswith(".gz") else LINES)
    return file


KINDS = ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.tsv", "a.parquet", "a.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file(tmp_path, name):
    file = write(tmp_path / name)
    assert [row.value for row in read(file)] == ROWS
    assert [row.value for row in read(file, "[-2:]")] == ROWS[-2:]
    loaded = load(Data(sources=(Source(path=str(file)),)), FakeTokenizer(), seed=0)
    assert (len(loaded.train), loaded.report.sources[0].format) == (5, "qa")


def test_lines_of_a_table_with_line_breaks(tmp_path):
    lines = [row.line for row in read(write(tmp_path / "a.csv"))]
    assert lines == [2, 4, 6, 8, 10]


def test_folders_and_patterns(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl.gz", "test/part.jsonl"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "d" / name)
    (tmp_path / "d" / ".hidden.jsonl").write_text("x")
    (tmp_path / "d" / "notes.pdf").write_text("x")
    folder = str(tmp_path / "d")

    def names(path=folder, split=None):
        return [file.name for file in files_of(Source(path=path, split=split))]

    assert names() == ["part.jsonl", "train-0.jsonl", "train-1.jsonl.gz"]
    assert names(split="train[:3]") == ["train-0.jsonl", "train-1.jsonl.gz"] and names(split="test") == ["part.jsonl"]
    assert names(f"{folder}/*.jsonl*") == ["train-0.jsonl", "train-1.jsonl.gz"]
    assert names(f"{folder}/**/*.jsonl") == ["part.jsonl", "train-0.jsonl"]
    with pytest.raises(UserError, match="no file of it is called so"):
        names(split="dev")
    loaded = load(Data(sources=(Source(path=folder, split="train[1:7]"),)), FakeTokenizer(), seed=0)
    assert [loaded.train.where(i).rsplit("/")[-1] for i in (0, 5)] == ["train-0.jsonl:2", "train-1.jsonl.gz:2"]
    assert loaded.report.sources[0].name == "d"


def test_folder_of_the_datasets_library(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert [place.row.value for place in read_all(files_of(Source(path=str(tmp_path / "saved"))))] == ROWS


def test_hub_datasets_are_fetched_once(tmp_path, monkeypatch, cache):
    import datasets

    calls = []

    def load_dataset(name, subset, *, split, revision):
        calls.append((name, subset, split, revision))
        if name == "org/private":
            raise FileNotFoundError("Repository not found")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    source = Source(path="org/rows-1.5@v2", subset="main", split="train[1:]")
    for _ in range(2):
        assert [place.row.value for place in read_all(files_of(source), source.split)] == ROWS[1:]
    assert calls == [("org/rows-1.5", "main", "train", "v2")]
    files_of(source, again=True)
    files_of(Source(path="org/rows-1.5@v2", subset="other", split="train"))
    assert len(calls) == 3
    with pytest.raises(UserError, match="Repository not found") as error:
        files_of(Source(path="org/private"))
    assert "HF_TOKEN" in error.value.fix and not list(cache.glob("fetched/*.part"))


@contextlib.contextmanager
def server(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Quiet(*a, directory=str(folder)))
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def test_an_address_is_fetched_once_and_read_offline(tmp_path):
    write(tmp_path / "rows.jsonl.gz")
    with server(tmp_path) as address:
        source = Source(path=f"{address}/rows.jsonl.gz")
        first = files_of(source)
        with pytest.raises(UserError, match="cannot be fetched"):
            files_of(Source(path=f"{address}/other.jsonl"))
    assert files_of(source) == first  # the server is gone
    assert [row.value for row in read(first)] == ROWS
    with pytest.raises(UserError, match="cannot be fetched"):
        files_of(Source(path="http://127.0.0.1:9/rows.jsonl"))


def test_fsspec_addresses():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/a/x.jsonl": LINES, "/bucket/b/x.jsonl": LINES, "/bucket/b/y.jsonl": LINES})
    assert [file.name for file in files_of(Source(path="memory://bucket/b/y.jsonl"))] == ["y.jsonl"]
    with pytest.raises(UserError, match="the whole has more than stream"):
        files_of(Source(path="memory://bucket/b"), most=2 * len(LINES) - 1)
    assert len(files_of(Source(path="memory://bucket/b"), most=2 * len(LINES))) == 2
    assert len(files_of(Source(path="memory://bucket/*/x.jsonl"))) == 2
    assert [row.value for row in read(files_of(Source(path="memory://bucket/a")))] == ROWS
    for path, words in (("memory://bucket/none", "no such file"), ("nothing://x/y", "cannot be fetched")):
        with pytest.raises(UserError, match=words):
            files_of(Source(path=path))


# ---- the cache


def batches(loaded):
    return [(d.input_ids.tolist(), d.labels.tolist(), d.messages) for d in loaded.train], loaded.train.fingerprint


def test_tokenised_data_are_found_by_their_content(tmp_path):
    file, folder = write(tmp_path / "a.jsonl"), tmp_path / "kept"
    cfg = {"sources": (Source(path=str(file)),), "cache": str(folder), "eval": 2}
    plain = load(Data(**{**cfg, "cache": "none"}), FakeTokenizer(), seed=0)
    made, again = (load(Data(**cfg), FakeTokenizer(), seed=0) for _ in range(2))
    assert not made.report.sources[0].cached and again.report.sources[0].cached
    assert batches(plain) == batches(made) == batches(again)
    held_out = [[document.messages for document in loaded.eval["held_out"]] for loaded in (plain, made, again)]
    assert held_out[0] == held_out[1] == held_out[2]
    (tmp_path / "b.jsonl").write_bytes(file.read_bytes())
    moved = load(Data(**{**cfg, "sources": (Source(path=str(tmp_path / "b.jsonl")),)}), FakeTokenizer(), seed=0)
    assert not moved.report.sources[0].cached  # a name may say what is in a file


CHANGES = [
    "bytes", "seq_len", "train_on", "train_on_end", "thinking", "overlong", "template", "tokenizer", "roles", "format",
    "function", "package", "library", "damage",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_documents_is_not_found(tmp_path, change, monkeypatch):
    file, tokenizer = write(tmp_path / "a.jsonl"), FakeTokenizer()
    cfg, source = {"cache": str(tmp_path / "kept")}, {"path": str(file)}
    if change == "function":
        (tmp_path / "f.py").write_text("def rows(row): return row")
        source["format"] = f"{tmp_path / 'f.py'}:rows"
    if change == "package":
        (tmp_path / "rows_of_mine.py").write_text("def rows(row): return row")
        monkeypatch.syspath_prepend(tmp_path)
        source["format"] = "rows_of_mine:rows"
    load(Data(sources=(Source(**source),), **cfg), tokenizer, seed=0)
    if change == "bytes":
        file.write_bytes(LINES.replace(b"what", b"whit"))
    elif change in ("seq_len", "train_on", "train_on_end", "thinking", "overlong"):
        other = {"seq_len": 100, "train_on": ("user",), "train_on_end": "none", "thinking": "drop", "overlong": "split"}
        cfg[change] = other[change]
    elif change == "function":
        (tmp_path / "f.py").write_text("def rows(row): return dict(row)")
    elif change == "package":
        (tmp_path / "rows_of_mine.py").write_text("def rows(row): return dict(row)")
    elif change == "library":
        monkeypatch.setattr("ftlib.data.cache._library", lambda: "another version")
    elif change == "template":
        tokenizer.chat_template = "other"
    elif change == "tokenizer":
        tokenizer.fingerprint = "other"
    elif change == "roles":
        source["roles"] = {"x": "user"}
    elif change == "format":
        source["format"] = "qa"
    else:
        (kept,) = (tmp_path / "kept").glob("*/input_ids.bin")
        kept.write_bytes(kept.read_bytes()[:-4])
    assert not load(Data(sources=(Source(**source),), **cfg), tokenizer, seed=0).report.sources[0].cached


def test_auto_keeps_large_files_and_finds_what_was_prepared(tmp_path, monkeypatch, cache):
    cfg = Data(sources=(Source(path=str(write(tmp_path / "a.jsonl"))),))
    load(cfg, FakeTokenizer(), seed=0)
    assert not cache.exists()
    monkeypatch.setattr("ftlib.data.cache.LARGE", 10)
    load(cfg, FakeTokenizer(), seed=0)
    assert load(cfg, FakeTokenizer(), seed=0).report.sources[0].cached
    monkeypatch.undo()
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path / "other"))
    load(cfg, FakeTokenizer(), seed=0, prepare=True)
    assert load(cfg, FakeTokenizer(), seed=0).report.sources[0].cached


def test_a_failed_preparation_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b"{")
    with pytest.raises(UserError, match="invalid JSON"):
        cfg = Data(sources=(Source(path=str(tmp_path / "a.jsonl")),), cache=str(tmp_path / "k"))
        load(cfg, FakeTokenizer(), seed=0)
    assert [file.suffix for file in (tmp_path / "k").iterdir()] == [".lock"]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path, workers):
    (tmp_path / "a.jsonl").write_bytes(LINES * 200 + b'{"question": 1, "answer": "x"}\n')
    cfg = {"sources": (Source(path=str(tmp_path / "a.jsonl")),), "on_bad_row": "report"}
    alone, many = (load(Data(**cfg, workers=n), FakeTokenizer(), seed=0) for n in (0, workers))
    assert batches(alone) == batches(many) and alone.report.lines() == many.report.lines()


BIG = """
import sys, threading, time
import numpy as np
from ftlib.data import load, store
from ftlib.sections import Data, Source
store._FLUSH = int(sys.argv[4])
sys.path.insert(0, sys.argv[1])
from fake_tokenizer import FakeTokenizer
class Whole:
    def __init__(self, text): self.ids = np.arange(3, 3 + len(text) // 4)
    def between(self, start, end): return 0, len(self.ids)
class Words(FakeTokenizer):
    def encode_batch(self, texts): return [Whole(text) for text in texts]
def held():
    with open("/proc/self/status") as about:
        return next(int(line.split()[1]) for line in about if line.startswith("RssAnon")) / 1024
before = most = held()
def watch():
    global most
    while True:
        most = max(most, held())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
found = load(Data(sources=(Source(path=sys.argv[2]),), seq_len=1 << 20, eval=5, cache=sys.argv[3]), Words(), seed=0)
print(found.train.target_counts.sum(), max(most, held()) - before)
"""
FILES = ("big.jsonl", "big.json")
SIZES = [(name, 25, 1 << 18, 20) for name in FILES]
SIZES += [pytest.param(name, 1000, 1 << 22, 60, marks=pytest.mark.slow) for name in FILES]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name,megabytes,flush,most", SIZES)
def test_memory_is_bounded_on_a_large_file(tmp_path, name, megabytes, flush, most):
    """What is mapped from files is no burden, so what counts is anonymous memory. 1 GB of text, 1.2 GB of tokens and
    masks, need less than 60 MB; 25 MB with a smaller buffer less than 20."""
    file, comma = tmp_path / name, "," if name == "big.json" else ""
    row = json.dumps({"text": "word " * 2000})
    with open(file, "w") as opened:
        opened.write("[" if comma else "")
        for n in range(100 * megabytes):
            opened.write((comma if n else "") + row + "\n")
        opened.write("]" if comma else "")
    command = [sys.executable, "-c", BIG, str(Path(__file__).parent), str(file), str(tmp_path / "kept"), str(flush)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    targets, grown = map(float, done.stdout.split())
    assert targets > 249_000 * megabytes and grown < most, grown


# ---- verbs


CONFIG = """
model: {path: ftlib:demo/model}
data: {sources: [{path: rows.jsonl}], seq_len: 256, cache: ./kept}
steps: 1
"""


def test_prepare(tmp_path, capsys):
    write(tmp_path / "rows.jsonl")
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert prepare.main(["lora_sft", "--config", str(tmp_path / "c.yaml")]) == 0
    said = capsys.readouterr().out
    assert "5 rows, format qa (it has question and answer)" in said and "tokens/s" in said
    assert prepare.main(["lora_sft", "--config", str(tmp_path / "c.yaml")]) == 0
    assert "tokenised before" in capsys.readouterr().out and len(list(tmp_path.glob("kept/*/part.json"))) == 1
    for words, arguments in (("recipe comes first", []), ("data.cache is none", ["data.cache=none"])):
        with pytest.raises(UserError, match=words):
            prepare.main(["lora_sft", "--config", str(tmp_path / "c.yaml"), *arguments] if arguments else [])


def test_doctor(tmp_path, capsys):
    rows = [*ROWS, ROWS[0], {"question": "<b>&", "answer": ""}, {"question": "x " * 3000, "answer": "y"}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"question": 3}\n{broken\n'
    (tmp_path / "a.jsonl").write_text(text)
    arguments = [str(tmp_path / "a.jsonl"), "--eval", str(write(tmp_path / "b.jsonl")), "--out", str(tmp_path / "out")]
    assert doctor.main(arguments) == 0
    said = capsys.readouterr().out
    for fact in (
        "rows: 10", "qa (it has question and answer)", "broken: 2 rows", "no trained token: 1 rows",
        "longer than 2,048 tokens: 1 rows", "exact repeats: 1 rows", "held out as well: 6 rows", "a.jsonl:9",
        "a.jsonl:10", "imbalance", "trained tokens of a row",
    ):  # fmt: skip
        assert fact in said, fact
    with open(tmp_path / "out" / "rows.csv", encoding="utf-8") as opened:
        found = list(csv.DictReader(opened))
    assert len(found) == 10 and found[5]["repeat_of"].endswith("a.jsonl:1") and found[8]["state"].startswith("broken")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<mark>" in page and "it is ü 0" in page and "src=" not in page and "<b>&" not in page
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match="invalid JSON"):
        doctor.main([str(tmp_path / "bad.jsonl")])


def test_doctor_says_what_its_own_command_line_can(tmp_path):
    """Not `columns` or `path` of a config that is not there; the mapping is of the columns that are."""
    for row, mapping in (
        ({"frage": "a", "antwort": "b"}, "{question: frage, answer: antwort}"),
        ({"id": 3, "antwort": "b", "frage": "a"}, "{question: frage, answer: antwort}"),
        ({"satz": "b"}, "{text: satz}"),
    ):
        (file := tmp_path / "a.jsonl").write_text(json.dumps(row))
        with pytest.raises(UserError) as told:
            doctor.main([str(file)])
        assert told.value.where == str(file) and f"data.sources[0].columns: {mapping}" in told.value.fix
        assert "goes into the config" in told.value.fix
    with pytest.raises(UserError) as told:
        doctor.main([str(file), "--format", "chatty"])
    assert told.value.where == "--format"
    (file := tmp_path / "a.yaml").write_text("a: 1")
    with pytest.raises(UserError) as told:
        doctor.main([str(file)])
    assert told.value.where == str(file)
