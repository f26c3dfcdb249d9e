"""The command line: verbs, mistakes, exit codes, and recipes run here and in several processes."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib import __version__, cli
from ftlib.cli import assets
from ftlib.launch import script

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

TOY = '''"""A toy recipe."""

import os
import sys
import time
from dataclasses import dataclass

from ftlib.errors import Hung, Stopped, UserError
from ftlib.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config:
    end: str = "well"  # how it ends
    rank: int = -1  # where; -1: everywhere


def main(cfg):
    try:  # from before the first word: whoever has read it may send a signal
        run(cfg)
    except KeyboardInterrupt:
        if cfg.end != "wait":
            raise
        raise Stopped("saved at step 7") from None


def run(cfg):
    rank = int(os.environ.get("RANK", 0))
    line = f"rank {rank} {__name__} {os.getcwd() in sys.path}\\n"
    print(line, end="", flush=True)  # in one piece: unbuffered, an end of its own may come behind another worker's line
    if cfg.rank not in (-1, rank):
        time.sleep(60)
    if cfg.end == "user":
        raise UserError("no such data", where="data.jsonl:3", fix="mend it")
    if cfg.end == "stop":
        raise Stopped("saved at step 3")
    if cfg.end == "hung":
        raise Hung("no progress for 60 s")
    if cfg.end == "bug":
        raise RuntimeError("boom")
    if cfg.end == "wait":
        time.sleep(60)


if __name__ == "__main__":
    launch(Config, main)
'''


def tune(*argv, cwd):
    command = [sys.executable, "-m", "ftlib", *map(str, argv)]
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=120)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a toy recipe."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- speed


@pytest.mark.parametrize("argv", [["--help"], ["ls"]])
def test_answers_within_a_third_of_a_second(tmp_path, argv):
    def processor_time():  # not the clock's: other tests run beside this one
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(3):
        start = processor_time()
        assert tune(*argv, cwd=tmp_path).returncode == 0
        times.append(processor_time() - start)
    assert min(times) < 0.3, times


def test_config_and_cli_import_no_torch():
    code = (
        "import sys, ftlib.cli.run, ftlib.cli.recipe, ftlib.cli.generate, ftlib.cli.merge, ftlib.sections\n"
        "assert not {'torch', 'omegaconf', 'transformers', 'numpy'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=ENV).returncode == 0


def test_reading_a_recipe_imports_no_compiler():
    """A third of what starting takes: whoever compiles imports it."""
    code = (
        "import sys; from pathlib import Path; from ftlib import plugins\n"
        "for file in Path('recipes').glob('*.py'): plugins.load_file(file.resolve())\n"
        "assert not {'torch._dynamo', 'torch._inductor', 'triton', 'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---------------------------------------------------------------- help, ls, mistakes


def test_overview_names_every_verb(capsys):
    assert cli.main([]) == cli.main(["--help"]) == cli.main(["help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ftlib {__version__}\n"


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "help"])
def test_every_verb_has_help(verb, capsys):
    try:
        assert cli.main(["help", verb]) == 0
    except SystemExit as end:  # argparse ends like this
        assert end.code == 0
    assert f"tune {verb}" in capsys.readouterr().out


def test_ls_shows_what_each_is(capsys):
    assert cli.main(["ls"]) == 0
    out = capsys.readouterr().out
    for kind in ("recipes", "configs"):
        for name, path in assets.shipped(kind).items():
            assert f"{name} " in out
            assert assets.first_line(path)[:40] in out


def test_help_config_lists_keys(capsys, here):
    assert cli.main(["help", "config"]) == 0
    out = capsys.readouterr().out
    assert "  optim.lr " in out
    assert "peak learning rate" in out
    assert "  data.sources[].path " in out
    assert "\nsource: " not in out
    assert cli.main(["help", "config", "toy.py"]) == 0
    assert "  end                        text = well\n      how it ends\n" in capsys.readouterr().out


MISTAKES = {
    "wrong verb": (["rnu"], "unknown verb 'rnu' (did you mean 'run'?)"),
    "wrong option": (["ls", "--al"], "tune ls: unknown option '--al'"),
    "wrong top option": (["--hlep"], "unknown option '--hlep'"),
    "misspelt option": (["generate", "m", "--prompt", "x", "--temprature", "1"], "did you mean '--temperature'?"),
    "missing option": (["generate", "m"], "tune generate: one of the arguments --prompt --prompts is required"),
    "not a number": (["generate", "m", "--prompt", "x", "--seed", "y"], "--seed: invalid int value: 'y'"),
    "no recipe": (["run"], "the recipe comes before --config"),
    "config first": (["run", "--config", "x.yaml", "toy.py"], "the recipe comes before --config"),
    "torchrun option last": (["run", "toy.py", "--nproc-per-node", "2"], "--nproc-per-node comes before the recipe"),
    "missing recipe": (["run", "tooy.py"], "tooy.py: no such recipe (did you mean 'toy.py'?)"),
    "missing shipped recipe": (["run", "recipes/lora_stf.py"], "(did you mean 'recipes/lora_sft.py'?)"),
    "folder for a recipe": (["run", "."], ".: is a folder, not a recipe", "plain.py"),
    "missing config": (["run", "toy.py", "--config", "c.yaml"], "c.yaml: no such config"),
    "folder for a config": (["run", "toy.py", "--config", "."], ".: is a folder, not a config"),
    "no Config": (["run", "plain.py"], "plain.py: is no recipe, it defines no Config and no main"),
    "never runs": (["run", "inert.py"], "inert.py: does nothing when it is run"),
    "broken recipe": (["run", "broken.py"], "broken.py:2: not valid Python"),
    "fails on import": (["validate", "fails.py"], "fails.py:1: ZeroDivisionError"),
    "Config is no dataclass": (["validate", "odd.py"], "Config must be a dataclass"),
    "wrong config": (["run", "toy.py", "ende=x"], "command line: ende=x: ende: no such key (did you mean 'end'?)"),
    "wrong config, validated": (["validate", "toy.py", "rank=x"], "rank: expected whole number, got text 'x'"),
    "world": (["validate", "toy.py", "--world", "x"], "--world needs a number of processes, got 'x'"),
    "unknown name to copy": (["cp", "lora_stf", "x.py"], "(did you mean 'recipes/lora_sft.py'?)"),
    "copy over a file": (["cp", "lora_sft", "toy.py"], "toy.py exists and stays as it is", "--force"),
    "diff of nothing": (["diff", "none.py"], "none.py cannot be read: No such file"),
    "diff of a stranger": (["diff", "toy.py"], "the first line does not say what it was copied from"),
    "help on nothing": (["help", "confg"], "unknown topic 'confg' (did you mean 'config'?)"),
    "merge over a folder": (["merge", "a", "b", "."], ". exists and stays as it is"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_one_message_and_2(name, here, capsys):
    (here / "plain.py").write_text("print('x')\n")
    (here / "inert.py").write_text(TOY.partition("\nif __name__")[0])
    (here / "broken.py").write_text("x = 1\ndef f(:\n")
    (here / "fails.py").write_text(f"1 / 0\n{TOY}")
    (here / "odd.py").write_text(f"{TOY}\nConfig = 3\n")
    argv, *expected = MISTAKES[name]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for words in expected:
        assert words in err


def test_recipes_of_an_installed_package_have_short_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / ".venv" / "ftlib"
    monkeypatch.setattr("ftlib.launch.__file__", str(package / "launch.py"))
    assert script(str(package / "recipes" / "lora_sft.py")) == "recipes/lora_sft.py"
    assert script(str(tmp_path / "mine" / "my.py")) == "mine/my.py"


def test_a_closed_pipe_is_no_error(tmp_path):
    done = subprocess.run(f"{sys.executable} -m ftlib help config | head -1", shell=True, cwd=tmp_path, env=ENV,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stderr == ""


# ---------------------------------------------------------------- cp, diff


def test_cp_and_diff_round_trip(here, capsys):
    assert cli.main(["cp", "recipes/lora_sft.py", "my.py"]) == 0
    header, _, body = Path("my.py").read_text().partition("\n")
    source = ROOT / "recipes/lora_sft.py"
    assert body == source.read_text()
    assert header == f"# from ftlib {__version__} recipes/lora_sft.py sha256:{assets.digest(body)}"
    capsys.readouterr()
    assert cli.main(["diff", "my.py"]) == 0
    assert "has not changed" in (out := capsys.readouterr().out)
    assert "(no difference)" in out
    Path("my.py").write_text(Path("my.py").read_text() + "# mine\n")
    assert cli.main(["diff", "my.py"]) == 0
    assert "\n+# mine\n" in capsys.readouterr().out


def test_diff_says_when_the_shipped_file_has_changed(here, capsys, monkeypatch):
    ships = here / "ships"
    ships.mkdir()
    (ships / "r.py").write_text("a = 1\nb = 2\n")
    monkeypatch.setattr(assets, "shipped", lambda kind: {"recipes/r.py": ships / "r.py"} if kind == "recipes" else {})
    assert cli.main(["cp", "r", "new/"]) == 0
    (ships / "r.py").write_text("a = 1\nb = 3\n")
    capsys.readouterr()
    assert cli.main(["diff", "new/r.py"]) == 0
    out = capsys.readouterr().out
    assert "recipes/r.py has changed since it was copied" in out
    assert "-b = 3\n+b = 2" in out


def test_cp_into_folders_and_by_force(here):
    assert cli.main(["cp", "demo_lora", "."]) == 0
    assert cli.main(["cp", "configs/demo_lora.yaml", "deep/er/"]) == 0
    assert Path("demo_lora.yaml").read_text() == Path("deep/er/demo_lora.yaml").read_text()
    assert cli.main(["cp", "lora_sft.py", "toy.py", "--force"]) == 0
    assert Path("toy.py").read_text().startswith("# from ftlib ")
    assert assets.first_line(Path("demo_lora.yaml")) == assets.first_line(ROOT / "configs/demo_lora.yaml")


def test_names_of_shipped_files(here):
    expected = ROOT / "recipes/lora_sft.py"
    for name in ("recipes/lora_sft.py", "lora_sft.py", "lora_sft", "recipes/lora_sft"):
        assert assets.resolve_recipe(name) == expected
    assert assets.resolve_config("demo_lora") == ROOT / "configs/demo_lora.yaml"
    Path("lora_sft.py").write_text("mine")
    assert assets.resolve_recipe("lora_sft.py") == Path("lora_sft.py")


def test_every_shipped_config_is_a_config_of_some_recipe():
    from ftlib.config.tree import Source, parse

    for path in assets.shipped("configs").values():
        text = path.read_text()
        assert isinstance(parse(text, Source(path.name, path.parent)).value, dict)
        assert assets.first_line(path)
        assert len(text.splitlines()) <= 40


# ---------------------------------------------------------------- run


def test_validate(here, capsys):
    assert cli.main(["validate", "toy.py", "rank=3", "--world", "4"]) == 0
    assert capsys.readouterr().out == "ok: toy.py rank=3\n"


def test_validate_calls_a_recipe_s_own_check(here, capsys):
    check = "def check(cfg, world):\n    if world > 2:\n        raise UserError('too many')\n\n\nif __name__"
    Path("toy.py").write_text(TOY.replace("if __name__", check))
    assert cli.main(["validate", "toy.py", "--world=2"]) == 0
    assert cli.main(["validate", "--nproc-per-node", "2", "toy.py", "rank=3"]) == 0
    assert capsys.readouterr().out.endswith("ok: toy.py rank=3\n")
    for words in (["toy.py", "--world=3"], ["--nnodes", "2:4", "--nproc_per_node=2", "toy.py"]):
        assert cli.main(["validate", *words]) == 2
        assert "too many" in capsys.readouterr().err


def test_run_here_uses_this_process(here, capsys):
    before = sys.argv, list(sys.path)
    assert cli.main(["run", "toy.py"]) == 0
    assert capsys.readouterr().out == "rank 0 __main__ True\n"
    assert before == (sys.argv, sys.path)
    with pytest.raises(RuntimeError, match="boom"):
        cli.main(["run", "toy.py", "end=bug"])


def test_recipe_help(here, capsys):
    assert cli.main(["run", "toy.py", "--help"]) == 0
    assert "end: text [well]\n    how it ends\n" in capsys.readouterr().out


ENDS = {
    "well": (0, ""),
    "user": (2, "error: no such data\n  where: data.jsonl:3\n  fix: mend it\n"),
    "stop": (75, "saved at step 3\n"),
    "hung": (76, "no progress for 60 s\n"),
}


@pytest.mark.parametrize("end", ENDS)
def test_exit_codes_in_one_process(here, end):
    for command in (["-m", "ftlib", "run", "toy.py"], ["toy.py"]):
        command = [sys.executable, *command, f"end={end}"]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, cwd=here)
        assert (done.returncode, done.stderr) == ENDS[end]
        assert done.stdout.startswith("rank 0 __main__")


@pytest.mark.parametrize("end", ["well", "user", "stop"])
def test_exit_codes_of_two_processes(here, end):
    done = tune("run", "--nproc-per-node", 2, "toy.py", f"end={end}", cwd=here)
    assert (done.returncode, done.stderr) == ENDS[end]
    assert "__main__ True\n" in done.stdout  # when one rank has failed, the other may not have come so far


def test_a_mistake_that_one_rank_alone_meets_is_still_told(here):
    done = tune("run", "--nproc-per-node=2", "toy.py", "end=user", "rank=1", cwd=here)
    assert (done.returncode, done.stderr) == ENDS["user"]


def test_a_wrong_config_ends_before_anything_is_spawned(here):
    done = tune("run", "--nproc-per-node", 2, "toy.py", "ende=x", cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: command line: ende=x: ende: no such key (did you mean 'end'?)\n"


@pytest.mark.parametrize("number", ["0", "x"])
def test_a_wrong_number_of_processes(here, number, capsys):
    assert cli.main(["run", "--nproc-per-node", number, "toy.py"]) == 2
    assert f"--nproc-per-node {number}: " in capsys.readouterr().err


def test_a_signal_reaches_the_workers_and_their_code_comes_back(here):
    command = [sys.executable, "-m", "ftlib", "run", "--nproc-per-node", "2", "toy.py", "end=wait"]
    run = subprocess.Popen(command, cwd=here, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert [run.stdout.readline()[:4] for _ in range(2)] == ["rank", "rank"]
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (75, "saved at step 7\n")


def test_generate_refuses_a_second_prompt(capsys):
    """It would have answered the last one alone."""
    assert cli.main(["generate", "ftlib:demo/model", "--prompt", "a", "--prompt", "b"]) == 2
    assert "2 prompts" in capsys.readouterr().err
