"""Wrong configs and files, through the command: exit code 2 and one message that says what and where."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from tiny_model import train, tune, write_config

from ftlib import cli

RUN = "run recipes/lora_sft.py --config good.yaml "
OVER = "run recipes/lora_sft.py --config good.yaml --config wrong.yaml"


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def bigger_ids(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"][1]["id"] = content["model"]["vocab"]["<|im_start|>"] = 700
    file.write_text(json.dumps(content))


def bad_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"{{{{")


def chat(*contents, roles=("user", "assistant")):
    pairs = zip(roles, contents, strict=True)
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]}) + "\n"


GOOD_ROW = chat("a", "b")

# name: (words of the command, text of wrong.yaml or of rows.jsonl or what is done to the model, what the message says)
CONFIGS = {
    "unknown key": (OVER, "lora:\n  rnk: 4\n", "wrong.yaml:2: lora.rnk: no such key (did you mean 'lora.rank'?)"),
    "another library's key": (OVER, "learning_rate: 1\n", "wrong.yaml:1: learning_rate: no such key", "optim.lr"),
    "wrong type": (OVER, "optim: {lr: fast}\n", "wrong.yaml:1: optim.lr: expected number, got text 'fast'"),
    "wrong choice": (OVER, "dtype: bf61\n", "wrong.yaml:1: dtype: expected one of", "did you mean 'bf16'?"),
    "twice": (OVER, "steps: 3\nseed: 1\nsteps: 4\n", "wrong.yaml:3: the key 'steps' is set twice, first in line 1"),
    "not YAML": (OVER, "lora: {rank: 4\n", "wrong.yaml:", "not valid YAML"),
    "a tag": (OVER, "model: !!python/name:os.system {}\n", "wrong.yaml:1: the tag", "is not allowed"),
    "all at once": (OVER, "setps: 3\nlora: {rank: 0}\n", "2 problems", "'steps'", "lora.rank"),
    "on the command line": (RUN + "optim.lr=-1", "", "command line: optim.lr=-1: optim.lr: must be above 0"),
    "no such config": ("run recipes/lora_sft.py --config god.yaml", "", "god.yaml: no such config", "'good.yaml'"),
    "no such recipe": ("run recipes/lora_stf.py --config good.yaml", "", "no such recipe", "lora_sft.py"),
    "rows that do not divide": (RUN + "batch.micro_rows=3", "", "batch.rows 4 is no multiple of batch.micro_rows 3"),
    "no such layer": (RUN + "lora.targets=[q_prj]", "", "lora.targets", "did you mean 'q_proj'?"),
    "no such model": (RUN + "model.path=./modle", "", "modle: no such file or folder"),
    "no such shipped model": (RUN + "model.path=ftlib:demo/modle", "", "ftlib:demo/modle: the package ships no such"),
    "no such data": (RUN + "data.sources[0].path=rwos.jsonl", "", "rwos.jsonl"),
    "no such template": (RUN + "data.template=chatlm", "", "data.template", "did you mean 'chatml'?"),
    "nothing left to train on": (RUN + "data.eval=96", "", "data.eval", "leaves none to train on"),
    "hardly anything left": (
        RUN + "data.eval=95 data.seq_len=34", "",
        "leaves none to train on; dropped were ", "longer than data.seq_len=34",
        "hold out fewer, or add rows; raise data.seq_len (now 34)",
    ),
    "nothing to resume": (RUN + "checkpoint.resume=required", "", "there is no checkpoint to resume from"),
    "a file in the way": (RUN + "output_dir=good.yaml", "", "good.yaml"),
    "too many processes": ("validate recipes/lora_sft.py --config good.yaml --world 3", "", "batch.rows 4"),
}  # fmt: skip
ROWS = {
    "broken line": (f"{GOOD_ROW}{GOOD_ROW}{GOOD_ROW[:-3]}\n", "rows.jsonl:3", "invalid JSON"),
    "unknown role": (GOOD_ROW + chat("a", "b", roles=("user", "asistant")), "rows.jsonl:2", "asistant"),
    "another shape": ('{"first": "a", "second": "b"}\n', "data.sources[0]", "no known format", "[first, second]"),
    "too long": (chat("a" * 99, "b"), "rows were dropped", "longer than data.seq_len=64"),
    "not text": (GOOD_ROW + chat("a", 5), "rows.jsonl:2", "content"),
    "no rows": ("", "rows.jsonl is empty"),
}
MODELS = {
    "unknown architecture": (lambda folder: change_config(folder, model_type="lama"), "'lama'", "llama"),
    "weights cut off": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors", "expected"),
    "weights damaged": (bad_header, "model.safetensors"),
    "weights of another size": (lambda folder: change_config(folder, intermediate_size=97), "gate_proj", "[97, 64]"),
    "pickled weights": (no_weights, "no .safetensors file", "pytorch_model.bin"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer", "tokenizer.path"),
    "a tokenizer of another model": (bigger_ids, "token 700", "embeddings for 260 tokens"),
    "no chat template": (lambda folder: (folder / "tokenizer_config.json").write_text("{}"), "data.template=chatml"),
}


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """A working directory with a model, rows and a good config."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.model, "model")
    shutil.copy(tiny.rows, "rows.jsonl")
    write_config(tmp_path / "good.yaml", Path("model"), Path("rows.jsonl"), steps=2, output_dir="out")
    return tmp_path


def one_message(capsys, argv, expected):
    assert cli.main(argv.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("error: ") == 1
    assert "Traceback" not in errors
    for words in expected:
        assert words in errors


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name, here, capsys):
    argv, text, *expected = CONFIGS[name]
    (here / "wrong.yaml").write_text(text)
    one_message(capsys, argv, expected)


@pytest.mark.parametrize("verb", ["run", "validate"])
@pytest.mark.parametrize("name", ROWS)
def test_rows(name, verb, here, capsys):
    text, *expected = ROWS[name]
    (here / "rows.jsonl").write_text(text)
    one_message(capsys, RUN.replace("run", verb, 1), expected)


@pytest.mark.parametrize("verb", ["run", "validate"])
@pytest.mark.parametrize("name", MODELS)
def test_model(name, verb, here, capsys):
    damage, *expected = MODELS[name]
    damage(here / "model")
    one_message(capsys, RUN.replace("run", verb, 1), expected)


def test_other_settings_than_the_checkpoint_s(here, capsys):
    train("lora_sft", "--config", "good.yaml")
    for change in ("lora.rank=4", "seed=1", "data.seq_len=63"):
        one_message(capsys, RUN + f"steps=4 {change}", [change.split("=")[0], "then", "now", "checkpoint.resume=never"])


def test_the_process_ends_with_2_and_nothing_on_stdout(here):
    code, said, errors = tune("run", "recipes/lora_sft.py", "--config", "good.yaml", "lora.rnk=3", cwd=here)
    assert (code, said) == (2, "")
    assert errors == "error: command line: lora.rnk=3: lora.rnk: no such key (did you mean 'lora.rank'?)\n"
    code, said, errors = tune(
        "run", "--nproc-per-node", "2", "recipes/lora_sft.py", "--config", "good.yaml", "data.sources[0].path=x.jsonl",
        cwd=here,
    )  # fmt: skip
    assert (code, said) == (2, "") and errors.startswith("error: ") and "x.jsonl" in errors
