"""Functions found by the names a config gives them."""

import sys
from importlib.metadata import EntryPoint

import pytest

from ftlib import plugins
from ftlib.errors import UserError

BUILTIN = {"exact": len, "length": abs}


def test_builtin_and_entry_points(monkeypatch):
    assert plugins.find("rewards", "exact", BUILTIN) is len
    named = {"theirs": "json:dumps", "gone": "no_such_pkg:f"}
    entries = [EntryPoint(name, value, "ftlib.rewards") for name, value in named.items()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == "ftlib.rewards" else [])
    import json

    assert plugins.find("rewards", "theirs", BUILTIN) is json.dumps
    with pytest.raises(UserError, match=r"'gone' \(no_such_pkg:f\) cannot be imported"):
        plugins.find("rewards", "gone", BUILTIN)
    with pytest.raises(UserError, match=r"did you mean 'exact'\?") as caught:
        plugins.find("rewards", "exat", BUILTIN)
    assert "theirs" in caught.value.fix


def test_files(tmp_path, monkeypatch):
    (tmp_path / "helper.py").write_text("VALUE = 3\n")
    (tmp_path / "mine.py").write_text("import helper\ndef score(x, *, weight=1.0):\n    return helper.VALUE\n")
    monkeypatch.chdir(tmp_path)
    fn = plugins.find("rewards", "./mine.py:score", BUILTIN)
    assert fn("x") == 3
    assert plugins.find("rewards", f"{tmp_path}/mine.py:score", BUILTIN) is fn
    assert str(tmp_path) not in sys.path
    with pytest.raises(UserError, match=r"defines no 'scor' \(did you mean 'score'\?\)"):
        plugins.find("rewards", "mine.py:scor", BUILTIN)
    with pytest.raises(UserError, match=r"no such file: other\.py"):
        plugins.find("rewards", "other.py:score", BUILTIN)


@pytest.mark.parametrize(
    ("text", "place"), [("x = 1\nx.y\n", "bad.py:2: AttributeError"), ("\ndef (\n", "bad.py:2: SyntaxError")]
)
def test_files_that_fail_name_their_line(tmp_path, text, place):
    (tmp_path / "bad.py").write_text(text)
    for _ in range(2):  # a failed import leaves nothing behind
        with pytest.raises(UserError, match=place):
            plugins.load_file(tmp_path / "bad.py")


def test_a_file_and_what_it_imports_from_its_folder(tmp_path, monkeypatch):
    texts = {
        "m/main7.py": "import near7\nimport ftlib.errors\nfrom .beside7 import f\nfrom pack7 import inner7\n",
        "m/near7.py": "import os\nfrom pack7.deep7 import g\n", "m/beside7.py": "import main7_not\nf = len\n",
        "m/main7_not.py": f"def late():\n    from {'.' * 99} import f\n",
        "m/pack7/__init__.py": "", "m/pack7/inner7.py": "from . import deep7\n",
        "m/pack7/deep7.py": "g = 1\n", "m/unused7.py": "", "m/ftlib/__init__.py": "",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    ref = f"{tmp_path}/m/main7.py:f"
    assert plugins.find("rewards", ref, BUILTIN) is len
    found = plugins.files(ref, len)
    names = ["beside7.py", "main7_not.py", "near7.py", "pack7/__init__.py", "pack7/deep7.py", "pack7/inner7.py"]
    assert list(found) == ["main7.py", *names]
    before = plugins.digest(found)
    assert plugins.digest({"other.py": found["main7.py"]} | {name: found[name] for name in names}) == before
    (tmp_path / "m" / "unused7.py").write_text("x = 1")
    assert plugins.digest(plugins.files(ref, len)) == before
    (tmp_path / "m" / "pack7" / "deep7.py").write_text("g = 2\n")
    assert plugins.digest(plugins.files(ref, len)) != before
    # As a module of a package: absolute names start from where the package is found, what lies outside is left out.
    (tmp_path / "m" / "pack7" / "ours7.py").write_text(
        "import near7\nimport pack7.deep7\nfrom .inner7 import deep7\ndef h():\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "m")
    found = plugins.files("pack7.ours7:h", plugins.find("rewards", "pack7.ours7:h", BUILTIN))
    assert list(found) == ["ours7.py", "__init__.py", "deep7.py", "inner7.py"]


def test_modules(tmp_path, monkeypatch):
    (tmp_path / "user_pkg").mkdir()
    (tmp_path / "user_pkg/__init__.py").write_text("")
    (tmp_path / "user_pkg/rewards.py").write_text("def f(x):\n    return x\nlimit = 3\n")
    (tmp_path / "user_pkg/needs.py").write_text("import no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.find("rewards", "user_pkg.rewards:f", BUILTIN)(4) == 4
    for ref, words in {
        "user_pkg.reward:f": "no module 'user_pkg.reward'",
        "user_pkgs.rewards:f": "no module 'user_pkgs'",
        "user_pkg.rewards:limit": "is no function but int",
        "user_pkg.needs:f": "No module named 'no_such_thing'",
        "user pkg:f": "names no function",
    }.items():
        with pytest.raises(UserError, match=words):
            plugins.find("rewards", ref, BUILTIN)


@pytest.mark.parametrize("ref", ["os:system", "subprocess:run", "builtins:eval", "os.system", "evil_module.f"])
def test_a_shared_config_runs_nothing(ref, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError):
        plugins.find("rewards", ref, BUILTIN)
    assert "evil_module" not in sys.modules


def test_check_call():
    def exact(completions, answers, *, weight=1.0):
        return 0

    plugins.check_call(exact, ["completions", "answers"], {"weight": 2.0})
    plugins.check_call(len, ["x"], {})
    signature = r"exact\(completions, answers, \*, weight=1.0\): .*did you mean 'weight'\?"
    with pytest.raises(UserError, match=signature) as caught:
        plugins.check_call(exact, ["completions", "answers"], {"wieght": 2.0}, where="rewards[0].args")
    assert caught.value.where == "rewards[0].args"
    with pytest.raises(UserError, match="missing a required argument: 'answers'"):
        plugins.check_call(exact, ["completions"], {})
