"""Verbs of every day: env, preview, chat, merge of checkpoints, update, completion, help."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from tiny_model import ROOT, train, write_config, write_model, write_rows

from ftlib import cli, config, plugins, preflight
from ftlib.cli import assets, completion, env, update
from ftlib.errors import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder and 96 rows."""
    folder = tmp_path_factory.mktemp("daily")
    return SimpleNamespace(
        model=write_model(folder / "model"), rows=write_rows(folder / "rows.jsonl", 96), folder=folder
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tune(capsys, *argv):
    """(code, output, errors) in this process."""
    code = cli.main([str(word) for word in argv])
    return code, *capsys.readouterr()


# ---------------------------------------------------------------- preflight, env


def test_a_run_that_cannot_fit_is_told_before_it_starts(tiny, here, capsys, monkeypatch):
    file = write_config(here / "c.yaml", tiny.model, tiny.rows)
    assert tune(capsys, "validate", "lora_sft", "--config", file)[0] == 0
    monkeypatch.setattr(preflight, "available", lambda: ("this machine", 100_000, 1))
    code, _, err = tune(capsys, "validate", "full_sft", "--config", file)
    assert code == 2 and " of memory are needed (weights " in err and "this machine has 98 KiB" in err
    monkeypatch.undo()
    monkeypatch.chdir(here)
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: usage)
    code, _, err = tune(capsys, "run", "full_sft", "--config", file)
    assert code == 2 and "has 1000 B free" in err


def test_the_estimate_counts_what_is_certain(tiny):
    from ftlib import build

    lora, full = (plugins.load_file(ROOT / f"recipes/{name}.py") for name in ("lora_sft", "full_sft"))
    argv = [f"model.path={tiny.model}", f"data.sources=[{{path: {tiny.rows}}}]", "dtype=fp32", "data.seq_len=64"]
    needs = {}
    for recipe in (lora, full):
        cfg = config.load(recipe.Config, argv)
        needs[recipe] = preflight.need(build.check_model(cfg), cfg, 1)
    stored = sum(tensor.numel() for name, tensor in load_file(tiny.model / "model.safetensors").items())
    assert needs[full].weights == 4 * stored and needs[full].training == 12 * stored == needs[full].checkpoint
    assert needs[full].activations == 64 * 3 * 64 * 4
    assert needs[lora].training == 3 * (needs[lora].weights - 4 * stored)
    assert all(need.about > need.memory for need in needs.values())


def test_env(capsys):
    code, out, _ = tune(capsys, "env")
    assert "ftlib 0" in out and "torch " in out and ("all fits together" in out) == (code == 0)


@pytest.mark.parametrize(
    ("driver", "wheel"), [((13, 1), "cu130"), ((12, 9), "cu128"), ((12, 6), "cu126"), ((11, 8), None)]
)
def test_the_wheel_for_a_driver(driver, wheel):
    assert env.install_line(driver) == (
        wheel and f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{wheel}"
    )


def test_env_says_what_is_missing_and_what_does_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(env, "requirements", lambda: ["numpy>=99", "no-such-package>=1; python_version > '3'"])
    monkeypatch.setattr(env, "driver_cuda", lambda: (12, 8))
    code, out, _ = tune(capsys, "env")
    assert code == 1
    assert "pip install 'numpy>=99'" in out and "no-such-package is not installed" in out
    assert "the GPU is not used" in out and "whl/cu128" in out


# ---------------------------------------------------------------- preview, chat


def test_preview_marks_what_is_trained(tiny, here, capsys):
    file = write_config(here / "c.yaml", tiny.model, tiny.rows)
    code, out, _ = tune(capsys, "preview", "lora_sft", "--config", file, "--rows", 2)
    assert code == 0 and out.count("\n--- ") == 1 and out.startswith("--- rows: ")
    assert re.search(r"<\|im_start\|>user\nsay (\w+)<\|im_end\|>\n<\|im_start\|>assistant\n\[\[\1<\|im_end\|>\]\]", out)
    first = re.search(r"--- rows: (\d+) tokens, (\d+) trained", out)
    answer = re.search(r"\[\[(\w+)<", out)[1]
    assert int(first[2]) == len(answer) + 1


