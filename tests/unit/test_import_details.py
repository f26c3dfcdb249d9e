"""What several keys of another library decide together, and what is said where a value has no equivalent."""

import json
from pathlib import Path

import pytest
from test_import import here as here
from test_import import imported, lost_in

from ftlib import cli
from ftlib.cli import import_
from ftlib.config.imports import LIBRARIES, trainer
from ftlib.config.imports.rules import CONSTANTS, convert
from ftlib.errors import UserError
from ftlib.sections.methods import METHODS

PREFERENCES = {
    "Axolotl": (
        "base_model: a/b\nrl: simpo\nrl_beta: 2.5\nsimpo_gamma: 1.2\ndatasets: [{path: rows.jsonl}]\nadapter: lora\n"
        "lora_r: 4\noptimizer: lion_pytorch\n",
        {"loss": "simpo", "beta": 2.5, "gamma": 1.2},
    ),
    "Axolotl, every weight": ("base_model: a/b\nrl: ipo\ndatasets: [{path: rows.jsonl}]\n", {"loss": "ipo"}),
    "LLaMA-Factory": (
        "model_name_or_path: a/b\nstage: dpo\npref_loss: orpo\npref_ftx: 0.5\ndataset: pairs\ndataset_dir: sets\n"
        "finetuning_type: lora\nlora_rank: 4\noptim: adamw_torch\nreport_to: none\n",
        {"loss": {"sft": 1.5, "orpo": 0.1}},
    ),
    "LLaMA-Factory, rated": (
        "model_name_or_path: a/b\nstage: kto\npref_beta: 0.2\nkto_rejected_weight: 1.5\ndataset: pairs\n"
        "dataset_dir: sets\n",
        {"loss": "kto", "beta": 0.2, "undesirable": 1.5},
    ),
    "torchtune": (
        "model: {_component_: torchtune.models.llama3_1.lora_llama3_1_8b, lora_rank: 4}\n"
        "checkpointer: {checkpoint_dir: a/b}\nloss: {_component_: torchtune.rlhf.loss.DPOLoss, beta: 0.3}\n"
        "dataset: {_component_: torchtune.datasets.preference_dataset, source: json, data_files: rows.jsonl}\n"
        "metric_logger: {_component_: torchtune.training.metric_logging.WandBLogger, project: mine}\n",
        {"loss": "sigmoid", "beta": 0.3},
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name, here, capsys):
    text, constants = PREFERENCES[name]
    Path("sets/dataset_info.json").write_text(
        json.dumps({"pairs": {"file_name": "chats.json", "ranking": True, "columns": {"chosen": "good"}}})
    )
    cfg, out = imported(text, capsys)
    assert "for recipes/dpo.py" in out and not lost_in(out)
    assert {key: getattr(cfg.dpo, key) for key in constants} == constants
    assert (cfg.lora is None) == (name == "Axolotl, every weight") and (cfg.lora is None or cfg.lora.rank in (4, 8))
    assert cfg.data.sources[0].format == "auto"
    if name == "Axolotl":
        assert cfg.optim.name == "lion"
    if name == "torchtune":
        assert (cfg.log.to, cfg.log.project) == (("console", "wandb"), "mine")
    if name == "LLaMA-Factory":
        assert cfg.data.sources[0].columns == {"chosen": "good"}


START = {
    "Axolotl": {"base_model": "a/b", "adapter": "lora", "datasets": [{"path": "a/c"}], "val_set_size": 0.1},
    "TRL": {"model_name_or_path": "a/b", "dataset_name": "a/c", "test_split_size": 0.1},
    "LLaMA-Factory": {"model_name_or_path": "a/b", "val_size": 0.1},
    "torchtune": {"model._component_": "torchtune.models.llama3_2.llama3_2_1b", "checkpointer.checkpoint_dir": "a/b"},
}


def made_of(library, **keys):
    """What is made of the least config of a library and these keys."""
    return convert(LIBRARIES[library], START[library] | keys, import_._known)


TRAINERS = [("Axolotl", "num_epochs"), ("TRL", "num_train_epochs"), ("LLaMA-Factory", "num_train_epochs")]


@pytest.mark.parametrize(("library", "epochs"), TRAINERS)
def test_a_share_of_the_run_stays_one(library, epochs):
    made = made_of(library, eval_steps=0.05, save_steps=0.25, warmup_steps=0.1)
    assert [made.get(f"{key}") for key in ("eval.every", "checkpoint.every")] == [0.05, 0.25]
    assert made.get("schedule.warmup_steps") == 0.1
    assert made_of(library, warmup_ratio=0.03).get("schedule.warmup_steps") == 0.03
    assert made_of(library, warmup_ratio=0.03, warmup_steps=7).get("schedule.warmup_steps") == 7  # as there
    made = made_of(library, eval_steps=20, save_steps=50.0)
    assert (made.get("eval.every"), made.get("checkpoint.every")) == (20, 50)
    made = made_of(library, eval_steps=1.5, logging_steps=0.1)
    assert {"eval_steps", "logging_steps"} <= dict(made.lost).keys() and made.get("eval.every") is None


@pytest.mark.parametrize(("library", "epochs"), TRAINERS)
def test_once_an_epoch_is_a_share_where_epochs_are_known(library, epochs):
    each = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    made = made_of(library, **each, **{epochs: 4})
    assert (made.get("eval.every"), made.get("checkpoint.every")) == (0.25, 0.25)
    once = made_of(library, **each, **{epochs: 1})
    assert once.get("eval.every") is None and once.get("checkpoint.every") is None and not once.lost
    assert sum("is evaluated, and saved in final/, anyway" in note for note in once.notes) == 2
    assert {"eval_strategy", "save_strategy"} == dict(made_of(library, **each, max_steps=100).lost).keys()
    never = made_of(library, eval_strategy="no", save_strategy="no")
    assert never.get("eval.every") is None and never.get("checkpoint.every") == 0
    assert made_of(library, save_strategy="best", eval_steps=10).get("checkpoint.keep_best") is True


def test_what_looks_at_evaluations_or_held_out_rows_that_are_not_there_is_left_out():
    best = {"early_stopping_patience": 3, "load_best_model_at_end": True, "num_epochs": 1}
    made = made_of("Axolotl", **best, eval_strategy="epoch")
    assert made.get("eval") is None and made.get("checkpoint") is None
    assert "eval.patience, checkpoint.keep_best: left out, since there is no eval.every" in made.notes
    made = made_of("Axolotl", **best, eval_steps=0.1, val_set_size=0.0)
    assert made.get("eval") is None and made.get("checkpoint") is None
    assert any(note.startswith("eval.every, eval.patience") and note.endswith("data.eval") for note in made.notes)


@pytest.mark.parametrize("offload", [
    {"deepspeed": "deepspeed_configs/zero3_bf16_cpuoffload_all.json"}, {"fsdp": ["full_shard", "offload"]},
    {"deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}},
    {"fsdp_config": {"fsdp_offload_params": True}}, {"fsdp_config": {"offload_params": True}},
])  # fmt: skip
def test_what_other_libraries_offload_is_the_state_of_the_optimizer_here(offload):
    made = made_of("Axolotl", **offload)
    assert made.get("optim.offload") is True and any("weights stay on the GPU" in note for note in made.notes)
    refused = made_of("Axolotl", optimizer="muon", **offload)
    assert refused.get("optim.offload") is None and next(iter(offload)) in dict(refused.lost)


@pytest.mark.parametrize("kept", [
    {"deepspeed": "deepspeed_configs/zero2.json"}, {"fsdp_config": {"fsdp_offload_params": False}},
    {"deepspeed": {"zero_optimization": {"offload_param": {"device": "none"}}}},
])  # fmt: skip
def test_nothing_is_offloaded_that_is_not_there(kept):
    assert made_of("Axolotl", **kept).get("optim.offload") is None


def test_sections_that_the_recipe_does_not_have_leave_nothing_behind():
    made = made_of("Axolotl", unfrozen_parameters=["^lm_head"], lisa_n_layers=2)
    assert not {"train", "lisa", "dpo"} & made.config.keys()
    assert {"unfrozen_parameters", "lisa_n_layers"} == dict(made.lost).keys()
    full = made_of("Axolotl", adapter=None, lora_r=8, lora_rank_pattern={"layers.0.q_proj": 4}, load_in_4bit=True)
    assert "lora" not in full.config and {"lora_r", "lora_rank_pattern", "model.quantize"} == dict(full.lost).keys()
    assert full.get("model") == {"path": "a/b"}


@pytest.mark.parametrize(("library", "asked"), [
    ("Axolotl", {"rl": "ppo"}), ("LLaMA-Factory", {"stage": "ppo"}),
    ("torchtune", {"loss._component_": "torchtune.rlhf.loss.PPOLoss"}),
])  # fmt: skip
def test_a_training_that_is_not_here_is_refused_and_the_nearest_named(library, asked):
    with pytest.raises(UserError) as error:
        made_of(library, **asked)
    assert "is a kind of training that is not here" in str(error.value) and "recipes/grpo.py" in error.value.fix


def test_trl_is_told_from_llama_factory(here, capsys):
    text = "model_name_or_path: a/b\ndataset_name: trl-lib/Capybara\npacking: true\n"
    other = "model_name_or_path: a/b\nstage: sft\ndataset: identity\npacking: true\n"
    assert imported(text, capsys)[1].startswith("TRL -> ")
    assert imported(other, capsys)[1].startswith("LLaMA-Factory -> ")
    Path("their.yaml").write_text(text)
    assert cli.main(["import", "their.yaml", "--from", "LLaMA-Factory", "--out", "other.yaml"]) == 0


@pytest.mark.parametrize(("keys", "recipe"), [
    ({}, "full_sft"), ({"use_peft": True}, "lora_sft"), ({"beta": 0.1}, "dpo"), ({"loss_type": "ipo"}, "dpo"),
    ({"loss_type": "dft"}, "full_sft"), ({"loss_type": "kto"}, "dpo"), ({"lora_task_type": "SEQ_CLS"}, "reward"),
    ({"center_rewards_coefficient": 0.01}, "reward"), ({"num_generations": 8, "beta": 0.1}, "grpo"),
    ({"loss_type": "dr_grpo"}, "grpo"),
])  # fmt: skip
def test_the_keys_of_trl_tell_its_trainer(keys, recipe):
    assert made_of("TRL", **keys).recipe == recipe


def test_trl_s_policy_losses():
    made = made_of("TRL", num_generations=4, loss_type="cispo", epsilon_high=5.0)
    assert made.get("algorithm") == {"aggregation": "token", "loss": "cispo", "ratio_cap": 5.0}
    made = made_of("TRL", num_generations=4, loss_type="grpo", importance_sampling_level="sequence", top_p=0.9, top_k=0)
    assert made.get("algorithm") == {"ratio": "sequence", "aggregation": "seq", "clip_high": 0.2}
    assert dict(made.lost).keys() == {"top_p"}
    made = made_of("TRL", reward_funcs=["mine", "lib.rewards.right"], use_peft=True, lora_dropout=0.1)
    assert made.get("rewards") == [{"fn": "lib.rewards:right"}] and "./file.py:mine" in dict(made.lost)["reward_funcs"]
    assert made.get("lora.dropout") is None and any(note.startswith("lora.dropout") for note in made.notes)


@pytest.mark.parametrize(("builder", "source"), [
    ("alpaca_cleaned_dataset", {"path": "yahma/alpaca-cleaned", "format": "alpaca"}),
    ("slimorca_dataset", {"path": "Open-Orca/SlimOrca-Dedup", "format": "messages"}),
    ("samsum_dataset", {"path": "Samsung/samsum", "format": "qa",
                        "columns": {"question": "dialogue", "answer": "summary"}}),
    ("cnn_dailymail_articles_dataset", {"path": "ccdv/cnn_dailymail", "format": "text", "subset": "3.0.0",
                                        "columns": {"text": "article"}}),
    ("hh_rlhf_helpful_dataset", {"path": "RLHFlow/HH-RLHF-Helpful-standard"}),
])  # fmt: skip
def test_builders_of_torchtune_name_their_own_data(builder, source):
    made = made_of("torchtune", **{"dataset._component_": f"torchtune.datasets.{builder}"})
    assert made.get("data.sources") == [source] and not made.lost


def test_a_builder_without_data_is_named_and_no_source_is_made_up():
    made = made_of("torchtune", **{"dataset._component_": "mine.my_dataset"})
    assert made.get("data.sources") is None and "write data.sources" in dict(made.lost)["dataset._component_"]
    assert "no rows are named: write data.sources" in made.notes
    made = made_of("torchtune", **{
        "dataset._component_": "torchtune.datasets.instruct_dataset", "dataset.source": "a/c",
        "dataset.column_map": {"input": "q", "output": "a"}, "model.apply_lora_to_output": True,
        "model._component_": "lora_x", "model.lora_attn_modules": ["q_proj"],
    })  # fmt: skip
    assert made.get("data.sources") == [{"path": "a/c", "format": "qa", "columns": {"question": "q", "answer": "a"}}]
    assert made.get("lora.targets") == ["q_proj"] and "modules_to_save" in dict(made.lost)["model.apply_lora_to_output"]


def test_in_backward_is_for_one_forward_a_step():
    made = made_of("torchtune", optimizer_in_bwd=True, batch_size=2, gradient_accumulation_steps=4)
    assert made.get("optim.in_backward") is None and "optimizer_in_bwd" in dict(made.lost)


def test_entries_of_axolotl_that_differ_where_all_rows_are_alike_here():
    entries = [{"path": "a/c", "roles_to_train": ["gpt"]}, {"path": "a/d", "roles_to_train": ["human"]}]
    made = made_of("Axolotl", datasets=entries)
    assert made.get("data.train_on") is None and "datasets[].roles_to_train" in dict(made.lost)
    made = made_of("Axolotl", datasets=[{"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "type": "alpaca"}])
    assert [source["path"] for source in made.get("data.sources")] == ["a.jsonl", "b.jsonl"] and not made.lost


def test_constants_of_losses_are_those_that_the_losses_read():
    names = [*trainer.PAIR_LOSSES, "aot_unpaired", "cdpo", "simpo", "orpo", "kto"]
    known = {name: set(METHODS[name].constants) - {"average"} for name in names}
    assert {name: set(CONSTANTS.get(name, ("beta",))) for name in names} == known
    made = made_of("Axolotl", rl="dpo", dpo_loss_type=["hinge"], rl_beta=0.2, dpo_label_smoothing=0.1, rpo_alpha=0.5)
    assert made.get("dpo") == {"loss": "hinge", "beta": 0.2, "sft": 0.5} and "dpo.label_smoothing" in dict(made.lost)
    made = made_of("Axolotl", rl="dpo", dpo_loss_type="theirs")
    assert made.get("dpo.loss") == "sigmoid" and "dpo_loss_type" in dict(made.lost)


def test_sections_of_axolotl_s_trl_are_read_key_by_key():
    made = made_of("Axolotl", rl="grpo", trl={"num_generations": 4, "vllm_mode": "server", "novel": 1})
    assert made.get("rollout.group") == 4 and dict(made.lost) == {"trl.novel": "not a key that is known here"}


def test_only_a_template_that_reads_it_is_told_whether_to_think():
    thinking = made_of("LLaMA-Factory", template="qwen3", enable_thinking=False)
    assert thinking.get("data.template_args") == {"enable_thinking": False}
    assert made_of("LLaMA-Factory", template="llama3", enable_thinking=False).get("data.template_args") is None


@pytest.mark.parametrize(("library", "keys"), [
    ("Axolotl", {"micro_batch_size": "x"}), ("Axolotl", {"datasets": [1]}), ("TRL", {"num_generations": 0}),
    ("LLaMA-Factory", {"warmup_steps": [1]}), ("torchtune", {"batch_size": {}, "dataset": ["x"]}),
])  # fmt: skip
def test_a_value_that_the_other_library_would_refuse_is_no_crash(library, keys):
    with pytest.raises(UserError, match=f"a value is of no kind that {library} takes"):
        made_of(library, **keys)
