"""Configs of other libraries: every common key becomes ours, or is named with the reason. The files are our own."""

import json
from pathlib import Path

import pytest
from tiny_model import ROOT

from ftlib import cli, config, plugins
from ftlib.cli import import_
from ftlib.config.imports import LIBRARIES
from ftlib.config.imports.rules import convert
from ftlib.config.types import known_keys

AXOLOTL = """
base_model: Qwen/Qwen3-0.6B
revision_of_model: main
model_type: AutoModelForCausalLM
strict: false
load_in_4bit: true
adapter: lora
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
datasets:
  - path: rows.jsonl
    type: chat_template
    field_messages: turns
    message_property_mappings: {role: from, content: value}
    roles: {assistant: [gpt, model], user: [human]}
  - {path: org/alpaca, type: alpaca, split: "train[:50%]"}
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_torch_fused
adam_beta2: 0.95
lr_scheduler: cosine
learning_rate: 0.0002
warmup_ratio: 0.1
weight_decay: 0.01
max_grad_norm: 1.0
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
logging_steps: 1
evals_per_epoch: 4
save_steps: 50
save_total_limit: 3
wandb_project: mine
wandb_entity:
output_dir: ./out
seed: 42
special_tokens: {pad_token: "<|pad|>", bos_token: "<s>"}
eval_steps: 20
early_stopping_patience: 3
roles_to_train: [assistant, human]
train_on_eos: last
deepspeed: zero2.json
frobnicate: 7
"""
TORCHTUNE = """
output_dir: runs/torchtune
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: ${base}/tokenizer.model
  max_seq_len: 2048
base: models/llama
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: [q_proj, v_proj, output_proj]
  apply_lora_to_mlp: true
  apply_lora_to_output: false
  lora_rank: 64
  lora_alpha: 128
  lora_dropout: 0.0
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: ${base}
  checkpoint_files: [model.safetensors]
  model_type: LLAMA3_2
resume_from_checkpoint: False
dataset:
  _component_: torchtune.datasets.chat_dataset
  source: json
  data_files: rows.jsonl
  conversation_column: turns
  conversation_style: openai
  packed: True
batch_size: 4
gradient_accumulation_steps: 8
epochs: 1
max_steps_per_epoch: 100
optimizer: {_component_: torch.optim.AdamW, fused: True, weight_decay: 0.01, lr: 3e-4}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 100}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
clip_grad_norm: 1.0
device: cuda
dtype: bf16
enable_activation_checkpointing: True
compile: False
log_every_n_steps: 1
metric_logger: {_component_: torchtune.training.metric_logging.DiskLogger, log_dir: logs}
profiler: {_component_: torchtune.training.setup_torch_profiler, enabled: False}
seed: 5
"""
LLAMA_FACTORY = """
model_name_or_path: org/model
stage: sft
do_train: true
finetuning_type: full
dataset: chats,plain
dataset_dir: sets
template: qwen
cutoff_len: 1024
max_samples: 1000
preprocessing_num_workers: 16
overwrite_cache: true
output_dir: saves/x
logging_steps: 10
save_steps: 500
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-5
num_train_epochs: 3.0
max_steps: 200
lr_scheduler_type: linear
warmup_ratio: 0.1
bf16: true
disable_gradient_checkpointing: true
val_size: 0.1
eval_strategy: steps
eval_steps: 100
neftune_noise_alpha: 5
report_to: wandb
"""
INFO = {
    "chats": {
        "file_name": "chats.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations"},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    },
    "plain": {"file_name": "plain.json", "columns": {"prompt": "question", "response": "answer"}},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}\n")
    Path("sets").mkdir()
    Path("sets/dataset_info.json").write_text(json.dumps(INFO))
    for name in ("chats", "plain"):
        Path(f"sets/{name}.json").write_text("[]")
    return tmp_path


def imported(text, capsys):
    """(our parsed config, output) of a file of another library."""
    Path("their.yaml").write_text(text)
    code = cli.main(["import", "their.yaml", "--out", "deep/my.yaml", "--force"])
    out, err = capsys.readouterr()
    assert code == 0, err
    recipe = out.split("recipes/")[1].split(".py")[0]
    return config.load(plugins.load_file(ROOT / f"recipes/{recipe}.py").Config, ["--config", "deep/my.yaml"]), out


def lost_in(out):
    return {line.split(": ")[1] for line in out.splitlines() if "without an equivalent" in line}


