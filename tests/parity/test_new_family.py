"""The drafting tool: a file that loads, and the tensors that its model does not explain."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from parity.shrink import reference, shrunk
from tiny_model import write_config, write_model, write_rows

from ftlib import plugins
from ftlib.cli import main as tune
from ftlib.errors import UserError
from ftlib.models import own
from ftlib.sections import Model

TOOL = Path(__file__).parents[2] / "tools" / "new_family.py"
sys.path.insert(0, str(TOOL.parent))
new_family = importlib.import_module("new_family")


def test_a_draft_and_what_differs(tmp_path, capsys, monkeypatch):
    config = shrunk("olmo-2-1b")
    reference(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    lines = new_family.differences(tmp_path, "llama")
    assert "missing in the files: model.layers.{i}.input_layernorm.weight" in lines
    assert "not explained: model.layers.{i}.self_attn.q_norm.weight" in lines
    assert new_family.differences(tmp_path, "olmo2") == []
    monkeypatch.setattr(sys, "argv", ["new_family.py", str(tmp_path), "--like", "llama"])
    assert new_family.main() == 0
    (tmp_path / "draft.py").write_text(capsys.readouterr().out)
    assert plugins.find("decoders", f"{tmp_path / 'draft.py'}:Decoder", {}).family.model_types == ("olmo2",)


@pytest.fixture(scope="module")
def qwen9(tmp_path_factory):
    """A folder with a model whose `model_type` the library does not know, its drafted file beside it, and rows."""
    folder = tmp_path_factory.mktemp("qwen9")
    model = write_model(folder / "model", "qwen3-0.6b")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "qwen9"}))
    draft = subprocess.run([sys.executable, TOOL, model, "--like", "qwen3"], capture_output=True, text=True, check=True)
    (folder / "qwen9.py").write_text(draft.stdout)
    write_config(folder / "my.yaml", model, write_rows(folder / "rows.jsonl", 12), steps=2)
    return folder


def test_the_walk_through_for_a_model_type_nobody_knows(qwen9, monkeypatch, capsys):
    monkeypatch.chdir(qwen9)
    assert tune(["validate", "lora_sft", "--config", "my.yaml", "model.code=./qwen9.py:Decoder"]) == 0
    assert tune(["run", "lora_sft", "--config", "my.yaml", "model.code=./qwen9.py:Decoder", "output_dir=out"]) == 0
    assert tune(["validate", "lora_sft", "--config", "my.yaml"]) == 2
    assert "model_type 'qwen9' is not supported" in capsys.readouterr().err
    inside = json.loads(Path("my.yaml").read_text())
    inside["model"]["code"] = "qwen9.py:Decoder"
    Path("inside.yaml").write_text(json.dumps(inside))
    assert tune(["validate", "full_sft", "--config", "inside.yaml"]) == 0


def test_a_second_model_of_a_run_is_read_by_whoever_knows_it(qwen9, monkeypatch):
    monkeypatch.chdir(qwen9)
    new, known = str(qwen9 / "model"), str(write_model(qwen9 / "known", "qwen3-0.6b"))
    code = "./qwen9.py:Decoder"
    mine = own.find(code)
    assert own.decoder(Model(path=new, code=code), new) is mine
    assert own.decoder(Model(path=new, code=code), known) is None
    assert own.decoder(Model(path=known, code=code), known) is mine
    assert own.decoder(Model(path=known, code=code), new) is mine
    with pytest.raises(UserError, match="'qwen9' is not supported"):
        own.arch(Model(path=known), new)
    more = ["--config", "my.yaml", f"model.code={code}", "output_dir=d"]
    assert tune(["validate", "distill", f"distill.teacher={known}", *more]) == 0
    assert tune(["validate", "pretrain", "from_scratch=true", "sizes.layers=1", *more]) == 0
