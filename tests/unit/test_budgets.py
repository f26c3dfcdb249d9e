"""The budget script finds each rule broken, and nothing in a small house that keeps them."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "check_budgets.py"
LOOP = "".join(f"    x{number} = {number}\n" for number in range(30))
GOOD = {
    "README.md": "x\n",
    "pyproject.toml": "",
    "recipes/pretrain.py": "import torch\n\n\ndef main() -> None:\n    y = 0\n" + LOOP[: LOOP.index("    x20")],
    "recipes/dpo.py": "import torch\n\n\ndef main() -> None:\n    z = 0\n" + LOOP[: LOOP.index("    x20")],
    "configs/a.yaml": "a: 1\n" * 40,
    "ftlib/__init__.py": "",
    "ftlib/errors.py": "",
    "ftlib/kernels/__init__.py": "",
    "ftlib/layers/__init__.py": "from ftlib.kernels import x\n",
    "ftlib/models/__init__.py": "from ftlib.layers import y\nfrom ftlib.models import decoder\n",
    "ftlib/models/decoder.py": "import numpy as np, torch\na = np.load(f)\nb = torch.load(f, weights_only=True)\n",
    "ftlib/models/families/common.py": "\n" * 100,
    "ftlib/models/families/llama.py": "FAMILY = 1\n",
    "ftlib/cli/__init__.py": "def run():\n    from ftlib import launch\n",
    "ftlib/launch.py": "from ftlib import cli\n",
    "tests/test_x.py": "import transformers\n",
}
LONG = "def f() -> None:\n" + "    pass\n" * 60
# Name: (file, text put there or added to its end, what the script says)
BREACHES = {
    "recipe": ("recipes/grpo.py", "x = 1\n" * 301, "301 lines; a recipe has at most 300"),
    "sft": ("recipes/lora_sft.py", "\n" * 201, "201 lines; an SFT recipe has at most 200"),
    "file": ("ftlib/models/decoder.py", "\n" * 401, "a file has at most 400"),
    "function": ("ftlib/errors.py", LONG, "errors.py:1: f has 61 lines"),
    "function in a class": ("ftlib/errors.py", "class C:\n    def g(self):\n" + "        pass\n" * 60, ":2: g has 61"),
    "family": ("ftlib/models/families/llama.py", "\n" * 60, "a family has at most 60"),
    "config": ("configs/deep/b.yaml", "a: 1\n" * 41, "41 lines; a config has at most 40"),
    "repeated block": (
        "recipes/grpo.py",
        "def f() -> None:\n    y = 0\n" + LOOP.replace("x3 = 3\n", "x3 = 3  # why\n\n"),
        None,
    ),
    "library": ("ftlib/errors.py", "def f():\n    from peft.tuners import lora\n", ":2: imports peft.tuners"),
    "library by name": ("recipes/dpo.py", "import importlib\nm = importlib.import_module('trl')\n", "imports trl"),
    "pickle": ("ftlib/errors.py", "from pickle import load\n\na = load(f)\n", ":3: pickle.load runs code"),
    "weights_only": ("ftlib/errors.py", "a = read('f', weights_only=False)\n", "weights_only=False runs code"),
    "torch.load": (
        "ftlib/errors.py",
        "from torch import load as get\na = get('f')\n",
        "torch.load without weights_only",
    ),
    "yaml": ("ftlib/errors.py", "import yaml\na = yaml.load(f)\n", "yaml.load: use yaml.safe_load"),
    "numpy": (
        "ftlib/errors.py",
        "import numpy as np\na = np.load('f', allow_pickle=True)\n",
        "numpy.load with allow_pickle",
    ),
    "top level": ("notes/x.md", "x", "notes:1: has no place at the top level"),
    "recipe imported": ("ftlib/errors.py", "def f():\n    import recipes.dpo\n", "errors imports recipes"),
    "kernels": ("ftlib/kernels/__init__.py", "from ftlib.models.decoder import a\n", "kernels imports models"),
    "parallel": ("ftlib/parallel/__init__.py", "import ftlib.models\n", "parallel imports models"),
    "models": ("ftlib/models/__init__.py", "def f():\n    from ..parallel import run\n", "models imports parallel"),
    "cli": ("ftlib/data/__init__.py", "from ftlib.cli import x\n", "data imports cli"),
    "circle": ("ftlib/data/__init__.py", "def f():\n    from ftlib.rl import x\n", "data -> rl -> data"),
    "files": ("ftlib/models/decoder.py", "import ftlib.models.keys\n", "decoder -> ftlib.models.keys"),
}


def build(root: Path) -> None:
    for name, text in GOOD.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def run(root: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(SCRIPT), "--root", str(root)], capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout


def test_a_house_that_keeps_the_rules(tmp_path):
    build(tmp_path)
    code, said = run(tmp_path)
    assert (code, said) == (0, f"budgets: {sum(name.endswith('.py') for name in GOOD)} files, no breaches\n")


@pytest.mark.parametrize("name", BREACHES)
def test_breach(tmp_path, name):
    build(tmp_path)
    place, text, want = BREACHES[name]
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + text)
    if name == "repeated block":
        (tmp_path / "recipes" / "pretrain.py").write_text("import math\n\n\ndef main() -> None:\n    y = 1\n" + LOOP)
        want = "25 code lines from here are also in pretrain.py"
    if name == "circle":
        (tmp_path / "ftlib" / "rl").mkdir()
        (tmp_path / "ftlib" / "rl" / "__init__.py").write_text("from ftlib import data\n")
    if name == "files":
        (tmp_path / "ftlib" / "models" / "keys.py").write_text("import ftlib.models.decoder\n")
    code, said = run(tmp_path)
    assert code == 1 and want in said, said
    assert said.endswith("2 breaches\n" if name == "kernels" else "1 breach\n"), said  # there also a circle


def test_in_a_checkout_ignored_files_do_not_count(tmp_path):
    build(tmp_path)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("/output/\n.venv/\n")
    for name in ("output", ".venv"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    assert run(tmp_path)[0] == 0
    (tmp_path / "notes.txt").write_text("x")
    code, said = run(tmp_path)
    assert code == 1 and "notes.txt:1: has no place at the top level" in said
