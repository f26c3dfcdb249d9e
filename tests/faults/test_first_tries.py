"""What a newcomer gets wrong in a config, its values and its files: one message that says where, and exit code 2."""

import errno
import os
from pathlib import Path

import pytest
from tiny_model import write_model, write_rows, write_tokenizer

from ftlib import cli, errors
from ftlib.errors import UserError, about

GOOD = """\
model: {path: model}
data:
  sources:
    - path: rows.jsonl
  seq_len: 64
batch: {rows: 2}
steps: 1
dtype: fp32
output_dir: out
"""
SOURCE = "    - path: rows.jsonl\n"
CHANGED = {  # what is replaced, by what, and what the message must hold
    "sources as a text": (
        "  sources:\n" + SOURCE, "  sources: rows.jsonl\n", "c.yaml:3: ", "(write [{path: rows.jsonl}])",
    ),
    "sources as one": ("  sources:\n" + SOURCE, "  sources: {path: a}\n", "c.yaml:3: ", "(put it into a list: [{…}])"),
    "a source as a text": (SOURCE, "    - rows.jsonl\n", "c.yaml:4: data.sources[0]", "(write {path: rows.jsonl})"),
    "model as a text": ("{path: model}", "model", "c.yaml:1: model: ", "(write {path: model})"),
    "batch as a number": ("{rows: 2}", "2", "c.yaml:6: batch: ", "(its keys: rows, micro_rows)"),
    "no path": ("path: rows.jsonl", "path:", "c.yaml:4: data.sources[0].path", "got null"),
    "an empty path": ("path: rows.jsonl", "path: ''", "c.yaml:4: data.sources[0].path: an empty text is no path"),
    "an empty folder": ("output_dir: out", "output_dir: ''", "c.yaml:9: output_dir: an empty text is no path"),
    "rows in place of a path": ("rows.jsonl", "'" + "x " * 3000 + "'", "c.yaml:4: data.sources[0].path", "too long"),
    "a long folder": ("output_dir: out", "output_dir: " + "x" * 300, "output_dir (c.yaml:9)", "too long"),
    "a percentage": ("  seq_len", "  eval: 5%\n  seq_len", "c.yaml:5: data.eval", "(write 0.05)"),
    "thousands": ("64", "4k", "c.yaml:5: data.seq_len", "(write 4000 or 4096)"),
    "grouped digits": ("64", "4,096", "c.yaml:5: data.seq_len", "(write 4096)"),
    "a split in percent": (SOURCE, SOURCE + "      split: 90%\n", "split '90%'", "data.sources[0].split (c.yaml:5)"),
    "a split of nothing": (
        SOURCE, SOURCE + "      split: '[99:]'\n", "leaves no rows", "data.sources[0].split (c.yaml:5)",
    ),
    "a split by name": (SOURCE, SOURCE + "      split: test\n", "'test'", "data.sources[0].split (c.yaml:5)"),
    "a folder with a bad file": ("rows.jsonl", "mixed", "broken.jsonl", "data.sources[0].path (c.yaml:4)"),
    "an open quote": ("path: rows.jsonl", 'path: "rows.jsonl', "c.yaml:4: not valid YAML: the quote that begins here"),
    "an open brace": ("{rows: 2}", "{rows: 2", "c.yaml:6: not valid YAML: what is opened here is not closed"),
    "a bare pattern": ("rows.jsonl", "*.jsonl", "c.yaml:4: not valid YAML: a text that begins with * needs quotes"),
    "a folder far away": (": out\n", ": s3://b/run\n", "c.yaml:9: output_dir: s3://b/run is an address", "mount"),
    "a file for a cache": ("  seq_len", "  cache: ./rows.jsonl\n  seq_len", "is a file", "data.cache (c.yaml:5)"),
    "code without a class": ("model}", "model, code: ./mine.py}", "names a file and no class", "model.code (c.yaml:1)"),
    "code that is a function": ("model}", "model, code: './mine.py:f'}", "no class of torch", "model.code (c.yaml:1)"),
    "code of another kind": ("model}", "model, code: './mine.py:A'}", "no class of torch", "model.code (c.yaml:1)"),
    "code that takes nothing": ("model}", "model, code: './mine.py:B'}", "called with (arch)", "model.code (c.yaml:1)"),
}  # fmt: skip
ADDED = {  # from line 10 on
    "gigabytes": ("memory: {budget_gib: 24GB}\n", "c.yaml:10: memory.budget_gib", "(write 24)"),
    "a typographic minus": ("optim: {lr: 1e\u22124}\n", "c.yaml:10: optim.lr", "(write 1e-4)"),
    "a name for a pattern": ("lora: {targets: q_proj}\n", "lora.targets (c.yaml:10)", "goes into a list: [q_proj]"),
    "no space": ("seed:1\n", "c.yaml:10: not valid YAML: a line is `key: value`", "'seed:1'"),
    "no colon": ("optim\n  lr: 1e-4\n", "c.yaml:10: not valid YAML: a line is `key: value`", "'optim'"),
    "a decimal comma": ('optim: {lr: "0,001"}\n', "c.yaml:10: optim.lr", "(write 0.001)"),
    "one beta": ("optim: {betas: [0.9]}\n", "c.yaml:10: optim.betas", "a list of 1 (write [0.9, 0.95], for instance)"),
    "a beta out of range": (
        "optim: {name: ademamix, beta3: 1.5}\n", "c.yaml:10: optim.beta3: 1.5 is not in [0, 1); 0.9999 is usual",
    ),
    "a key and its value in one": (
        "optim: {groups: [{match:embed}]}\n", "c.yaml:10: optim.groups[0].match: put a space after ':' (write match: e",
    ),
    "a section that is null": ("loss: null\n", "c.yaml:10: loss: ", "command line write ~loss, for its defaults)"),
    "a section that is on": ("qat: true\n", "c.yaml:10: qat: ", "got true (write {} for its defaults; its keys: "),
    "a section that is off": ("qat: false\n", "c.yaml:10: qat: ", "got false (write null)"),
    "betas": ("optim: {betas: [0.9, 1.5]}\n", "c.yaml:10: optim.betas: both must lie in [0, 1)"),
    "decay": ("optim: {weight_decay: -0.1}\n", "c.yaml:10: optim.eps and weight_decay: must not be negative"),
    "no pad token": ("tokenizer: {pad_token: ''}\n", "c.yaml:10: tokenizer.pad_token: an empty text"),
    "a long seed": ("seed: 1180591620717411303424\n", "63 bits", "seed (c.yaml:10)"),
    "a signed seed": ("seed: -1\n", "no sign", "seed (c.yaml:10)"),
    "alpha": ("lora: {alpha: -16}\n", "c.yaml:10: lora.alpha", "must be above 0"),
    "evaluations of nothing": ("eval: {every: 5}\n", "eval.every would look", "data.eval, eval.every (c.yaml:10)"),
    "a share above 1": ("schedule: {warmup_steps: 1.5}\n", "c.yaml:10: schedule.warmup_steps: 1.5 is neither", "(0.1)"),
    "all of it": ("checkpoint: {every: 1.0}\n", "c.yaml:10: checkpoint.every: 1.0 is neither a whole number of steps"),
    "a share in percent": ("eval: {every: 10%}\n", "c.yaml:10: eval.every: expected whole number or", "(write 0.1)"),
    "a score that is not there": (
        "eval: {metric: eval_los}\n", "has no 'eval_los' (did you mean 'eval_loss'?)", "eval.metric (c.yaml:10)",
    ),
    "a score that is not counted": ("eval: {metric: exact_match}\n", "one of eval_loss; exact_match is counted where"),
    "a loss that is not on": ("loss: {eaft_k: 5}\n", "c.yaml:10: loss.eaft_alpha, eaft_k: only name=eaft reads them"),
    "noise": ("neftune: -1\n", "neftune (c.yaml:10)", "above 0"),
}  # fmt: skip
COMMANDS = {
    ("optim.lr=1,5",): "(write 1.5)",
    ("data.sources[0].columns={messages: talk}",): "not found; the file has [messages]\n  where: data.sources[0].col",
    ("data.sources.0.path=x",): "(an item is named data.sources[0])",
    ("--steps", "3"): "unknown option '--steps'; keys are set as steps=VALUE",
    ("model.path=adapter",): "adapter is an adapter, not a model\n  where: model.path (command line)\n  fix: name",
    ("data.template=locked/x.jinja",): "data.template (command line)",
    ("data.template=latin.jinja",): "is not UTF-8 text (byte 2)\n  where: data.template (command line)\n  fix: ",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A working directory with a model, rows, and files that are wrong."""
    folder = tmp_path_factory.mktemp("tries")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", 8)
    (folder / "mixed").mkdir()
    write_rows(folder / "mixed" / "a.jsonl", 8)
    (folder / "mixed" / "broken.jsonl").write_text("hello")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    write_tokenizer(folder / "adapter")
    (folder / "latin.jinja").write_bytes(b"{#\xe9#}")
    (folder / "mine.py").write_text(
        "import torch\ndef f():\n    pass\nclass A:\n    pass\nclass B(torch.nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n"
    )
    return folder


def told(folder, monkeypatch, capsys, verb, text, words=()):
    monkeypatch.chdir(folder)
    Path("c.yaml").write_text(text, encoding="utf-8")
    assert cli.main([verb, "lora_sft", "--config", "c.yaml", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("error: ") == 1 and "Traceback" not in said
    return said


@pytest.mark.parametrize("verb", ["validate", "run"])
@pytest.mark.parametrize("name", [*CHANGED, *ADDED])
def test_a_first_try(name, verb, here, monkeypatch, capsys):
    if name in ADDED:
        more, *expected = ADDED[name]
        text = GOOD + more
    else:
        old, new, *expected = CHANGED[name]
        assert old in GOOD
        text = GOOD.replace(old, new, 1)
    said = told(here, monkeypatch, capsys, verb, text)
    assert all(words in said for words in expected), said


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_first_command(words, here, monkeypatch, capsys):
    assert COMMANDS[words] in told(here, monkeypatch, capsys, "validate", GOOD, words)


@pytest.mark.parametrize(("words", "rows"), [((), "5 rows"), (("data.pack=false",), "8 rows"), (("batch.rows=4",), "")])
def test_a_step_of_more_than_all_rows_is_said(words, rows, here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    Path("c.yaml").write_text(GOOD)
    assert cli.main(["validate", "lora_sft", "--config", "c.yaml", "batch.rows=99", "batch.micro_rows=1", *words]) == 0
    said = capsys.readouterr().out
    assert (f"batch.rows is 99, and all of the data fills about {rows} of data.seq_len" in said) == bool(rows)
    assert ("several times" in said) == bool(rows)


def test_what_the_system_refuses_is_a_message(here, monkeypatch, capsys):
    """Rights that a file lacks, seen as any user but root sees them."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    placed = "rows.jsonl: Permission denied\n  where: data.sources[0].path (c.yaml:4)\n  fix: mend its"
    at_once = "c.yaml:4: data.sources[0].path: 'rows.jsonl'… cannot be a path: Permission denied"
    refused = (("validate", "is_file", placed), ("run", "is_file", placed), ("run", "exists", at_once))
    for verb, method, words in refused:
        with monkeypatch.context() as patch:
            usual = getattr(Path, method)
            patch.setattr(Path, method, lambda self, u=usual: refuse(self) if self.name == "rows.jsonl" else u(self))
            assert words in told(here, monkeypatch, capsys, verb, GOOD)


def test_other_errors_of_the_system_stay_errors():
    assert errors.of_system(OSError(errno.EIO, "Input/output error")) is None
    assert errors.of_system(ValueError("x")) is None
    full = errors.of_system(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x"))
    assert "/data/x: No space left" in full.what and "free some space" in full.fix
    with pytest.raises(UserError) as caught, about("data.cache"):
        raise PermissionError(errno.EACCES, "Permission denied", "a")
    assert caught.value.where == "data.cache"
    with pytest.raises(OSError, match="Input"), about("data.cache"):
        raise OSError(errno.EIO, "Input/output error")
