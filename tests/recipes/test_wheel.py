"""The built wheel in a fresh environment: copy a recipe, edit it, run it from an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import ROOT, write_config


def call(*argv, cwd, env):
    done = subprocess.run([str(word) for word in argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_copy_edit_run_from_an_empty_folder(tiny, tmp_path):
    """Last result: passed, with the wheel alone on the path and the packages it depends on taken from this one."""
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    call(sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "-w", tmp_path / "dist", cwd=tmp_path, env=plain)
    [wheel] = (tmp_path / "dist").glob("ftlib-*.whl")
    call(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path, env=plain)
    scripts = tmp_path / "venv" / "bin"
    call(scripts / "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path, env=plain)
    packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (packages / "borrowed.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")))
    empty = tmp_path / "empty"
    empty.mkdir()
    tune = scripts / "tune"
    assert "recipes/lora_sft.py" in call(tune, "ls", cwd=empty, env=plain)
    call(tune, "cp", "recipes/lora_sft.py", "my.py", cwd=empty, env=plain)
    recipe = empty / "my.py"
    edited = recipe.read_text().replace('    """Train, evaluate', '    print("my own line")\n    """Train, evaluate')
    recipe.write_text(edited)
    write_config(empty / "my.yaml", tiny.model, tiny.rows, steps=2, output_dir="out")
    said = call(tune, "run", "my.py", "--config", "my.yaml", cwd=empty, env=plain)
    assert "my own line" in said and "results in" in said
    assert (empty / "out" / "final" / "adapter_model.safetensors").exists()
    again = call(scripts / "python", "-m", "ftlib", "run", "my.py", "--config", "my.yaml", cwd=empty, env=plain)
    assert "nothing to do" in again
    assert "+    print(" in call(tune, "diff", "my.py", cwd=empty, env=plain)
    where = call(scripts / "python", "-c", "import ftlib; print(ftlib.__file__)", cwd=empty, env=plain)
    assert Path(where.strip()).is_relative_to(packages), "the wheel was used, not this source tree"
