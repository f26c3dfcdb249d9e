"""Loading a config: layers, overrides, types, paths, references, the dump and the key reference."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from tiny_model import ROOT

from ftlib import config, plugins
from ftlib.config import LocalOrHub, MaybeFile, OutputDir, secrets, suggest, types
from ftlib.errors import Problems


@dataclass(frozen=True, kw_only=True)
class Item:
    path: LocalOrHub  # where it is
    weight: float = 1.0
    split: str | None = None
    names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 1.0  # peak learning rate
    decay: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0


@dataclass(frozen=True, kw_only=True)
class Config:
    items: tuple[Item, ...] = ()
    held_out: tuple[Item, ...] | float | None = None  # sources or a fraction
    inner: Inner = Inner(lr=3.0)
    maybe: Inner | None = None
    steps: int = 10
    name: Literal["a", "b"] = "a"
    compile: Literal["auto"] | bool = "auto"
    targets: tuple[str, ...] | str = "all"
    tags: list[str] = field(default_factory=list)
    text: str | None = None
    flag: bool = False
    code: MaybeFile | None = None
    loss: MaybeFile | dict[str, float] = "sigmoid"
    model: LocalOrHub | None = None
    file: Path | None = None
    output_dir: OutputDir = Path("output")


def load(tmp_path, text, *overrides, name="a.yaml"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return config.load(Config, ["--config", str(path), *overrides])


def test_defaults_and_layers(tmp_path):
    assert config.load(Config, []) == Config()
    (tmp_path / "low.yaml").write_text("steps: 1\ninner: {lr: 2}\ntags: [x, y]\n")
    (tmp_path / "high.yaml").write_text("inner: {decay: 0.1}\ntags: [z]\n")
    files = ["--config", str(tmp_path / "low.yaml"), f"--config={tmp_path / 'high.yaml'}"]
    cfg = config.load(Config, [*files, "steps=7", "steps=8"])
    assert (cfg.steps, cfg.inner, cfg.tags) == (8, Inner(lr=2.0, decay=0.1), ["z"])


def test_a_recipe_s_own_default_of_a_section_survives(tmp_path):
    assert load(tmp_path, "inner: {decay: 0}").inner == Inner(lr=3.0, decay=0.0)
    assert load(tmp_path, "maybe: {decay: 0}").maybe == Inner(lr=1.0, decay=0.0)
    assert load(tmp_path, "inner:\n").inner == Inner(lr=3.0)
    assert load(tmp_path, "maybe:\n").maybe is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E3", 1000.0), (".5", 0.5), ("3", 3.0), ("1_000.5", 1000.5), ("-.inf", -math.inf), ("2.", 2.0)],
)
def test_numbers(tmp_path, text, value):
    for cfg in (load(tmp_path, f"inner: {{lr: {text}}}"), config.load(Config, [f"inner.lr={text}"])):
        assert cfg.inner.lr == value
        assert type(cfg.inner.lr) is float


def test_unions_and_collections(tmp_path):
    cfg = load(tmp_path, "compile: true\ntargets: q_proj\nheld_out: 0.05\ninner: {betas: [0, 1], clip: null}")
    assert (cfg.compile, cfg.targets, cfg.held_out) == (True, "q_proj", 0.05)
    assert cfg.inner == Inner(lr=3.0, betas=(0.0, 1.0), clip=None)
    cfg = load(tmp_path, "targets: [q, v]\nheld_out: [{path: org/x}]\nitems: [{path: org/y, names: {a: b}}]")
    assert cfg.targets == ("q", "v")
    assert cfg.held_out == (Item(path="org/x"),)
    assert cfg.items == (Item(path="org/y", names={"a": "b"}),)


def test_yaml_1_1_surprises_stay_text(tmp_path):
    for text in ("no", "on", "12:30", "2024-01-01", "1.2.3"):
        assert load(tmp_path, f"text: {text}").text == text


def test_anchors_and_merge_keys(tmp_path):
    cfg = load(tmp_path, "inner: &x {lr: 5, decay: 6}\nmaybe:\n  <<: *x\n  lr: 7\n")
    assert cfg.maybe == Inner(lr=7.0, decay=6.0)
    assert cfg.inner == Inner(lr=5.0, decay=6.0)


def test_overrides():
    argv = ["items=[{path: org/a}]", "items[0].split=[:90%]", "items.1.path=org/b", "items[1].weight=2"]
    with pytest.raises(Problems):  # a list has no key 1
        config.load(Config, argv)
    argv[2] = "items[1].path=org/b"
    cfg = config.load(Config, argv)
    assert cfg.items == (Item(path="org/a", split="[:90%]"), Item(path="org/b", weight=2.0))
    assert config.load(Config, ["text=a=b: c # d"]).text == "a=b: c # d"
    assert config.load(Config, ["text=007", "targets=.*q_proj"]).text == "007"
    assert config.load(Config, ["text='null'"]).text == "null"
    assert config.load(Config, ["text=null"]).text is None
    assert config.load(Config, ["targets=[q,v]"]).targets == ("q", "v")
    assert config.load(Config, ["loss={ipo: 0.8, sft: 1}"]).loss == {"ipo": 0.8, "sft": 1.0}
    assert config.load(Config, ["text={ipo: 0.8}"]).text == "{ipo: 0.8}"
    with pytest.raises(Problems, match=r"loss\.ipo: expected number, got text 'high'"):
        config.load(Config, ["loss={ipo: high}"])
    assert config.load(Config, ["inner={lr: 4}", "inner.decay=2"]).inner == Inner(lr=4.0, decay=2.0)
    assert config.load(Config, ["items[0].names.user=human", "items[0].path=a/b"]).items[0].names == {"user": "human"}


def test_deletion_goes_back_to_the_default(tmp_path):
    assert load(tmp_path, "steps: 5\ninner: {lr: 9, decay: 9}", "~steps", "~inner.lr") == Config(
        inner=Inner(lr=3.0, decay=9.0)
    )
    assert config.load(Config, ["~inner.clip"]) == Config()


def test_references(tmp_path):
    text = "steps: 4\nheld_out: ${steps}\ntext: run-${steps}-${inner.lr}\ninner: {lr: 1e-4, decay: '${.lr}'}"
    cfg = load(tmp_path, text)
    assert (cfg.held_out, cfg.text, cfg.inner.decay) == (4.0, "run-4-0.0001", 1e-4)
    cfg = load(tmp_path, "items: [{path: ./d}]\nheld_out: ${items}\ntags: ['${items[0].path}']", name="sub/b.yaml")
    assert cfg.items == cfg.held_out == (Item(path=str(tmp_path / "sub/d")),)


def test_a_referred_path_belongs_to_the_folder_it_was_written_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load(tmp_path, "code: ${model}", "model=./m.py", name="sub/a.yaml")
    assert cfg.model == cfg.code == str(tmp_path / "m.py")


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "sub/org/here").mkdir(parents=True)
    (tmp_path / "org/cwd").mkdir(parents=True)

    def model(value):
        return load(tmp_path, f"model: {value}", name="sub/a.yaml").model

    assert model("./x") == str(tmp_path / "sub/x")
    assert model("../x") == str(tmp_path / "x")
    assert model("org/here") == str(tmp_path / "sub/org/here")
    assert model("data/train.jsonl") == str(tmp_path / "sub/data/train.jsonl")
    assert model("~/x") == "/home/someone/x"
    for name in ("org/name", "org/name@v1.0", "ftlib:demo/model", "gpt2", "/abs/x"):
        assert model(name) == name
    assert config.load(Config, ["model=org/cwd"]).model == str(tmp_path / "org/cwd")
    assert config.load(Config, ["model=org/here"]).model == "org/here"
    text = "code: my.py:Decoder\nfile: f\noutput_dir: out"
    cfg = load(tmp_path, text, name="sub/a.yaml")
    assert (cfg.code, cfg.file) == (f"{tmp_path}/sub/my.py:Decoder", tmp_path / "sub/f")
    assert cfg.output_dir == Path("out")
    for name in ("chatml", "pkg.mod:name"):
        assert load(tmp_path, f"code: {name}", name="sub/a.yaml").code == name
    assert load(tmp_path, "code: x.jinja", name="sub/a.yaml").code == str(tmp_path / "sub/x.jinja")


def test_dump_is_read_back_equal(tmp_path):
    cfg = load(
        tmp_path,
        "text: '1e-4'\ntags: ['no', '~', '0o17', ünï]\nitems: [{path: ./a, names: {x: '5'}}]\ncompile: false\n",
        "inner.lr=1e-7",
        "output_dir=o/p",
    )
    assert load(tmp_path, config.dump(cfg), name="elsewhere/dump.yaml") == cfg
    json.dumps(config.to_dict(cfg))


def test_dump_hides_secrets():
    names = ("hf_token", "api_key", "url", "headers", "max_new_tokens", "tokenizer", "note")
    tree = dataclasses.make_dataclass("Secret", [(name, object, None) for name in names])
    secret = "hunter2hunter2"
    cfg = tree(
        hf_token=secret, api_key=secret, url=f"https://me:{secret}@host/x?token={secret}&b=1", max_new_tokens=64,
        headers={"Authorization": f"Bearer {secret}"}, tokenizer="org/name", note=f"hf_{secret} and sk-{secret}",
    )  # fmt: skip
    text = config.dump(cfg)
    assert secret not in text
    kept = yaml.safe_load(text)
    assert (kept["max_new_tokens"], kept["tokenizer"]) == (64, "org/name")
    assert "b=1" in kept["url"]


def test_describe_reads_the_comments():
    docs = {doc.key: doc for doc in config.describe(Config)}
    assert docs["inner.lr"] == config.KeyDoc("inner.lr", "number", "3.0", "peak learning rate")
    assert docs["items[].path"].default == "required"
    assert docs["items[].path"].meaning == "where it is"
    assert docs["held_out"].type == "list of Item sections or number or null"
    assert docs["compile"].type == "'auto' or true or false"
    assert "inner" not in docs


def test_every_key_of_the_shared_sections_has_a_type_and_most_a_meaning():
    from ftlib import sections

    docs = [doc for name in sections.__all__ for doc in config.describe(getattr(sections, name))]
    assert len(docs) > 30
    assert all(doc.type and doc.default for doc in docs if not doc.key.endswith("[]"))
    assert sum(bool(doc.meaning) for doc in docs) > 0.8 * len(docs)
    assert not [doc.key for doc in docs if secrets.is_secret_key(doc.key)], "a run's config.yaml would not have it"


def test_null_where_null_is_the_default(tmp_path):
    assert load(tmp_path, "items: [{path: org/x, split: null}]\ntext:\n").items[0].split is None


THEIRS = {  # what others call it -> how each kind of recipe does, null: it has nothing like it
    "warmup_ratio": ("schedule.warmup_steps", "schedule.warmup_steps", "schedule.warmup_steps"),
    "load_in_4bit": ("model.quantize=nf4", "model.quantize=nf4", "model.quantize=nf4"),
    "report_to": ("log.to", "log.to", "log.to"),
    "fp16": ("dtype=bf16", "dtype=bf16", "dtype=bf16"),
    "data.max_samples": ("data.sources[].split", "data.sources[].split", "data.sources[].split"),
    "memory.cpu_offload": ("optim.offload", "optim.offload", "optim.offload"),
    "gradient_accumulation_steps": ("batch.rows", "batch.rows", "rollout.prompts"),
    "assistant_only_loss": ("data.train_on", "data.train_on", None),
    "neftune_noise_alpha": ("neftune", None, None),
    "parallel.dp": ("parallel.dp_shard",) * 3,
    "parallel.tensor_parallel_size": ("parallel.tp",) * 3,
    "beta": ("optim.betas", "dpo.beta", "algorithm.kl_coef"),
    "loss_type": ("loss", "dpo.loss", "algorithm.preset"),
    "rpo_alpha": (None, "dpo.sft", None),
    "precompute_ref_log_probs": (None, "dpo.reference=cache", None),
    "use_vllm": (None, None, "rollout.engine=vllm"),
    "mask_truncated_completions": (None, None, "algorithm.overlong=mask"),
    "num_iterations": (None, None, "rollout.minibatches"),
}


@pytest.fixture(scope="module")
def keys():
    """Recipe -> its keys."""
    files = [file for file in (ROOT / "recipes").glob("*.py") if file.stem != "quantize"]
    return {file.stem: types.known_keys(plugins.load_file(file).Config) for file in files}


@pytest.mark.parametrize("name", THEIRS)
def test_other_libraries_names_of_keys(name, keys):
    for recipe, ours in zip(("lora_sft", "dpo", "grpo"), THEIRS[name], strict=True):
        said = suggest.unknown_key(name, keys[recipe], ["model", "data"])
        assert (f"(did you mean '{ours}'" if ours else "(here are: model, data)") in said, (recipe, said)


def test_every_key_that_is_offered_for_another_library_s_is_one(keys):
    offered = [option for ours in suggest._ELSEWHERE.values() for option in ours.split("|")]
    assert {suggest._KEY.match(option)[0] for option in offered} <= set().union(*keys.values())
