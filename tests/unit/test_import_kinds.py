"""A realistic config of each kind of training of each library: the file that is written trains, as its checks say."""

import json
from pathlib import Path

import pytest
from test_import import imported, lost_in
from tiny_model import ROOT

from ftlib import cli

MACHINE = ["memory.offload=false", "model.fp8=null"]  # what validate refuses without a GPU
CHAT = [{"role": "user", "content": "What is two plus two?"}, {"role": "assistant", "content": "Four."}]
ASKED = [{"role": "user", "content": "Two plus two?"}]
FILES = {
    "chats.jsonl": {"messages": CHAT},
    "plain.jsonl": {"instruction": "Add two and two.", "input": "", "output": "Four."},
    "text.jsonl": {"text": "Two and two are four, and four and four are eight."},
    "asked.jsonl": {"system_prompt": "Be brief.", "question": "Two plus two?", "response": "Four."},
    "pieces.jsonl": {"segments": [{"text": "Two plus two", "label": False}, {"text": " is four.", "label": True}]},
    "pairs.jsonl": {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five."},
    "talks.jsonl": {"talk": [{"from": "human", "value": "Two plus two?"}],
                    "chosen": {"from": "gpt", "value": "Four."}, "rejected": {"from": "gpt", "value": "Five."}},
    "rated.jsonl": {"asked": "Two plus two?", "said": "Four.", "label": True},
    "answers.jsonl": {"prompt": "Two plus two?", "completion": "Four.", "label": True},
    "sums.jsonl": {"prompt": ASKED, "answer": "4"},
    "ranked.jsonl": {"conversations": [{"from": "human", "value": "Two plus two?"}],
                     "chosen": {"from": "gpt", "value": "Four."}, "rejected": {"from": "gpt", "value": "Five."}},
}  # fmt: skip
INFO = {
    "plain": {"file_name": "plain.jsonl"},
    "pairs": {"file_name": "ranked.jsonl", "ranking": True, "formatting": "sharegpt",
              "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
              "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}},
    "rated": {"file_name": "rated.jsonl", "columns": {"prompt": "asked", "response": "said", "kto_tag": "label"}},
    "text": {"file_name": "text.jsonl", "columns": {"prompt": "text"}},
}  # fmt: skip
AXOLOTL = "base_model: ftlib:demo/model\nmicro_batch_size: 1\nnum_epochs: 2\nlearning_rate: 1e-4\nsequence_len: 256\n"
LORA = "adapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
FACTORY = "model_name_or_path: ftlib:demo/model\ndataset_dir: .\ncutoff_len: 256\nper_device_train_batch_size: 1\n"
TRL = "model_name_or_path: ftlib:demo/model\nmax_length: 256\nper_device_train_batch_size: 2\n"
TUNE = """
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: "ftlib:demo/model"}
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: null, max_seq_len: 256}
optimizer: {_component_: torch.optim.AdamW, fused: true, lr: 2e-5}
batch_size: 2
epochs: 1
"""
KINDS = {  # text, recipe, what our keys are
    "Axolotl, LoRA": (AXOLOTL + LORA + """
datasets:
  - {path: chats.jsonl, type: chat_template, roles_to_train: [assistant], train_on_eos: turn, split_thinking: true,
     weight: 2}
chat_template: qwen3
val_set_size: 0.1
sample_packing: true
evals_per_epoch: 4
saves_per_epoch: 1
warmup_ratio: 0.1
gradient_checkpointing: offload
fsdp_config: {fsdp_offload_params: true}
lora_rank_pattern: {q_proj: 4}
lora_alpha_pattern: {q_proj: 8}
peft: {loftq_config: {loftq_bits: 4}}
loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3
dataset_exact_deduplication: true
load_best_model_at_end: true
metric_for_best_model: eval_loss
ddp_timeout: 1800
dpo_label_smoothing: 0.0
optimizer: adamw_torch
""", "lora_sft", {
        "data.template": None, "data.thinking": "split", "data.train_on": ("assistant",), "data.deduplicate": True,
        "eval.every": 0.125, "checkpoint.every": 0.5, "schedule.warmup_steps": 0.1, "memory.recompute": "full",
        "memory.offload": True, "optim.offload": True, "lora.rank_pattern": {"q_proj": 4}, "optim.spike": "raise",
        "lora.alpha_pattern": {"q_proj": 8.0}, "lora.init": "loftq", "model.quantize": "nf4",
        "checkpoint.keep_best": True, "eval.metric": "eval_loss", "parallel.timeout_s": 1800.0,
        "data.sources.0.weight": 2.0,
    }),
    "Axolotl, every weight": (AXOLOTL + """
datasets:
  - {path: asked.jsonl, type: alpaca_w_system.load_open_orca}
  - {path: pieces.jsonl, type: input_output}
fp8: true
qat: {activation_dtype: int8, weight_dtype: int4, group_size: 32, fake_quant_after_n_steps: 5}
tiled_mlp: true
tiled_mlp_num_shards: 4
selective_checkpointing: true
activation_offloading: true
lr_groups: [{name: a, modules: [q_proj, k_proj], lr: 5e-5}]
embedding_lr: 1e-5
optimizer: muon
optim_args: {momentum: 0.9}
eval_max_new_tokens: 32
profiler_steps: 3
save_strategy: "no"
""", "full_sft", {
        "model.fp8": "tensorwise", "qat.scheme": "int8_int4", "qat.group": 32, "qat.after": 5, "memory.tiled_mlp": 64,
        "memory.recompute": "selective", "memory.offload": True, "optim.momentum": 0.9, "profile": True,
        "optim.groups.0.match": "q_proj|k_proj", "optim.groups.0.lr_scale": 0.5, "optim.groups.1.lr_scale": 0.1,
        "checkpoint.every": 0, "eval.max_new_tokens": 32, "data.sources.0.format": "qa",
        "data.sources.1.format": "segments",
    }),
    "Axolotl, EAFT": (AXOLOTL + LORA + """
datasets: [{path: chats.jsonl, type: chat_template}]
use_eaft: true
eaft_alpha: 2
eaft_k: 10
""", "lora_sft", {"loss.name": "eaft", "loss.eaft_alpha": 2.0, "loss.eaft_k": 10}),
    "Axolotl, pairs": (AXOLOTL + LORA + """
rl: dpo
datasets:
  - {path: talks.jsonl, type: chat_template.default, field_messages: talk, field_chosen: chosen,
     field_rejected: rejected, message_property_mappings: {role: from, content: value}}
  - {path: pairs.jsonl, type: chatml.intel}
dpo_loss_type: [sigmoid, sft]
dpo_loss_weights: [1.0, 0.5]
precompute_ref_log_probs: true
""", "dpo", {
        "dpo.loss": {"sigmoid": 1.0, "sft": 0.5}, "dpo.reference": "cache", "data.sources.0.format": "auto",
        "data.sources.0.columns": {"prompt": "talk"}, "lora.rank": 8,
    }),
    "Axolotl, ORPO": (AXOLOTL + """
rl: orpo
orpo_alpha: 0.2
datasets: [{path: pairs.jsonl, type: chat_template.argilla}]
""", "dpo", {"dpo.loss": {"sft": 1.0, "orpo": 0.2}, "lora": None}),
    "Axolotl, rated": (AXOLOTL + """
rl: kto
rl_beta: 0.2
kto_desirable_weight: 0.5
datasets: [{path: rated.jsonl, type: {field_prompt: asked, field_completion: said}}]
""", "dpo", {"dpo.loss": "kto", "dpo.beta": 0.2, "dpo.desirable": 0.5, "data.sources.0.format": "auto"}),
    "Axolotl, a reward model": (AXOLOTL + LORA + """
reward_model: true
datasets: [{path: pairs.jsonl, type: bradley_terry.chat_template}]
lora_modules_to_save: [embed_tokens]
center_rewards_coefficient: 0.02
""", "reward", {"reward.centre": 0.02, "lora.modules_to_save": ("embed_tokens", "score")}),
    "Axolotl, GRPO": (AXOLOTL.replace("micro_batch_size: 1", "micro_batch_size: 8") + """
rl: grpo
gradient_accumulation_steps: 2
trl: {beta: 0.001, num_generations: 4, max_completion_length: 64, reward_funcs: [math.exp], reward_weights: [0.5],
      loss_type: dr_grpo, scale_rewards: false, epsilon_high: 0.3, num_iterations: 1, vllm_gpu_memory_utilization: 0.5}
datasets: [{path: sums.jsonl, name: main}]
""", "grpo", {
        "algorithm.kl_coef": 0.001, "rollout.group": 4, "rollout.prompts": 4, "rollout.max_new_tokens": 64,
        "rewards.0.fn": "math:exp", "rewards.0.weight": 0.5, "algorithm.aggregation": "const", "lora": None,
        "algorithm.advantage": "center", "algorithm.clip_high": 0.3, "data.sources.0.subset": "main",
    }),
    "Axolotl, text": (AXOLOTL + """
pretraining_dataset: [{path: text.jsonl, type: pretrain}]
max_steps: 10
save_steps: 0.5
""", "pretrain", {"from_scratch": False, "checkpoint.every": 0.5, "stream.workers": 2}),
    "TRL, SFT": (TRL + """
dataset_name: chats.jsonl
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: all-linear
load_in_4bit: true
packing: true
assistant_only_loss: true
gradient_accumulation_steps: 4
learning_rate: 2.0e-4
num_train_epochs: 2
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 2.0e-5}
warmup_ratio: 0.03
logging_steps: 5
eval_strategy: epoch
dataset_test_split: "[:2]"
eos_token: <|im_end|>
report_to: none
output_dir: out
""", "lora_sft", {
        "lora.rank": 32, "lora.alpha": 16.0, "lora.dropout": 0.05, "lora.targets": "all-linear", "data.pack": True,
        "model.quantize": "nf4", "data.train_on": ("assistant",), "data.overlong": "truncate", "data.seq_len": 256,
        "batch.rows": 8, "schedule.min_ratio": 0.1, "schedule.warmup_steps": 0.03, "eval.every": 0.5, "dtype": "bf16",
        "data.eval.0.split": "[:2]", "seed": 42,
    }),
    "TRL, every weight": (TRL + """
datasets: [{path: chats.jsonl}, {path: json, data_files: plain.jsonl}]
loss_type: dft
max_steps: 20
save_steps: 0.25
activation_offloading: true
lora_r: 8
""", "full_sft", {
        "loss.name": "dft", "checkpoint.every": 0.25, "optim.lr": 2e-5, "schedule.name": "linear", "data.pack": False,
        "data.train_on": ("system", "user", "assistant", "tool"), "memory.offload": True, "schedule.warmup_steps": 0,
    }),
    "TRL, DPO": (TRL + """
dataset_name: pairs.jsonl
use_peft: true
beta: 0.3
label_smoothing: 0.1
precompute_ref_log_probs: true
""", "dpo", {
        "dpo.loss": "cdpo", "dpo.label_smoothing": 0.1, "dpo.beta": 0.3, "optim.lr": 1e-6, "epochs": 3.0,
        "lora.targets": ("q_proj", "v_proj"), "dpo.reference": "cache",
    }),
    "TRL, several losses": (TRL + """
dataset_name: pairs.jsonl
loss_type: [sigmoid, bco_pair, sft]
loss_weights: [0.8, 0.2, 1.0]
""", "dpo", {"dpo.loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, "lora": None}),
    "TRL, KTO": (TRL + """
dataset_name: answers.jsonl
desirable_weight: 1.0
undesirable_weight: 1.5
""", "dpo", {"dpo.loss": "kto", "dpo.undesirable": 1.5}),
    "TRL, reward": (TRL + """
dataset_name: pairs.jsonl
use_peft: true
lora_task_type: SEQ_CLS
learning_rate: 1e-4
""", "reward", {"reward.centre": 0.0, "lora.modules_to_save": ("score",)}),
    "TRL, GRPO": (TRL.replace("max_length: 256\n", "") + """
dataset_name: sums.jsonl
reward_funcs: [accuracy_reward, think_format_reward]
reward_weights: [1.0, 0.2]
num_generations: 4
max_completion_length: 32
max_prompt_length: 96
gradient_accumulation_steps: 4
steps_per_generation: 8
temperature: 0.7
top_p: 1.0
epsilon: 0.1
use_vllm: true
vllm_mode: colocate
vllm_gpu_memory_utilization: 0.3
max_steps: 10
""", "grpo", {
        "rollout.group": 4, "rollout.prompts": 4, "rollout.minibatches": 2, "steps": 5, "rollout.temperature": 0.7,
        "algorithm.clip_low": 0.1, "algorithm.clip_high": 0.1, "algorithm.aggregation": "token", "data.seq_len": 128,
        "rollout.engine": "vllm", "rollout.vllm_memory": 0.3, "rewards.0.fn": "maths", "rewards.1.weight": 0.2,
        "schedule.name": "linear", "lora": None,
    }),
    "LLaMA-Factory, SFT": (FACTORY + """
stage: sft
finetuning_type: lora
lora_target: all
dataset: plain
template: llama3
num_train_epochs: 4
save_strategy: epoch
eval_steps: 0.05
val_size: 0.1
warmup_steps: 0.1
bf16: true
deepspeed: examples/ds_z3_offload_config.json
use_unsloth_gc: true
""", "lora_sft", {
        "checkpoint.every": 0.25, "eval.every": 0.05, "schedule.warmup_steps": 0.1, "optim.offload": True,
        "memory.offload": True, "data.template": None,
    }),
    "LLaMA-Factory, text": (FACTORY + "stage: pt\nfinetuning_type: full\ndataset: text\n", "pretrain", {
        "from_scratch": False, "data.sources.0.format": "text"}),
    "LLaMA-Factory, text beside LoRA": (FACTORY + "stage: pt\ndataset: text\n", "lora_sft", {"data.overlong": "split"}),
    "LLaMA-Factory, a reward model": (FACTORY + "stage: rm\ndataset: pairs\nlora_target: all\n", "reward", {
        "reward.centre": 0.0, "data.sources.0.columns": {"prompt": "conversations"}}),
    "LLaMA-Factory, ORPO": (FACTORY + "stage: dpo\npref_loss: orpo\npref_beta: 0.3\ndataset: pairs\n", "dpo", {
        "dpo.loss": {"sft": 1.0, "orpo": 0.3}, "dpo.beta": None}),
    "LLaMA-Factory, rated": (FACTORY + "stage: kto\npref_beta: 0.2\ndataset: rated\n", "dpo", {"dpo.beta": 0.2}),
    "torchtune, LoRA": (TUNE + """
model: {_component_: torchtune.models.llama3_2.lora_llama3_2_1b, lora_attn_modules: [q_proj, output_proj],
        apply_lora_to_mlp: true, lora_rank: 8, lora_alpha: 16}
dataset: {_component_: torchtune.datasets.chat_dataset, source: json, data_files: chats.jsonl,
          conversation_column: messages, conversation_style: openai, packed: true}
fsdp_cpu_offload: true
enable_async_checkpointing: true
""", "lora_sft", {"optim.offload": True, "checkpoint.background": True, "lora.alpha": 16.0}),
    "torchtune, every weight": (TUNE + """
model: {_component_: torchtune.models.llama3_2.llama3_2_1b}
dataset:
  - {_component_: torchtune.datasets.alpaca_dataset, source: json, data_files: plain.jsonl}
  - {_component_: torchtune.datasets.text_completion_dataset, source: json, data_files: text.jsonl, column: text}
optimizer_in_bwd: true
clip_grad_norm: null
enable_fp8_training: true
fp8_recipe_name: rowwise_with_gw_hp
quantizer: {_component_: torchtune.training.quantization.Int4WeightOnlyQATQuantizer, groupsize: 64}
fake_quant_after_n_steps: 100
""", "full_sft", {
        "optim.in_backward": True, "model.fp8": "rowwise", "qat.scheme": "int4", "qat.group": 64, "qat.after": 100,
        "data.sources.1.format": "text",
    }),
    "torchtune, DPO": (TUNE + """
model: {_component_: torchtune.models.llama3_1.lora_llama3_1_8b, lora_attn_modules: [q_proj], lora_rank: 4}
dataset: {_component_: torchtune.datasets.preference_dataset, source: json, data_files: pairs.jsonl}
loss: {_component_: torchtune.rlhf.loss.DPOLoss, beta: 0.3, label_smoothing: 0}
""", "dpo", {"dpo.loss": "sigmoid", "dpo.beta": 0.3}),
    "torchtune, a teacher": (TUNE + """
model: {_component_: torchtune.models.qwen2.qwen2_0_5b}
teacher_model: {_component_: torchtune.models.qwen2.qwen2_1_5b}
teacher_checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: "ftlib:demo/model"}
kd_loss: {_component_: torchtune.modules.loss.ForwardKLWithChunkedOutputLoss}
kd_ratio: 0.7
dataset: {_component_: torchtune.datasets.alpaca_dataset, source: json, data_files: plain.jsonl}
""", "distill", {"distill.teacher": "ftlib:demo/model", "distill.hard": 0.3, "distill.divergence": "forward_kl"}),
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, row in FILES.items():
        lines = [json.dumps(row).replace("wo ", f"wo and {number} ") for number in range(8)]
        Path(name).write_text("\n".join(lines) + "\n")
    Path("dataset_info.json").write_text(json.dumps(INFO))
    return tmp_path


def value(cfg, key):
    for part in key.split("."):
        cfg = cfg[int(part)] if part.isdigit() else cfg[part] if isinstance(cfg, dict) else getattr(cfg, part)
    return cfg


@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_passes_every_check_of_its_recipe(name, here, capsys):
    text, recipe, expected = KINDS[name]
    cfg, out = imported(text, capsys)
    assert out.startswith(f"{name.split(',')[0]} -> ") and f"for recipes/{recipe}.py" in out
    assert not lost_in(out), out
    assert {key: value(cfg, key) for key in expected} == expected
    own = ["rollout.engine=native", "~rollout.vllm_memory", "rewards=[{fn: exact}]"] if recipe == "grpo" else []
    code = cli.main(["validate", str(ROOT / f"recipes/{recipe}.py"), "--config", "deep/my.yaml", *MACHINE, *own])
    assert code == 0, capsys.readouterr().err
