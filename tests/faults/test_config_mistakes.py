"""Wrong configs: one message that says what, where and what to write instead; all problems at once."""

import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ftlib import cli, config
from ftlib.errors import Problems
from ftlib.sections import Batch, Checkpoint, Data, Log, Lora, Memory, Model, Optim, Parallel, Schedule, Tokenizer

GOOD = "model: {path: org/name}\ndata: {sources: [{path: org/rows}]}\nsteps: 3\n"


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Model
    data: Data
    steps: int
    epochs: float | None = None
    tokenizer: Tokenizer = Tokenizer()
    batch: Batch = Batch()
    lora: Lora = Lora()
    optim: Optim = Optim(lr=2e-4)
    schedule: Schedule = Schedule()
    memory: Memory = Memory()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    def __post_init__(self):
        if self.steps < self.schedule.warmup_steps - 100:
            raise ValueError("steps: fewer than the warm-up needs")


def problems(tmp_path, text, *overrides, base=GOOD):
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(Problems) as caught:
        config.load(Config, ["--config", f"{tmp_path}/base.yaml", "--config", f"{tmp_path}/c.yaml", *overrides])
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


# A file laid over the good one, and every piece of text that the one message must contain.
FILES = {
    "unknown key": ("optim:\n  lrr: 1", "c.yaml:2: optim.lrr: no such key (did you mean 'optim.lr'?)"),
    "right key, wrong section": ("lr: 1", "c.yaml:1: lr: no such key (did you mean 'optim.lr'?)"),
    "another library's key": ("per_device_train_batch_size: 1", "c.yaml:1: ", "'batch.micro_rows'"),
    "another library's share": ("schedule: {warmup_ratio: 0.1}", "'schedule.warmup_steps', which may be a share"),
    "another library's value": ("optim: {name: adamw_8bit}", "c.yaml:1: optim.name:", "here that is optim.states=int8"),
    "such a value for a section": ("optim: paged_adamw_8bit", "a section", "(here that is optim.states=int8)"),
    "every layer": ("lora: {targets: all}", "c.yaml:1: lora.targets: 'all' is no layer", "all-linear"),
    "what is not here": ("parallel: {pp: 2}", "c.yaml:1: parallel.pp: no such key: there are no pipeline stages here"),
    "misspelt section": ("optimm: {lr: 1}", "c.yaml:1: optimm: no such key (did you mean 'optim'?)"),
    "nothing like it": ("lora: {zzz: 1}", "c.yaml:1: lora.zzz: no such key", "rank, alpha, dropout, targets"),
    "dotted key in a file": ("lora.rank: 3", "c.yaml:1: lora.rank: dots are for the command line", "`lora:`"),
    "text for a number": ("optim: {lr: fast}", "c.yaml:1: optim.lr: expected number, got text 'fast'"),
    "number for a text": ("data: {template: 5}", "c.yaml:1: data.template: expected text", "number 5", "write '5'"),
    "bool for a number": ("lora: {rank: true}", "c.yaml:1: lora.rank: expected whole number, got true"),
    "fraction for a count": ("lora: {rank: 1e1}", "c.yaml:1: lora.rank: expected whole number", "(write 10)"),
    "yes for a bool": ("data: {pack: yes}", "c.yaml:1: data.pack: expected true or false", "(write true)"),
    "nan": ("optim: {lr: .nan}", "c.yaml:1: optim.lr: expected number, got number nan"),
    "scalar for a section": ("optim: 3", "c.yaml:1: optim: expected a section with keys, got whole number 3"),
    "list for a section": ("optim: [lr]", "c.yaml:1: optim: expected a section with keys, got a list of 1"),
    "scalar for a list": ("log: {to: console}", "c.yaml:1: log.to: expected list of text", "(write [console])"),
    "too few items": ("optim: {betas: [0.9]}", "c.yaml:1: optim.betas: expected list of 2", "got a list of 1"),
    "null for a number": ("optim: {lr: null}", "c.yaml:1: optim.lr: expected number, got null"),
    "not among the choices": (
        "model: {attention: sdap}", "c.yaml:1: model.attention: expected one of 'auto'", "(did you mean 'sdpa'?)",
    ),
    "none of the alternatives": ("memory: {compile: atuo}", "c.yaml:1: memory.compile:", "(did you mean 'auto'?)"),
    "wrong inside an alternative": (
        "data: {eval: [{path: a/b, pth: x}]}", "data.eval[0].pth: no such key", "data.eval[].path",
    ),
    "a section's own check": ("optim: {lr: -1}", "c.yaml:1: optim.lr: must be above 0"),
    "a check of two keys": ("batch: {rows: 0}", "batch.rows and micro_rows: must be at least 1"),
    "a check over sections": ("schedule: {warmup_steps: 999}", "base.yaml:3: steps: fewer than the warm-up needs"),
    "duplicate key": ("steps: 4\nsteps: 4", "c.yaml:2: the key 'steps' is set twice, first in line 1; keep one"),
    "resolver": ("model: {code: '${oc.env:HF_TOKEN}'}", "c.yaml:1: model.code: ${…} can only refer to another key"),
    "hidden resolver": ("model: {code: '${${steps}:HOME}'}", "model.code: ${…} can only refer to another key"),
    "unquoted reference": ("optim: {lr: ${epochs}}", "c.yaml:1: not valid YAML", "a reference needs quotes"),
    "reference to nothing": ("epochs: ${optim.lr}", "c.yaml:1: epochs: Interpolation key 'optim.lr' not found"),
    "reference to itself": ("epochs: ${epochs}", "c.yaml:1: epochs: Recursive interpolation"),
    "section in itself": ("optim: {lr: '${optim}'}", "c.yaml:1: optim.lr: "),
    "still missing": ("model:\n  code: ???", "c.yaml:2: model.code: has to be set"),
    "tag": ("model: !!python/object:os.system {}", "c.yaml:1: the tag '!!python/object:os.system' is not allowed"),
    "tab": ("optim:\n\tlr: 1", "c.yaml:2: not valid YAML: indent with spaces, not with tabs"),
    "unclosed bracket": ("log: {to: [a\n", "c.yaml:", "not valid YAML"),
    "bad indentation": ("optim:\n    lr: 1\n  eps: 1", "c.yaml:3: not valid YAML", "eps"),
    "two documents": ("steps: 3\n---\nsteps: 3", "c.yaml:2: not valid YAML", "document"),
    "control character": ("steps: \x07", "c.yaml:1: not valid YAML"),
    "list as key": ("? [a, b]\n: 1", "c.yaml:1: a key must be a single word"),
    "alias of itself": ("optim: &a {lr: *a}", "c.yaml:", "contains itself"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_wrong_file(tmp_path, name):
    text, *expected = FILES[name]
    found = problems(tmp_path, text)
    assert len(found) == 1, found
    for words in expected:
        assert words in found[0]


COMMANDS = {
    "wrong type": (["optim.lr=x"], "command line: optim.lr=x: optim.lr: expected number, got text 'x'"),
    "unknown": (["lora.rnk=3"], "command line: lora.rnk=3: lora.rnk: no such key (did you mean 'lora.rank'?)"),
    "no value": (["optim.lr"], "command line: expected key=value, got 'optim.lr'"),
    "a file without --config": (["b.yaml"], "command line: expected key=value", "--config b.yaml"),
    "an option": (["--optim.lr=3"], "command line: unknown option '--optim.lr=3'; keys are set as optim.lr=3"),
    "an option without its section": (["--lr=3"], "unknown option '--lr=3'; keys are set as optim.lr=3"),
    "an option of others": (["--learning-rate=3"], "option '--learning-rate=3'; keys are set as optim.lr=3"),
    "a name that stands alone": (["--x"], "unknown option '--x'; keys are set as x=VALUE"),
    "no file": (["--config"], "command line: --config needs a file"),
    "no key": (["=3"], "command line: =3: a key is words joined by dots"),
    "delete with a value": (["~steps=3"], "command line: ~steps=3: ~key takes no value"),
    "delete nothing": (["~optim.lrr"], "command line: ~optim.lrr: optim.lrr: no such key (did you mean 'optim.lr'?)"),
    "beyond the list": (["data.sources[3].path=x"], "the list has 1 items, so there is no [3]"),
    "below a scalar": (["steps.x=1"], "command line: steps.x=1: steps: expected whole number, got a section with 'x'"),
    "broken quotes": (["model.code='x"], "command line: model.code='x: not valid YAML"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_command_line(tmp_path, name):
    argv, *expected = COMMANDS[name]
    found = problems(tmp_path, "", *argv)
    assert len(found) == 1, found
    for words in expected:
        assert words in found[0]


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path):
    text = "steps: many\noptim: {lr: -1, max_grad_norm: -1, eps: x}\nlora: {rank: 0, dropout: 2}\nlr: 1\nlr: 2\n"
    found = problems(tmp_path, text, "batch.rows=no", "zzz=1", base="")
    assert [": ".join(problem.split(": ")[:2]) for problem in found if problem.startswith("c.yaml:")] == [
        "c.yaml:1: steps", "c.yaml:2: optim.eps", "c.yaml:2: optim.lr", "c.yaml:2: optim.max_grad_norm",
        "c.yaml:3: lora.rank", "c.yaml:3: lora.dropout",
        "c.yaml:5: the key 'lr' is set twice, first in line 4; keep one", "c.yaml:5: lr",
    ]  # fmt: skip
    files = "base.yaml, c.yaml"
    assert f"{files}: model.path: required, but not set (path or Hub id)" in found
    assert f"{files}: data.sources: required, but not set (list of Source sections)" in found
    assert any("batch.rows=no" in problem for problem in found)
    assert any("zzz=1" in problem for problem in found)


def test_unreadable_files_are_named_together(tmp_path):
    (tmp_path / "demo.yaml").write_text("steps: 1")
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9")
    (tmp_path / "list.yaml").write_text("- a")
    names = ["deom.yaml", "latin.yaml", "list.yaml", "missing/x.yaml", ""]
    argv = [word for name in names for word in ("--config", str(tmp_path / name))]
    with pytest.raises(Problems) as caught:
        config.load(Config, argv)
    found = caught.value.problems
    assert len(found) == 5
    for words in ("demo.yaml", "is not UTF-8 text", "`key: value`", "there is no folder", "is a folder"):
        assert any(words in problem for problem in found), words


def test_alias_bomb_ends_quickly(tmp_path):
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    assert "more than 100,000 values" in problems(tmp_path, text)[0]


def test_mangled_files_and_overrides_end_in_problems_and_in_nothing_else(tmp_path):
    rng = random.Random(0)
    texts, overrides = [text for text, *_ in FILES.values()], [argv[0] for argv, *_ in COMMANDS.values()]

    def mangle(text):
        for _ in range(rng.randint(0, 4)):
            at = rng.randrange(len(text) + 1)
            new = rng.choice("{}[]:,-&*!|>'\"%@`#?\n \t~$=.a01\\é\u2028") * rng.randint(0, 1)
            text = text[:at] + new + text[at + 1 :]
        return text

    (tmp_path / "base.yaml").write_text(GOOD)
    for _ in range(300):
        (tmp_path / "c.yaml").write_text(mangle(rng.choice(texts)), encoding="utf-8")
        argv = [mangle(rng.choice(overrides)) for _ in range(rng.randint(0, 1))]
        try:
            files = [f"--config={tmp_path}/base.yaml", f"--config={tmp_path}/c.yaml"]
            config.dump(config.load(Config, [*files, *argv]))
        except Problems as error:
            assert all(": " in problem for problem in error.problems)


def test_secrets_are_not_echoed(tmp_path):
    found = problems(tmp_path, "", "hub.api_key=verysecretvalue", "optim.lr=hf_abcdefghijklmnop")
    assert not any("verysecretvalue" in problem or "hf_abcdef" in problem for problem in found)


def test_a_recipe_prints_one_message_and_ends_with_2(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from dataclasses import dataclass\nfrom ftlib.launch import launch\nfrom ftlib.sections import Optim\n"
        "@dataclass(frozen=True)\nclass Config:\n    optim: Optim = Optim()\n    steps: int = 1\n"
        "def main(cfg):\n    print('ran')\n"
        "if __name__ == '__main__':\n    launch(Config, main)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, recipe, "lr=1", "step=2"], capture_output=True, text=True, env={"PYTHONPATH": str(root)}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: 2 problems\n  command line: lr=1: lr: no such key (did you mean 'optim.lr'?)\n"
        "  command line: step=2: step: no such key (did you mean 'steps'?)\n"
    )


def refused(capsys, *words):
    assert cli.main(["validate", *words]) == 2
    return capsys.readouterr().err


def test_a_config_of_another_recipe_is_told_whose_it_is(tmp_path, capsys):
    said = refused(capsys, "recipes/lora_sft.py", "--config", "demo_grpo")
    assert "rewards: no such key" in said
    assert said.count("fix: take a recipe that has all of these keys, recipes/grpo.py, or leave out") == 1
    said = refused(capsys, "recipes/grpo.py", "--config", "demo_lora")
    assert "all of these keys, recipes/lora_sft.py, or" in said, "of several the one whose schema it names"
    said = refused(capsys, "recipes/dpo.py", "--config", "demo_lora", "dpo.lss=ipo")
    assert "dpo.lss: no such key (did you mean 'dpo.loss'?)" in said and "take a recipe" not in said
    said = refused(capsys, "recipes/pretrain.py", "stream.buffer=8", "neftune=5", "lisa.layers=2", "nonsense=1")
    have = "neftune (recipes/full_sft.py, recipes/lora_sft.py); lisa (recipes/full_sft.py)\n"
    assert f"fix: leave out what is none here, or take a recipe that has it: {have}" in said


@pytest.mark.parametrize("form", ["file", "shell"])
def test_several_losses_in_a_list_are_told_how_they_are_written(form, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("dpo: {loss: [sigmoid, sft]}\n" if form == "file" else "seed: 0\n")
    words = [] if form == "file" else ["dpo.loss=[sigmoid, sft]"]
    said = refused(capsys, "recipes/dpo.py", "--config", str(tmp_path / "c.yaml"), *words)
    assert "(write {sigmoid: 1, sft: 1})" in said


def test_resume_given_as_an_option_is_told_its_key(capsys):
    said = refused(capsys, "recipes/lora_sft.py", "--config", "demo_lora", "--resume=never")
    assert said.endswith("unknown option '--resume=never'; keys are set as checkpoint.resume=never\n")