def test_preview_counts_what_it_read_and_says_what_it_left_out(tiny, here, capsys, monkeypatch):
    monkeypatch.setattr("ftlib.cli.preview.READ", 7)
    file = write_config(here / "c.yaml", tiny.model, tiny.rows)
    out = tune(capsys, "preview", "lora_sft", "--config", file, "data.eval=2", "--rows", 9)[1]
    shown = re.findall(r"--- rows: (\d+) tokens, (\d+) trained", out)
    tokens, trained = (sum(int(pair[i]) for pair in shown) for i in (0, 1))
    assert len(shown) == 7 and "rows: 7 rows, format messages" in out
    assert f"training: 7 documents, {tokens:,} tokens, {trained / tokens:.1%} trained" in out
    assert "first 7 rows of each source, and nothing is held out" in out
    split = tune(capsys, "preview", "lora_sft", "--config", file, "data.sources[0].split='[:4]'")[1]
    assert "training: 4 documents" in split


def test_preview_colours_on_a_terminal(tiny, here, capsys, monkeypatch):
    file = write_config(here / "c.yaml", tiny.model, tiny.rows)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[32m" in tune(capsys, "preview", "lora_sft", "--config", file)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[32m" not in tune(capsys, "preview", "lora_sft", "--config", file)[1]


def say(monkeypatch, *lines):
    remaining = [*lines]

    def ask(prompt=""):
        if not remaining:
            raise EOFError
        return remaining.pop(0)

    monkeypatch.setattr("builtins.input", ask)


def test_chat_keeps_streams_and_saves(tiny, here, capsys, monkeypatch):
    say(
        monkeypatch,
        "/system be kind",
        "say red",
        "say blue",
        "/undo",
        "/save t.jsonl",
        "/reset",
        "/save t.jsonl",
        "/quit",
    )
    code, out, err = tune(capsys, "chat", tiny.model, "--max-new-tokens", 4, "--temperature", 0)
    assert (code, err) == (0, "")
    kept, reset = (json.loads(line)["messages"] for line in Path("t.jsonl").read_text().splitlines())
    assert [m["role"] for m in kept] == ["system", "user", "assistant"]
    assert kept[0]["content"] == "be kind" and kept[1]["content"] == "say red"
    assert reset == kept[:1]
    assert kept[2]["content"] in out


def test_chat_equals_generate_and_writes_no_half_characters(tiny):
    from ftlib.cli.talk import Talk

    options = dict.fromkeys(("adapter", "code", "system", "dtype", "top_p", "top_k", "min_p"))
    options |= {"seed": 0, "device": "cpu", "stop": [], "template_arg": {}}
    talk = Talk.open(SimpleNamespace(model=str(tiny.model), max_new_tokens=12, temperature=0.0, **options))
    pieces = []
    answer = talk.answer("say red", pieces.append)
    assert "".join(pieces) == answer
    prompt = talk.tokenizer.apply_chat_template(talk.messages[:1], add_generation_prompt=True)
    tokens = talk.engine.generate([prompt], talk.params)[0][0].token_ids
    assert talk.tokenizer.decode(tokens, skip_special=True) == answer


def test_a_slip_in_chat_does_not_end_it(tiny, here, capsys, monkeypatch):
    say(monkeypatch, "/sytem x", "/save", "/save no/such/file", "/help", "x" * 600)
    code, out, err = tune(capsys, "chat", tiny.model)
    assert code == 0 and err.count("error: ") == 4
    assert "did you mean '/system'?" in err and "/save needs a file" in err and "the model was made for 512" in err
    assert all(word in out for word in ("/reset", "/undo", "/quit"))


# ---------------------------------------------------------------- any checkpoint -> a model


@pytest.mark.parametrize("recipe", ["lora_sft", "full_sft"])
def test_a_checkpoint_becomes_the_model_that_final_is(tiny, here, capsys, recipe):
    file = write_config(
        here / "c.yaml", tiny.model, tiny.rows, steps=2, checkpoint={"every": 1}, schedule={"name": "constant"}
    )
    train(recipe, "--config", file)
    out = here / "out"
    assert tune(capsys, "merge", tiny.model, out / "checkpoints/step_000002", "a")[0] == 0
    if recipe == "lora_sft":
        assert tune(capsys, "merge", tiny.model, out / "final", "b")[0] == 0
    wanted = load_file(("b" if recipe == "lora_sft" else out / "final") / Path("model.safetensors"))
    found = load_file("a/model.safetensors")
    assert found.keys() == wanted.keys() and all(found[k].equal(wanted[k]) for k in wanted)
    assert tune(capsys, "merge", tiny.model, out / "checkpoints/step_000001", "c")[0] == 0
    assert not all(load_file("c/model.safetensors")[k].equal(wanted[k]) for k in wanted)
    shard = next((out / "checkpoints/step_000001").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    code, _, err = tune(capsys, "merge", tiny.model, out / "checkpoints/step_000001", "d")
    assert code == 2 and "is damaged" in err and not Path("d").exists()


# ---------------------------------------------------------------- update


@pytest.fixture
def ships(here, monkeypatch):
    """A shipped recipe that may change, and a copy of it."""
    file = here / "ships" / "r.py"
    file.parent.mkdir()
    file.write_text("a = 1\nb = 2\nc = 3\nd = 4\ne = 5\n")
    monkeypatch.setattr(assets, "shipped", lambda kind: {"recipes/r.py": file} if kind == "recipes" else {})
    assert cli.main(["cp", "r", "my.py"]) == 0
    return file


def edit(path, old, new):
    Path(path).write_text(Path(path).read_text().replace(old, new))


def test_update_keeps_edits_and_brings_changes(ships, capsys):
    edit("my.py", "b = 2", "b = 20\nb2 = 21")
    edit(ships, "d = 4", "d = 40")
    assert tune(capsys, "update", "my.py", "--dry-run")[1].endswith("-d = 4\n+d = 40\n e = 5\n")
    assert tune(capsys, "update", "my.py")[0] == 0
    header, _, body = Path("my.py").read_text().partition("\n")
    assert body == "a = 1\nb = 20\nb2 = 21\nc = 3\nd = 40\ne = 5\n"
    assert header.endswith(assets.digest(ships.read_text()))
    code, out, _ = tune(capsys, "update", "my.py")
    assert code == 0 and "nothing to do" in out
    edit(ships, "e = 5", "e = 50")  # the original has moved on with the copy
    assert tune(capsys, "update", "my.py")[0] == 0
    assert Path("my.py").read_text().partition("\n")[2] == "a = 1\nb = 20\nb2 = 21\nc = 3\nd = 40\ne = 50\n"


def test_update_marks_what_contradicts(ships, capsys):
    edit("my.py", "c = 3", "c = 30")
    edit(ships, "c = 3", "c = 33")
    edit(ships, "e = 5", "e = 50")
    code, out, _ = tune(capsys, "update", "my.py")
    assert code == 1 and "1 place where both sides" in out
    body = Path("my.py").read_text().partition("\n")[2]
    assert body == "a = 1\nb = 2\n<<<<<<< yours\nc = 30\n=======\nc = 33\n>>>>>>> shipped\nd = 4\ne = 50\n"
    code, _, err = tune(capsys, "update", "my.py")
    assert code == 2 and "of an earlier update" in err


def test_update_without_the_original_says_what_to_do(ships, capsys):
    edit(ships, "c = 3", "c = 33")
    Path(".my.py.orig").unlink()
    code, _, err = tune(capsys, "update", "my.py")
    assert code == 2 and "the original of my.py is gone" in err and "tune diff my.py" in err


@pytest.mark.parametrize(
    ("mine", "theirs", "merged"),
    [
        ("abc", "abcd", "abcd"), ("xabc", "abc", "xabc"), ("bc", "abd", "bd"), ("", "abc", ""), ("abc", "", ""),
        ("aXbc", "abYc", "aXbYc"), ("abcZ", "abcZ", "abcZ"), ("ac", "ac", "ac"),
    ],
)  # fmt: skip
def test_three_way_merge(mine, theirs, merged):
    lines = ["".join(f"{c}\n" for c in text) for text in ("abc", mine, theirs, merged)]
    assert update.merge(*lines[:3]) == (lines[3], 0)


def test_merge_agrees_with_git_on_random_edits(tmp_path):
    import random

    dice = random.Random(0)
    for _ in range(30):
        base = [f"line {i}\n" for i in range(30)]
        sides = []
        for low in (0, 16):  # edits far apart, on which every merge agrees
            side = base[:]
            for _ in range(2):
                i = dice.randrange(low, low + 12)
                side[i : i + dice.randrange(2)] = [f"new {dice.random()}\n"] * dice.randrange(3)
            sides.append(side)
        for name, lines in zip(("base", "mine", "theirs"), (base, *sides), strict=True):
            (tmp_path / name).write_text("".join(lines))
        command = ["git", "merge-file", "-p", "mine", "base", "theirs"]
        wanted = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        if wanted.returncode == 0:
            assert update.merge("".join(base), *map("".join, sides)) == (wanted.stdout, 0)


# ---------------------------------------------------------------- completion, help, schema


WORDS = {
    ("va",): ["validate"],
    ("run", "recipes/lo"): ["recipes/lora_sft.py"],
    ("run", "recipes/lora_sft.py", "--config", "configs/demo_lora"): ["configs/demo_lora.yaml"],
    ("run", "lora_sft", "optim.l"): ["optim.lr="],
    ("validate", "lora_sft", "data.sources[0].pa"): ["data.sources[0].path="],
    ("generate", "--ad"): ["--adapter"],
    ("help", "schema", "recipes/pre"): ["recipes/pretrain.py"],
    ("merge", "x"): [],
}


@pytest.mark.parametrize("words", WORDS)
def test_completion(words):
    assert [word for word in completion.complete(list(words)) if word in WORDS[words]] == WORDS[words]


def test_bash_completes(here):
    line = "tune help schema recipes/full"
    script = f"""tune() {{ :; }}
        command() {{ shift; PYTHONPATH={ROOT} /usr/bin/env python -m ftlib "$@"; }}
        eval "$(cat script)"
        COMP_LINE='{line}' COMP_POINT={len(line)} COMP_WORDS=({line}) COMP_CWORD=3
        _tune 2>/dev/null; echo "${{COMPREPLY[@]}}" """
    (here / "script").write_text(completion.SHELLS["bash"])
    import sys

    script = script.replace("/usr/bin/env python", sys.executable)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=here)
    assert done.stdout.strip() == "recipes/full_sft.py", done.stderr


def test_help_config_of_one_key(capsys):
    code, out, _ = tune(capsys, "help", "config", "lora_sft", "data.sources[0].path")
    assert code == 0 and out.startswith("  data.sources[].path ") and not re.search(r"\n  \w", out)
    assert "optim.betas" in tune(capsys, "help", "config", "lora_sft", "optim")[1]
    assert "  optim.lr " in tune(capsys, "help", "config", "lora_sft", "lr")[1]
    code, _, err = tune(capsys, "help", "config", "lora_sft", "optin.lr")
    assert code == 2 and "did you mean 'optim.lr'?" in err


def test_help_of_a_key_says_it_of_every_recipe_that_has_it(capsys):
    name = tune(capsys, "help", "optim.name")[1]
    assert name.startswith("diffusion, ") and name.count("optim.name") == 1 and "'muon'" in name and "= adamw" in name
    assert tune(capsys, "help", "lora.rank")[1].startswith("dpo, grpo, lora_sft, reward:\n  lora.rank ")
    warmup = tune(capsys, "help", "schedule.warmup_steps")[1]
    assert warmup.count("grpo") == 1 and "grpo:\n  schedule.warmup_steps      whole number or number = 0\n" in warmup
    one = tune(capsys, "help", "lora.init", "lora_sft")
    assert one == tune(capsys, "help", "config", "lora_sft", "lora.init") and "olora: start as W's" in one[1]
    code, _, err = tune(capsys, "help", "optim.nme")
    assert code == 2 and "optim.nme: no such key (did you mean 'optim.name'?)" in err


def test_schemas_are_up_to_date_and_shipped_configs_fit_them():
    import jsonschema
    import yaml

    tool = plugins.load_file(ROOT / "tools/make_schemas.py")
    for file, text in tool.texts().items():
        assert file.read_text() == text, f"{file.name} is out of date: python tools/make_schemas.py"
        jsonschema.Draft202012Validator.check_schema(json.loads(text))
    for name, path in assets.shipped("configs").items():
        line = re.search(r"^# yaml-language-server: \$schema=(\S+)$", path.read_text(), re.MULTILINE)
        assert line, f"{name} names no schema"
        schema = json.loads((path.parent / line[1]).read_text())
        jsonschema.validate(yaml.safe_load(path.read_text().replace("e-", ".0e-")), schema)


def test_the_schema_refuses_what_the_config_refuses():
    import jsonschema

    from ftlib.cli.help import schema_of

    check = jsonschema.Draft202012Validator(schema_of("lora_sft"))
    good = {"optim": {"lr": 1e-3}, "data": {"sources": [{"path": "x"}], "eval": 0.1}, "steps": "${data.seq_len}"}
    assert check.is_valid(good)
    assert check.schema["properties"]["optim"]["properties"]["lr"]["default"] == 2e-4  # the recipe's own
    bad = [{"optim": {"lrr": 1}}, {"optim": {"lr": "fast"}}, {"lora": {"rank": 1.5}}, {"dtype": "fp64"},
           {"data": {"eval": [3]}},           {"optim": {"betas": [0.9]}}, {"data": {"pack": 1}}]  # fmt: skip
    assert not [value for value in bad if check.is_valid(value)]


def test_a_copied_config_finds_its_schema(here):
    assert cli.main(["cp", "demo_lora", "deep/my.yaml"]) == 0
    line = re.search(r"\$schema=file://(\S+)", Path("deep/my.yaml").read_text())
    assert Path(line[1]).is_file()
    assert cli.main(["diff", "deep/my.yaml"]) == 0


def test_user_errors_only(capsys):
    with pytest.raises(UserError):
        update.main(["no-such-file"])
