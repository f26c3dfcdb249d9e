"""The drafting tool: a file that loads, and the tensors that its model does not explain."""

import hashlib
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from parity.shrink import reference, shrunk
from safetensors.torch import load_file, save_file
from tiny_model import write_config, write_model, write_rows

from ftlib import build, config, plugins
from ftlib.cli import main as tune
from ftlib.errors import UserError
from ftlib.models import own
from ftlib.parallel import run as processes
from ftlib.sections import Model

TOOL = Path(__file__).parents[2] / "tools" / "new_family.py"
sys.path.insert(0, str(TOOL.parent))
new_family = importlib.import_module("new_family")


def test_a_draft_and_what_differs(tmp_path, capsys, monkeypatch):
    config = shrunk("olmo-2-1b")
    reference(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"wobble": 3}))
    lines = new_family.differences(tmp_path, "llama")
    assert "missing in the files: model.layers.{i}.input_layernorm.weight" in lines
    assert "not explained: model.layers.{i}.self_attn.q_norm.weight" in lines
    assert "key that nothing reads: wobble = 3" in lines
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert new_family.differences(tmp_path, "olmo2") == []
    monkeypatch.setattr(sys, "argv", ["new_family.py", str(tmp_path), "--like", "llama"])
    assert new_family.main() == 0
    (tmp_path / "draft.py").write_text(capsys.readouterr().out)
    assert plugins.find("decoders", f"{tmp_path / 'draft.py'}:Decoder", {}).family.model_types == ("olmo2",)


TRAINED = ["run", "lora_sft", "--config", "my.yaml", "model.code=./qwen9.py:Decoder", "output_dir=out"]


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
    assert tune(["validate", *TRAINED[1:]]) == 0
    assert tune(TRAINED) == 0
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


def test_what_was_trained_with_a_file_says_so(qwen9, monkeypatch, capsys):
    monkeypatch.chdir(qwen9)
    assert tune(TRAINED) == 0
    sha256 = hashlib.sha256(Path("qwen9.py").read_bytes()).hexdigest()
    record = {"model.code": {"code": "qwen9.py:Decoder", "sha256": sha256}}
    assert json.loads(Path("out/final/ftlib.json").read_text()) == record

    ask, mine = ["--prompt", "say red", "--max-new-tokens", "2", "--device", "cpu"], ["--code", "qwen9.py:Decoder"]
    Path("other.py").write_text(Path("qwen9.py").read_text() + "# edited\n")
    shutil.copytree("model", "stock")
    edit("stock/config.json", "qwen9", "qwen3")
    note = f"note: out/final was trained with model.code qwen9.py:Decoder (sha256 {sha256[:12]})"
    for verb, more, code, said in (
        ("out/final", mine, 0, None),
        ("out/final", [], 2, f"{note}; the library's own class runs it here: --code FILE.py:CLASS names yours"),
        ("out/final", ["--code", "other.py:Decoder"], 0, f"{note}, and other.py:Decoder has another content"),
        ("stock", ["--adapter", "out/final"], 0, f"{note}; the library's own class"),
    ):
        capsys.readouterr()
        assert tune(["generate", verb, *more, *ask]) == code
        errors = capsys.readouterr().err
        assert said in errors if said else "note:" not in errors

    assert tune(["merge", "model", "out/final", "merged", *mine]) == 0
    assert tune(["merge", "model", "out/checkpoints/step_000002", "also", *mine]) == 0
    assert "note:" not in capsys.readouterr().err
    assert all(json.loads(Path(to, "ftlib.json").read_text()) == record for to in ("merged", "also"))
    edit("merged/config.json", "qwen9", "qwen3")
    more = ["--config", "my.yaml", "model.path=merged", "tokenizer.path=model", "output_dir=on", "steps=1"]
    assert tune(["run", "full_sft", *more]) == 0
    assert "merged was trained with model.code qwen9.py:Decoder" in capsys.readouterr().err
    assert not Path("on/final/ftlib.json").exists()


def test_a_file_that_was_edited_does_not_continue_a_run(qwen9, monkeypatch, capsys):
    monkeypatch.chdir(qwen9)
    assert tune(TRAINED) == 0
    shutil.copy("qwen9.py", "moved.py")
    where = TRAINED.index("model.code=./qwen9.py:Decoder")
    moved = [*TRAINED[:where], "model.code=./moved.py:Decoder", *TRAINED[where + 1 :]]
    assert tune(moved) == 0  # another name, the same content
    Path("moved.py").write_text(Path("moved.py").read_text() + "# edited\n")
    capsys.readouterr()
    assert tune(moved) == 2
    assert "was made with other settings:\n    model.code: '" in capsys.readouterr().err


