"""`.ci/run` runs README's own command in a new environment, then budgets and linter; here all of them are stand-ins."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "run"
README = """# x

<!-- ci:test -->
```bash
mkdir -p .venv/bin && cp python ruff .venv/bin/ && echo tested in .venv && cat
```

```bash
echo not this
```
"""


def run(root: Path, readme: str, python: str = "echo budgets $*", ruff: str = "echo ruff $*") -> tuple[int, str, str]:
    (root / ".ci").mkdir()
    shutil.copy(SCRIPT, root / ".ci" / "run")
    (root / "README.md").write_text(readme)
    for name, body in (("python", python), ("ruff", ruff)):
        (root / name).write_text(f"#!/bin/sh\n{body}\n")
        (root / name).chmod(0o755)
    done = subprocess.run(
        [str(root / ".ci" / "run")],
        cwd="/",
        text=True,
        capture_output=True,
        input="typed\n",
        env={**os.environ},
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_all_three_run_outside_the_checkout(tmp_path):
    code, said, problems = run(tmp_path, README)
    lines = said.splitlines()
    assert code == 0 and not problems
    venv = lines[1].removeprefix("tested in ")
    assert venv.startswith("/") and not Path(venv).exists() and not (tmp_path / ".venv").exists()
    assert lines[2:] == ["budgets tools/check_budgets.py", "ruff check", "ci: tests, budgets and linter passed"]


@pytest.mark.parametrize(
    ("readme", "problem"),
    [
        (README.replace("<!-- ci:test -->", ""), "no fenced block after <!-- ci:test -->"),
        (README.split("echo tested", maxsplit=1)[0], "no fenced block after <!-- ci:test -->"),
        (README.replace(".venv", "venv"), "does not use .venv"),
    ],
)
def test_a_readme_without_the_command(tmp_path, readme, problem):
    code, said, problems = run(tmp_path, readme)
    assert code == 1 and problem in problems and not said


@pytest.mark.parametrize("broken", ["tests", "python", "ruff"])
def test_any_failure_fails_it(tmp_path, broken):
    readme = README.replace("cat\n", "false\n") if broken == "tests" else README
    code, said, _ = run(tmp_path, readme, **({} if broken == "tests" else {broken: "exit 3"}))
    assert code != 0 and "passed" not in said
