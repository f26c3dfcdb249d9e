"""The drafting tool: a file that loads, and the tensors that its model does not explain."""

import importlib
import json
import sys
from pathlib import Path

from parity.shrink import reference, shrunk

from ftlib import plugins

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
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