def test_what_a_file_imports_from_its_folder_belongs_to_it(qwen9, monkeypatch, capsys):
    monkeypatch.chdir(qwen9)
    Path("split").mkdir()
    Path("split/family9.py").write_text(Path("qwen9.py").read_text() + "import more9\nfrom .parts9 import MARK\n")
    Path("split/parts9.py").write_text("MARK = 1\n")
    Path("split/more9.py").write_text("")
    where = TRAINED.index("model.code=./qwen9.py:Decoder")
    split = [*TRAINED[:where], "model.code=./split/family9.py:Decoder", "output_dir=apart"]
    assert tune(split) == 0
    kept = {file.name: file.read_text() for file in Path("apart/final/code").iterdir()}
    assert kept == {file.name: file.read_text() for file in Path("split").glob("*.py")} and len(kept) == 3
    capsys.readouterr()
    ask = ["--prompt", "say red", "--max-new-tokens", "2", "--device", "cpu"]
    assert tune(["generate", "apart/final", "--code", "apart/final/code/family9.py:Decoder", *ask]) == 0
    assert "note:" not in capsys.readouterr().err
    assert tune(["merge", "model", "apart/final", "apart_merged", "--code", "split/family9.py:Decoder"]) == 0
    assert {file.name for file in Path("apart_merged/code").iterdir()} == kept.keys()
    Path("split/parts9.py").write_text("MARK = 2\n")
    assert tune(["generate", "apart/final", "--code", "split/family9.py:Decoder", *ask]) == 0
    assert "has another content" in capsys.readouterr().err
    assert tune(split) == 2
    assert "was made with other settings:\n    model.code: '" in capsys.readouterr().err


def test_a_damaged_record_is_one_message(tmp_path):
    for text in ("{broken", "[]"):
        (tmp_path / own.ABOUT).write_text(text)
        with pytest.raises(UserError, match="no record of a run") as error:
            own.recorded(tmp_path)
        assert error.value.where == str(tmp_path / own.ABOUT)


def test_init_takes_a_family_of_one_s_own(qwen9, monkeypatch, capsys):
    monkeypatch.chdir(qwen9)
    Path("sub").mkdir()
    asked = ["init", "rows.jsonl", "--model", "model", "--out", "sub/made.yaml"]
    assert tune(asked) == 2
    assert "model_type 'qwen9' is not supported" in capsys.readouterr().err
    assert tune([*asked, "--code", "qwen9.py:Decoder"]) == 0
    assert "code: '../qwen9.py:Decoder'" in Path("sub/made.yaml").read_text()
    assert tune(["validate", "lora_sft", "--config", "sub/made.yaml"]) == 0


def edit(file, old, new):
    Path(file).write_text(Path(file).read_text().replace(old, new))


def test_a_tied_head_is_not_missing_and_not_strange(tmp_path):
    model = write_model(tmp_path / "tied", "llama-3.2-1b")
    assert json.loads((model / "config.json").read_text())["tie_word_embeddings"]
    assert new_family.differences(model, "llama") == []
    file = model / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert new_family.differences(model, "llama") == []


@pytest.mark.parametrize(("inside", "said"), [(None, "no config.json"), ("{", "not valid JSON")])
def test_a_folder_that_holds_no_model(inside, said, tmp_path, monkeypatch, capsys):
    if inside is not None:
        (tmp_path / "config.json").write_text(inside)
    folder = tmp_path if inside is not None else tmp_path / "nowhere"
    monkeypatch.setattr(sys, "argv", ["new_family.py", str(folder)])
    with pytest.raises(SystemExit) as end:
        new_family.main()
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_what_a_run_is_held_to_is_read_by_the_run_s_class(qwen9, monkeypatch):
    monkeypatch.chdir(qwen9)
    cfg = config.load(plugins.load_file(TOOL.parents[1] / "recipes" / "lora_sft.py").Config, TRAINED[2:])
    run = processes.start(cfg.parallel, cfg.seed, cfg.deterministic)
    mine = own.find(cfg.model.code)
    assert isinstance(build.frozen(cfg, run, cfg.model.path).model, mine)
    assert isinstance(build.model(cfg, run).model, mine)