def test_axolotl(here, capsys):
    cfg, out = imported(AXOLOTL, capsys)
    assert "Axolotl -> deep/my.yaml, for recipes/lora_sft.py" in out
    assert (cfg.model.path, cfg.lora.rank, cfg.lora.alpha, cfg.lora.targets) == (
        "Qwen/Qwen3-0.6B@main",
        8,
        16.0,
        "all-linear",
    )
    first, second = cfg.data.sources
    assert Path(first.path) == here / "rows.jsonl" and first.format == "messages"
    assert first.columns == {"messages": "turns", "role": "from", "content": "value"}
    assert first.roles == {"gpt": "assistant", "model": "assistant", "human": "user"}
    assert (second.path, second.format, second.split) == ("org/alpaca", "alpaca", "train[:50%]")
    assert (cfg.data.eval, cfg.data.seq_len, cfg.data.pack) == (0.05, 4096, True)
    assert (cfg.batch.rows, cfg.batch.micro_rows, cfg.epochs, cfg.dtype) == (8, 2, 3.0, "bf16")
    assert (cfg.optim.lr, cfg.optim.betas, cfg.optim.weight_decay, cfg.schedule.name) == (
        2e-4,
        (0.9, 0.95),
        0.01,
        "cosine",
    )
    assert (cfg.memory.recompute, cfg.checkpoint.every, cfg.checkpoint.keep, cfg.seed) == ("full", 50, 3, 42)
    lost = lost_in(out)
    assert cfg.model.quantize == "nf4"
    assert lost == {"special_tokens.bos_token", "frobnicate"}
    assert cfg.schedule.warmup_steps == 0.1 and cfg.eval.every == 0.0833333  # 4 times in each of 3 epochs
    assert (cfg.log.to, cfg.log.project, cfg.tokenizer.pad_token) == (("console", "wandb"), "mine", "<|pad|>")
    assert (cfg.eval.patience, cfg.data.train_on, cfg.data.train_on_end) == (3, ("assistant", "user"), "last")
    assert "note: batch.rows 8 is for one device" in out
    assert "# without an equivalent: frobnicate: not a key that is known here" in Path("deep/my.yaml").read_text()


RESTARTS = """
base_model: Qwen/Qwen3-0.6B
adapter: lora
datasets: [{path: rows.jsonl, type: chat_template}]
max_steps: 500
relora: true
jagged_restart_steps: 150
jagged_restart_anneal_steps: 5
"""


def test_axolotl_merges_while_training_and_layers_that_sleep(here, capsys):
    cfg, out = imported(RESTARTS, capsys)
    assert (cfg.relora.every, cfg.relora.warmup_steps, cfg.relora.keep) == (150, 10, 0.1)
    assert lost_in(out) == {"jagged_restart_anneal_steps"}
    cfg, _ = imported(RESTARTS + "relora_prune_ratio: 0.99\njagged_restart_warmup_steps: 20\n", capsys)
    assert (cfg.relora.warmup_steps, cfg.relora.keep) == (20, 0.01)
    assert imported(RESTARTS + "relora_prune_method: reset\n", capsys)[0].relora.keep == 0
    assert "relora_prune_method" in lost_in(imported(RESTARTS + "relora_prune_method: random\n", capsys)[1])
    cfg, out = imported(RESTARTS.replace("relora: true", "relora: false"), capsys)
    assert cfg.relora.every == 0 and "jagged_restart_steps" in lost_in(out)
    sleepers = RESTARTS.split("relora:")[0].replace("adapter: lora\n", "lisa_n_layers: 2\nlisa_step_interval: 30\n")
    assert vars(imported(sleepers, capsys)[0].lisa) == {"layers": 2, "every": 30}


def test_torchtune(here, capsys):
    cfg, out = imported(TORCHTUNE, capsys)
    assert "torchtune -> deep/my.yaml, for recipes/lora_sft.py" in out
    assert cfg.model.path == "models/llama"
    assert cfg.lora.targets == ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert (cfg.lora.rank, cfg.lora.alpha, cfg.data.seq_len, cfg.data.pack) == (64, 128.0, 2048, True)
    (source,) = cfg.data.sources
    assert (Path(source.path), source.format, source.columns) == (
        here / "rows.jsonl",
        "messages",
        {"messages": "turns"},
    )
    assert (cfg.batch.rows, cfg.batch.micro_rows, cfg.steps, cfg.optim.lr) == (32, 4, 100, 3e-4)
    assert (cfg.schedule.name, cfg.schedule.warmup_steps, cfg.memory.compile) == ("cosine", 100, False)
    assert lost_in(out) == {"base"}


def test_llama_factory(here, capsys):
    cfg, out = imported(LLAMA_FACTORY, capsys)
    assert "LLaMA-Factory -> deep/my.yaml, for recipes/full_sft.py" in out
    chats, plain = cfg.data.sources
    assert (Path(chats.path), chats.format, chats.split) == (here / "sets/chats.json", "messages", "[:1000]")
    assert chats.columns == {"messages": "conversations", "role": "from", "content": "value"}
    assert chats.roles == {"human": "user", "gpt": "assistant"}
    assert (plain.format, plain.columns) == ("alpaca", {"instruction": "question", "output": "answer"})
    assert (cfg.steps, cfg.schedule.warmup_steps, cfg.schedule.name) == (200, 0.1, "linear")
    assert (cfg.batch.rows, cfg.data.eval, cfg.eval.every, cfg.memory.recompute) == (8, 0.1, 100, "none")
    assert not lost_in(out) and cfg.neftune == 5 and cfg.log.to == ("console", "wandb")


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_key_of_the_table_leads_to_a_key_of_ours_or_says_why(name):
    stems = ("lora_sft", "full_sft", "pretrain", "dpo", "reward", "grpo", "distill")
    recipes = {stem: plugins.load_file(ROOT / f"recipes/{stem}.py") for stem in stems}
    ours = {key for module in recipes.values() for key in known_keys(module.Config)}
    for key, rule in LIBRARIES[name].rules.items():
        assert rule.to in ours if rule.to else rule.note, (key, rule.to)
    assert not LIBRARIES[name].rules.keys() & LIBRARIES[name].together.keys()


