"""A family taken out whole: the file passes the same parity, trains through a recipe, and can be a new family."""

import json
import subprocess
import sys

import pytest
import torch
from parity.shrink import reference, relative, shrunk
from tiny_model import losses, train, write_config, write_model, write_rows

from ftlib import __version__, models, plugins
from ftlib.cli import main as tune
from ftlib.errors import UserError
from ftlib.models import families
from ftlib.models.extract import extract

X = torch.randint(3, 160, (2, 40), generator=torch.Generator().manual_seed(1))
SHAPES = {
    "llama": "llama-3.1-8b", "mistral": "mistral-nemo-12b", "ministral3": "ministral-3-3b", "qwen2": "qwen2.5-0.5b",
    "qwen3": "qwen3-8b", "qwen3_moe": "qwen3-30b-a3b", "mixtral": "mixtral-8x7b", "gpt_oss": "gpt-oss-20b",
    "gemma2": "gemma-2-2b", "gemma3_text": "gemma-3-1b", "phi3": "phi-4-mini", "olmo2": "olmo-2-1b",
    "olmo3": "olmo-3-7b", "glm4": "glm-4-9b", "smollm3": "smollm3-3b", "granite": "granite-3.3-8b",
    "seed_oss": "seed-oss-36b", "ernie4_5": "ernie-4.5-0.3b", "hunyuan_v1_dense": "hunyuan-1.8b",
    "exaone4": "exaone-4.0-32b", "arcee": "afm-4.5b",
    "glm4_moe": "glm-4.5-air", "qwen2_moe": "qwen1.5-moe-a2.7b", "olmoe": "olmoe-1b-7b",
}
OFTEN = ("qwen3", "gpt_oss", "phi3")


def test_every_family_has_a_shape():
    assert SHAPES.keys() == families.FAMILIES.keys()


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]
)
def test_the_copy_passes_the_same_parity(name, tmp_path):
    assert tune(["cp", f"model:{name}", str(tmp_path / "mine.py")]) == 0
    config = shrunk(SHAPES[name])
    theirs = reference(config)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder = plugins.find("decoders", f"{tmp_path / 'mine.py'}:Decoder", {})
    mine = models.from_pretrained(tmp_path, decoder=decoder)
    assert type(mine.model).__module__.startswith("ftlib_file_") and type(mine.arch).__module__.startswith("ftlib_file")
    with torch.no_grad():
        assert relative(mine.logits(X), theirs(X).logits) <= 1e-5
    gradients = []
    for model in (mine, models.from_pretrained(tmp_path)):
        model.logits(X).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_it_imports(tmp_path):
    source = extract("gemma2")
    imported = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    ours = {name for name in imported if name.startswith("ftlib")}
    assert not {name for name in ours if "decoder" in name or "families" in name or name == "ftlib.models.arch"}
    (tmp_path / "mine.py").write_text(source)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(tmp_path / "mine.py")]
    assert subprocess.run(ruff, capture_output=True).returncode == 0


def test_lora_trains_it_as_it_trains_the_library_s(tmp_path):
    model, rows = write_model(tmp_path / "model", "qwen3-0.6b"), write_rows(tmp_path / "rows.jsonl", 24)
    assert tune(["cp", "model:qwen3", str(tmp_path / "mine.py")]) == 0
    found = {}
    config = write_config(tmp_path / "c.yaml", model, rows, steps=3)
    for name, code in {"library": [], "mine": [f"model.code={tmp_path / 'mine.py'}:Decoder"]}.items():
        found[name] = losses(train("lora_sft", "--config", config, f"output_dir={tmp_path / name}", *code))
    assert found["mine"] == found["library"] and len(found["mine"]) == 3
    adapters = [(tmp_path / name / "final" / "adapter_model.safetensors").read_bytes() for name in found]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_pretraining_trains_it(tmp_path):
    base = json.loads((models.hub.resolve("ftlib:demo/model") / "config.json").read_text())
    assert tune(["cp", f"model:{base['model_type']}", str(tmp_path / "mine.py")]) == 0
    losses = []
    for code in ([], [f"model.code={tmp_path / 'mine.py'}:Decoder"]):
        out = tmp_path / f"out{len(losses)}"
        argv = ["run", "recipes/pretrain.py", "--config", "configs/demo_pretrain.yaml", "steps=2"]
        assert tune([*argv, f"output_dir={out}", *code]) == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert len(losses[0]) == 2 and losses[0] == losses[1]


NEW = '''
from ftlib.models.arch import Layer
from ftlib.models.decoder import Decoder as Base
from ftlib.models.families.common import PRE_NORM_KEYS, Family, arch, attn, mlp, number, norm_keys
from ftlib.models.keys import Table


def arcane(config):
    layer = Layer(mixer=attn(config, qk_norm="head"), ffn=mlp(config))
    return arch(config, [layer] * number(config, "num_hidden_layers"))


class Decoder(Base):
    family = Family(model_types=("arcane",), arch=arcane)
'''


def test_a_new_family_in_one_file(tmp_path):
    config = shrunk("qwen3-8b")
    theirs = reference(config)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "arcane"}))
    (tmp_path / "arcane.py").write_text(NEW)
    decoder = plugins.find("decoders", f"{tmp_path / 'arcane.py'}:Decoder", {})
    with torch.no_grad():
        ours = models.from_pretrained(tmp_path, decoder=decoder)
        assert relative(ours.logits(X), theirs(X).logits) <= 1e-5
    with pytest.raises(UserError, match="model_type 'arcane' is not supported"):
        models.from_pretrained(tmp_path)


def test_a_copy_knows_what_it_is_a_copy_of(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert tune(["cp", "model:qwen3", "mine.py"]) == 0
    assert (tmp_path / "mine.py").read_text().startswith(f"# from ftlib {__version__} model:qwen3 sha256:")
    capsys.readouterr()
    assert tune(["diff", "mine.py"]) == 0
    assert "model:qwen3 has not changed since it was copied" in (said := capsys.readouterr().out)
    assert said.endswith("(no difference)\n")
    with (tmp_path / "mine.py").open("a") as file:
        file.write("# mine\n")
    assert tune(["diff", "mine.py"]) == 0 and "\n+# mine\n" in capsys.readouterr().out
    shipped = extract("qwen3")
    with monkeypatch.context() as later:
        later.setattr("ftlib.models.extract.extract", lambda name: shipped.replace("Train it", "Now train it", 1))
        assert tune(["update", "mine.py"]) == 0
    text = (tmp_path / "mine.py").read_text()
    assert "\nNow train it with\n" in text and text.endswith("# mine\n")
    header = text.splitlines()[0].replace("qwen3", "qwen33")
    (tmp_path / "mine.py").write_text(header)
    assert tune(["diff", "mine.py"]) == 2 and "no model family 'qwen33'" in capsys.readouterr().err


def test_unknown_names():
    assert tune(["cp", "model:qwen33", "nowhere.py"]) == 2
