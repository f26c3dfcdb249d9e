"""A hundred wrong inputs to the command line: each ends with one message, exit code 2 and nothing half done."""

import json
from pathlib import Path

import pytest
from tiny_model import write_config, write_model, write_rows

from ftlib import cli

RECIPE = "recipes/lora_sft.py"
MISTAKES = {  # the words after `tune`, and what the one message must say
    # no such thing
    ("trian",): "unknown verb 'trian'",
    ("Run",): "did you mean 'run'?",
    ("--verbose",): "unknown option '--verbose'",
    ("ls", "extra"): "unknown argument 'extra'",
    ("ls", "--all"): "unknown option '--all'",
    ("help", "nonsense"): "unknown topic 'nonsense'",
    ("help", "config", "nope.py"): "nope.py: no such recipe",
    ("help", "config", "lora_sft", "optim.lrr"): "did you mean 'optim.lr'?",
    ("help", "config", "lora_sft", "a", "b"): "unknown topic",
    ("help", "schema"): "tune help schema: of which recipe?",
    ("help", "schema", "rows.jsonl"): "rows.jsonl: is no recipe",
    ("help", "run", "more"): "unknown topic 'run more'",
    ("completion",): "required: SHELL",
    ("completion", "powershell"): "invalid choice: 'powershell'",
    ("env", "--json"): "unknown option '--json'",
    # run and validate
    ("run",): "the recipe comes before --config",
    ("run", "--config", "c.yaml"): "the recipe comes before --config",
    ("run", "lora_stf", "--config", "c.yaml"): "no such recipe (did you mean 'recipes/lora_sft.py'?)",
    ("run", "rows.jsonl"): "rows.jsonl: is no recipe",
    ("run", "empty.py"): "is no recipe, it defines no Config and no main",
    ("run", RECIPE): "model.path: required, but not set",
    ("run", RECIPE, "--config"): "--config needs a file after it",
    ("run", RECIPE, "--config", "none.yaml"): "none.yaml: no such config",
    ("run", RECIPE, "--config", "c.yml"): "(did you mean 'c.yaml'?)",
    ("run", RECIPE, "--config", "model"): "is a folder, not a config",
    ("run", RECIPE, "--config", "rows.jsonl"): "rows.jsonl",
    ("run", RECIPE, "c.yaml"): "a file is given as --config c.yaml",
    ("run", RECIPE, "--config", "c.yaml", "--lr=3"): "keys are set as optim.lr=3",
    ("run", RECIPE, "--config", "c.yaml", "optim.lr"): "expected key=value, got 'optim.lr'",
    ("run", RECIPE, "--config", "c.yaml", "optim.lr="): "optim.lr",
    ("run", RECIPE, "--config", "c.yaml", "lr=1e-3"): "did you mean 'optim.lr'?",
    ("run", RECIPE, "--config", "c.yaml", "optim.lr=fast"): "optim.lr: expected number, got text 'fast'",
    ("run", RECIPE, "--config", "c.yaml", "optim.lr=-1"): "must be above 0",
    ("run", RECIPE, "--config", "c.yaml", "lora.rank=0"): "rank: must be at least 1",
    ("run", RECIPE, "--config", "c.yaml", "lora.dropout=1"): "must be in [0, 1)",
    ("run", RECIPE, "--config", "c.yaml", "lora.targets=[nothing]"): "nothing",
    ("run", RECIPE, "--config", "c.yaml", "dtype=fp16"): "expected one of 'bf16', 'fp32'",
    ("run", RECIPE, "--config", "c.yaml", "steps=many"): "steps",
    ("run", RECIPE, "--config", "c.yaml", "steps=0"): "0 steps are none",
    ("run", RECIPE, "--config", "c.yaml", "optim.spike=rollback", "checkpoint.every=0"): "set checkpoint.every above 0",
    ("run", RECIPE, "--config", "c.yaml", "steps=-3", "output_dir=elsewhere"): "-3 steps are none",
    ("run", RECIPE, "--config", "c.yaml", "~steps", "epochs=-1"): "-1 epochs are none",
    ("validate", RECIPE, "--config", "c.yaml", "output_dir=rows.jsonl"): "rows.jsonl is a file, not a folder",
    ("validate", RECIPE, "--config", "c.yaml", "output_dir=/proc/x"): "/proc cannot be written to",
    ("validate", RECIPE, "--config", "c.yaml", "lora.start_from=cut_adapter"): "damaged or cut off",
    ("generate", "model", "--prompt", "x", "--adapter", "cut_adapter"): "damaged or cut off",
    ("run", RECIPE, "--config", "c.yaml", "model.path=nowhere/at/all"): "no such file or folder",
    ("run", RECIPE, "--config", "c.yaml", "model.path=ftlib:demo/nothing"): "the package ships no such file",
    ("run", RECIPE, "--config", "c.yaml", "model.path=bare"): "has no config.json",
    ("run", RECIPE, "--config", "c.yaml", "model.path=odd"): "model_type 'odd' is not supported",
    ("run", RECIPE, "--config", "c.yaml", "model.path=cut"): "cut",
    ("run", RECIPE, "--config", "c.yaml", "model.attention=fast"): "model.attention",
    ("run", RECIPE, "--config", "c.yaml", "model.code=none.py:Decoder"): "none.py",
    ("run", RECIPE, "--config", "c.yaml", "tokenizer.path=bare"): "holds no tokenizer",
    ("run", RECIPE, "--config", "c.yaml", "data.sources=[]"): "at least one is needed",
    ("run", RECIPE, "--config", "c.yaml", "data.sources[0].path=none.jsonl"): "none.jsonl",
    ("run", RECIPE, "--config", "c.yaml", "data.sources[0].path=model"): "model",
    ("run", RECIPE, "--config", "c.yaml", "data.sources[0].path=empty.py"): "empty.py",
    ("run", RECIPE, "--config", "c.yaml", "data.sources[0].format=chatty"): "chatty",
    ("run", RECIPE, "--config", "c.yaml", "data.sources[0].weight=0"): "must be a number above 0",
    ("run", RECIPE, "--config", "c.yaml", "data.sources[3].path=x"): "so there is no [3]",
    ("run", RECIPE, "--config", "c.yaml", "data.seq_len=8"): "seq_len",
    ("run", RECIPE, "--config", "c.yaml", "data.seq_len=1"): "must be at least 2",
    ("run", RECIPE, "--config", "c.yaml", "data.eval=1000"): "holding out",
    ("run", RECIPE, "--config", "c.yaml", "data.template=no-such"): "no-such",
    ("run", RECIPE, "--config", "c.yaml", "data.overlong=cut"): "data.overlong",
    ("run", RECIPE, "--config", "c.yaml", "batch.rows=6"): "set batch.micro_rows=3, which trains the same",
    ("run", RECIPE, "--config", "c.yaml", "batch.micro_rows=0"): "must be at least 1",
    ("run", RECIPE, "--config", "c.yaml", "batch.rowz=4"): "did you mean 'batch.rows'?",
    ("run", RECIPE, "--config", "c.yaml", "parallel.dp_shard=4"): "but there is 1 process",
    ("run", RECIPE, "--config", "c.yaml", "parallel.tp=0"): "must be at least 1",
    ("run", RECIPE, "--config", "c.yaml", "checkpoint.keep=0"): "must be at least 1",
    ("run", RECIPE, "--config", "c.yaml", "checkpoint.resume=required"): "there is no checkpoint to resume from",
    ("run", RECIPE, "--config", "c.yaml", "log.to=[printer]"): "printer",
    ("run", RECIPE, "--config", "c.yaml", "output_dir=rows.jsonl"): "rows.jsonl",
    ("run", RECIPE, "--config", "c.yaml", "~optim.lrr"): "did you mean 'optim.lr'?",
    ("run", RECIPE, "--nproc-per-node", "2"): "--nproc-per-node comes before the recipe",
    ("run", "--nproc-per-node"): "tune run",
    ("run", "--nproc-per-node", "two", RECIPE): "--nproc-per-node two",
    ("run", "--nproc-per-node", "0", RECIPE): "at least 1 process",
    ("run", "--nproc", "0", RECIPE): "--nproc-per-node 0: at least 1 process",
    ("run", "--nproc-per-node", "2", "nope.py"): "nope.py: no such recipe",
    ("run", "--nproc-per-node", "2", RECIPE, "--config", "c.yaml", "batch.rows=4"): "is no multiple of",
    ("run", "--nnodes", "2", RECIPE, "--config", "c.yaml"): "--nnodes 2, and no address at which the nodes meet",
    ("run", "--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-endpoint=no.such.host.invalid:29500", RECIPE):
        "no machine is called 'no.such.host.invalid' here",
    ("run", "--nnodes", "2", "--master-addr", "no.such.host.invalid", RECIPE): "where: --master-addr",
    ("run", "c.yaml"): "tune run RECIPE --config c.yaml",
    ("validate", "c.yaml"): "is no recipe but a config\n  fix: the recipe comes first: tune validate RECIPE",
    ("preview", "c.yaml"): "tune preview RECIPE --config c.yaml",
    ("prepare", "c.yaml"): "tune prepare RECIPE --config c.yaml",
    ("prepare", "rows.jsonl"): "tune prepare RECIPE --config FILE, where FILE names the rows; tune doctor rows.jsonl",
    ("validate", RECIPE, "--config", "c.yaml", "data.eval=1.5"): "1.5 is neither a share below 1 (0.05) nor a whole",
    ("validate", RECIPE, "--config", "c.yaml", "eval.patience=2"): "so eval.every must be above 0",
    ("validate", RECIPE, "--config", "c.yaml", "tokenizer.path=cut_tokenizer"): "fix: copy or download it again",
    ("validate",): "the recipe comes before --config",
    ("validate", "--world", "2"): "the recipe comes before --config",
    ("validate", "--nproc-per-node", "2", RECIPE, "--config", "c.yaml"): "set batch.micro_rows=2, which",
    ("validate", "--nnodes=2", RECIPE, "--config", "c.yaml", "parallel.dp_shard=1"): "but there are 2 processes",
    ("validate", RECIPE, "--nproc-per-node=2"): "--nproc-per-node comes before the recipe",
    ("validate", "--nproc-per-node", "2", RECIPE, "--world", "2"): "leave --world out",
    ("validate", "--bogus", "2", RECIPE): "tune validate: unrecognized arguments: --bogus",
    ("validate", RECIPE, "--config", "c.yaml", "--world"): "--world needs a number",
    ("validate", RECIPE, "--config", "c.yaml", "--world", "0"): "--world needs a number",
    ("validate", RECIPE, "--config", "c.yaml", "--world", "3", "parallel.dp_shard=2"): "but there are 3 processes",
    # preview and init
    ("preview",): "the recipe comes first",
    ("preview", RECIPE, "--config", "c.yaml", "--rows", "x"): "--rows needs a number",
    ("preview", RECIPE, "--config", "c.yaml", "data.sources[0].path=none.jsonl"): "none.jsonl",
    ("init",): "required: DATA",
    ("init", "none.jsonl"): "none.jsonl",
    ("init", "rows.jsonl", "--out", "c.yaml"): "c.yaml exists and stays as it is",
    ("init", "rows.jsonl", "--out", "c.txt"): "c.txt is no .yaml file",
    ("init", "rows.jsonl", "--model", "no/such/model"): "no such file or folder",
    ("init", "rows.jsonl", "--recipe", "dance"): "invalid choice: 'dance'",
    ("init", "odd.jsonl", "--model", "model"): "the columns [colour] fit no known format",
    # files of others
    ("cp", "lora_sft"): "required: DEST",
    ("cp", "lora_sft", "empty.py"): "exists and stays as it is",
    ("cp", "demo_loraa", "x.yaml"): "ftlib ships nothing of this name",
    ("cp", "lora_sft", "rows.jsonl/x.py"): "cannot be written",
    ("cp", "lora_sft", "../nodir/x/y.py"): "nodir/x: no such folder\n  fix: make it first",
    ("diff", "none.py"): "none.py cannot be read",
    ("diff", "empty.py"): "does not say what it was copied from",
    ("update", "none.py"): "none.py cannot be read",
    ("update", "rows.jsonl"): "does not say what it was copied from",
    ("import", "none.yaml"): "none.yaml cannot be read",
    ("import", "c.yaml"): "looks like a config of ours",
    ("import", "rows.jsonl"): "is no config but a file of rows\n  fix: tune init rows.jsonl",
    ("import", "rows.jsonl", "--from", "trl"): "invalid choice: 'trl'",
    # models
    ("generate", "model"): "--prompt --prompts is required",
    ("generate", "nowhere/at/all", "--prompt", "x"): "no such file or folder",
    ("generate", "model", "--prompt", "x", "--max-new-tokens", "0"): "at least 1",
    ("generate", "model", "--prompt", "x", "--temperature", "-1"): "at least 0",
    ("generate", "model", "--prompt", "x", "--raw", "--system", "y"): "--system needs the chat template",
    ("generate", "model", "--prompt", "x", "--adapter", "bare"): "is no adapter",
    ("chat", "model", "--max-new-tokens", "0"): "at least 1",
    ("chat", "odd"): "model_type 'odd' is not supported",
    ("merge", "model", "model", "merged"): "is no adapter",
    ("merge", "model", "bare", "merged"): "has no adapter_config.json\n  fix: name a folder with",
    ("merge", "model", "torn_adapter", "merged"): "fix: copy or download it again",
    ("merge", "cut_adapter", "model", "merged"): "the model comes first\n  fix: tune merge model cut_adapter merged",
    ("merge", "model", "nowhere/at/all", "merged"): "no such file or folder",
    ("merge", "model", "model", "bare"): "bare exists and stays as it is",
    ("chat", "run"): "run has no config.json\n  fix: name the result of this run, run/final\n",
    ("generate", "run/checkpoints/step_000001", "--prompt", "x"): "fix: name the result of this run, run/final\n",
    ("generate", "model", "--adapter", "run", "--prompt", "x"): "fix: name the result of this run, run/final\n",
    ("merge", "model", "run", "merged"): "adapter_config.json\n  fix: name the result of this run, run/final\n",
    ("gguf", "run", "run.gguf"): "fix: name the result of this run, run/final\n",
    ("serve", "run/checkpoints"): "fix: name the result of this run, run/final\n",
    ("generate", "begun", "--prompt", "x"): "no result yet; `tune merge MODEL begun/checkpoints/step_000002 OUT`",
    ("merge", "model", "whole/final", "merged"): "adapter_config.json\n  fix: name a folder with",
    ("run", RECIPE, "--config", "c.yaml", "model.path=run"): "fix: name the result of this run, ",
    ("gguf", "model"): "required: OUT.gguf",
    ("gguf", "model", "m.bin"): "m.bin is no .gguf file",
    ("gguf", "model", "m.gguf", "--dtype", "q4_k"): "invalid choice: 'q4_k'",
    ("gguf", "model", "m.gguf"): "split pattern is not known",
    ("download", "noslash"): "noslash: is no Hub id",
    ("download", "a/b@v1", "--revision", "v2"): "two revisions",
    ("push", "model", "noslash"): "noslash: is no Hub id",
    ("push", "bare", "a/b"): "neither an adapter nor a model",
    ("push", "nowhere", "a/b"): "nowhere: no such folder",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A working directory with a model, rows, a config, and things that are none."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_config(folder / "c.yaml", write_model(folder / "model"), write_rows(folder / "rows.jsonl", 40), steps=1)
    (folder / "empty.py").write_text("")
    (folder / "odd.jsonl").write_text('{"colour": "red"}\n')
    (folder / "cut_adapter").mkdir()
    (folder / "cut_adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}'
    )
    (folder / "cut_adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    (folder / "torn_adapter").mkdir()
    (folder / "torn_adapter" / "adapter_config.json").write_text('{"peft_type": "LO')
    write_model(folder / "cut_tokenizer")
    (folder / "cut_tokenizer" / "tokenizer.json").write_text('{"version": "1.0", "added')
    write_model(folder / "cut_config")
    (folder / "cut_config" / "config.json").write_text('{"model_type": "lla')
    (folder / "bad.jinja").write_text("{% for m in messages %}{{ m.foo.bar }}{% endfor %}")
    (folder / "bare").mkdir()
    (folder / "bare" / "notes.txt").write_text("not empty")
    for name in ("run/final", "run/checkpoints/step_000001", "begun/checkpoints/step_000002", "whole/final"):
        (folder / name).mkdir(parents=True)
    (folder / "run" / "final" / "adapter_config.json").write_text("{}")
    (folder / "whole" / "checkpoints" / "step_000001").mkdir(parents=True)
    (folder / "whole" / "final" / "config.json").write_text("{}")
    (folder / "odd").mkdir()
    (folder / "odd" / "config.json").write_text('{"model_type": "odd"}')
    write_model(folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def test_there_are_a_hundred():
    assert len(MISTAKES) >= 100


@pytest.mark.parametrize("argv", MISTAKES, ids=" ".join)
def test_one_message_and_2(argv, made, capsys, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(path.name for path in made.iterdir())
    assert cli.main(list(argv)) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("error: ") == 1
    assert "Traceback" not in told
    assert MISTAKES[argv] in told, told
    after = sorted(path.name for path in made.iterdir() if path.name not in ("out", "output"))
    assert [name for name in after if name not in before] == []


def test_every_problem_of_one_command_is_in_the_one_message(made, capsys, monkeypatch):
    monkeypatch.chdir(made)
    assert cli.main(["validate", RECIPE, "--config", "c.yaml", "optim.lrr=1", "lora.rank=x", "batch.rows=0"]) == 2
    told = capsys.readouterr().err
    assert "3 problems" in told and all(words in told for words in ("optim.lrr", "lora.rank", "batch.rows"))
    assert json.loads(Path("c.yaml").read_text())


@pytest.mark.parametrize(
    ("override", "problem"),
    [("model.path=cut_config", "not valid JSON"), ("data.template=bad.jinja", "the chat template failed")],
)
def test_one_mistake_is_told_once(made, capsys, monkeypatch, override, problem):
    """Though model and tokenizer read the same file, and every row meets the same template."""
    monkeypatch.chdir(made)
    assert cli.main(["validate", RECIPE, "--config", "c.yaml", override]) == 2
    told = capsys.readouterr().err
    assert told.count(problem) == 1 and "fix: " in told, told
    assert max(map(len, told.splitlines())) < 400