def test_values_without_an_equivalent_are_named():
    theirs = {
        "base_model": "a/b",
        "optimizer": "lion_8bit",
        "lr_scheduler": "rex",
        "adapter": "llama-adapter",
    }
    made = convert(LIBRARIES["Axolotl"], theirs, import_._known)
    assert {key for key, _ in made.lost} == {"optimizer", "lr_scheduler", "adapter"}
    assert "tune help config recipes/lora_sft.py" in dict(made.lost)["optimizer"] and made.get("optim.name") == "adamw"
    assert "the recipe's own is used instead" in dict(made.lost)["lr_scheduler"]


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "adamw_bnb_8bit"])
def test_adamw_of_8_bits_keeps_its_moments_in_int8(name):
    made = convert(LIBRARIES["Axolotl"], {"base_model": "a/b", "adapter": "lora", "optimizer": name}, import_._known)
    assert (made.get("optim.name"), made.get("optim.states")) == ("adamw", "int8") and not made.lost


@pytest.mark.parametrize(("value", "dtype"), [("false", "fp32"), ("true", "bf16"), ("auto", "bf16"), ("fp32", "fp32")])
def test_bf16_switched_off_is_fp32(value, dtype):
    made = convert(LIBRARIES["Axolotl"], {"base_model": "a/b", "bf16": value}, import_._known)
    assert made.get("dtype") == dtype


LEFT_OUT = {
    "Axolotl": (
        {"base_model": "a/b", "adapter": "lora", "lora_r": 4, "max_steps": 1000},
        {"data.pack": False, "data.seq_len": 512, "optim.betas": [0.9, 0.999], "schedule.warmup_steps": 30},
    ),
    "LLaMA-Factory": (
        {"model_name_or_path": "a/b"},
        {"data.pack": False, "data.overlong": "truncate", "lora.rank": 8, "lora.alpha": 16.0, "epochs": 3.0,
         "optim.lr": 5e-5, "optim.betas": [0.9, 0.999], "schedule.name": "linear", "schedule.warmup_steps": 0,
         "batch.micro_rows": 8, "dtype": "fp32"},
    ),
    "TRL": (
        {"model_name_or_path": "a/b", "dataset_name": "a/c", "use_peft": True},
        {"data.pack": False, "data.overlong": "truncate", "data.seq_len": 1024, "lora.dropout": 0.05, "epochs": 3.0,
         "data.train_on": ["system", "user", "assistant", "tool"], "lora.targets": ["q_proj", "v_proj"], "seed": 42,
         "optim.lr": 2e-5, "optim.betas": [0.9, 0.999], "schedule.name": "linear", "schedule.warmup_steps": 0,
         "batch.micro_rows": 8, "dtype": "not written", "lora.rank": "not written", "log.every": 10},
    ),
    "torchtune": (
        {"model._component_": "torchtune.models.llama3_2.lora_llama3_2_1b", "checkpointer.checkpoint_dir": "a/b",
         "dataset._component_": "torchtune.datasets.alpaca_dataset", "optimizer._component_": "torch.optim.AdamW",
         "max_steps_per_epoch": 50, "epochs": 2, "dtype": "bf16"},
        {"data.pack": False, "data.overlong": "truncate", "data.train_on": ["system", "user", "assistant", "tool"],
         "lora.rank": 8, "lora.alpha": 16.0, "optim.lr": 1e-3, "optim.betas": [0.9, 0.999], "steps": 100,
         "optim.weight_decay": 0.01, "optim.max_grad_norm": None, "schedule.name": "constant",
         "schedule.warmup_steps": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_another_library_does_with_a_key_left_out_is_written(name):
    """As its documentation and source have it; where our default is the same nothing is written."""
    theirs, ours = LEFT_OUT[name]
    made = convert(LIBRARIES[name], theirs, import_._known)
    assert {key: made.get(key, "not written") for key in ours} == ours and not made.lost
    assert any("left out there" in note and "data.pack" in note for note in made.notes)


MISTAKES = {
    "none of them": ("a: 1", "of no library that is known here"),
    "ours": ("model: {path: x}\ndata: {}", "looks like a config of ours", "tune validate"),
    "no mapping": ("- 1", "a config is made of"),
    "broken": ("a: [", "their.yaml:", "not valid YAML"),
    "code": ("base_model: !!python/object:os.system {}", "is not allowed"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, here, capsys):
    text, *expected = MISTAKES[name]
    Path("their.yaml").write_text(text)
    assert cli.main(["import", "their.yaml"]) == 2
    err = capsys.readouterr().err
    assert all(words in err for words in expected), err


def test_the_table_in_the_readme_is_up_to_date():
    tool = plugins.load_file(ROOT / "tools/make_import_table.py")
    assert tool.wanted() == tool.FILE.read_text(), "python tools/make_import_table.py"
