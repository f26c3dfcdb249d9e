"""What config.json may say: keys that no one reads, values of the wrong kind, and messages that name the file."""

import json

import pytest
import torch
from parity.shrink import CONFIGS, reference, shrunk
from safetensors.torch import load_file, save_file

from ftlib import models
from ftlib.errors import UserError
from ftlib.models import families, load

MODELS = sorted(file.stem for file in CONFIGS.glob("*.json"))


def refused(folder, name: str, **changes: object) -> str:
    """The one message that a changed config.json gives when its model is planned."""
    config = shrunk(name) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "left out"}))
    with pytest.raises(UserError) as error:
        load.build(folder, torch.bfloat16)
    assert error.value.where == str(folder / "config.json") and error.value.what
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3-8b", {"is_causal": False}),
        ("llama-3.1-8b", {"use_qk_norm": True}),
        ("qwen3-30b-a3b", {"use_qk_norm": False}),
        ("qwen3-30b-a3b", {"scoring_func": "sigmoid"}),
        ("llama-3.1-8b", {"use_bidirectional_attention": True}),
        ("llama-3.1-8b", {"attn_logit_softcapping": 50.0}),
        ("qwen3-8b", {"query_pre_attn_scalar": 99}),
        ("gpt-oss-20b", {"final_logit_softcapping": 30.0}),
        ("mixtral-8x7b", {"residual_multiplier": 0.2}),
        ("qwen3-8b", {"wobble": 3}),
        ("gemma-2-2b", {"wobble": "sideways"}),
        ("qwen3-8b", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}}),
        ("qwen3-8b", {"rope_scaling": {"factor": 2.0}}),
        ("seed-oss-36b", {"residual_dropout": 0.2}),
        ("hunyuan-1.8b", {"use_qk_norm": False}),
        ("hunyuan-1.8b", {"use_cla": True}),
        ("exaone-4.0-32b", {"reorder_qk_norm": False}),
        ("glm-4.5-air", {"scoring_func": "softmax"}),
        ("qwen1.5-moe-a2.7b", {"use_sliding_window": True}),
        ("olmoe-1b-7b", {"clip_qkv": 8.0}),
    ],
)
def test_a_key_that_no_one_reads_is_refused(tmp_path, name, changes):
    key = next(iter(changes))
    said = refused(tmp_path, name, **changes)
    assert key in said or "no setting" in said


def test_keys_that_change_nothing_pass(tmp_path):
    more = {
        "_name_or_path": "x", "architectures": ["Qwen3ForCausalLM"], "transformers_version": "5.0.0",
        "mask_token_id": 7, "auto_map": {"AutoModel": "x.Y"}, "do_sample": True, "temperature": 0.6,
        "unsloth_fixed": True, "is_causal": True, "wobble": None, "wobbles": False, "pruned_heads": {},
        "image_token_index": 3,
    }  # fmt: skip
    assert families.read(shrunk("qwen3-8b") | more)[0].layers
    assert families.read(shrunk("qwen3-30b-a3b") | {"use_qk_norm": True, "qkv_bias": False})[0].layers


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_writes_is_read(name):
    from transformers import AutoConfig

    config = shrunk(name)
    theirs = AutoConfig.for_model(**config)
    written = json.loads(theirs.to_json_string(use_diff=False))
    assert families.read(written)[0] == families.read(config)[0]


def as_written(config: dict, whole: bool = True) -> dict:
    """A config.json as transformers writes it: every key, or without those it takes for granted."""
    from transformers import AutoConfig

    return json.loads(AutoConfig.for_model(**config).to_json_string(use_diff=not whole))


@pytest.mark.parametrize("model_type", sorted(families.FAMILIES))
def test_what_transformers_writes_of_its_defaults_is_read(model_type):
    """Keys that a newer version adds have a value that we know, or this fails under that version."""
    whole, short = (as_written({"model_type": model_type}, each) for each in (True, False))
    assert families.read(whole) == families.read(short)


@pytest.mark.parametrize("null", [False, True], ids=["left out", "null"])
@pytest.mark.parametrize("model_type", sorted(families.FAMILIES))
def test_a_key_left_out_or_null_means_what_it_means_to_transformers(model_type, null):
    """Or it is refused. Sizes are others than the defaults, so that a default shows."""
    name = next(name for name in MODELS if shrunk(name)["model_type"] == model_type)
    whole = as_written(shrunk(name))
    for key in whole.keys() - {"model_type", "max_position_embeddings"}:
        config = {k: v for k, v in whole.items() if k != key} | ({key: None} if null else {})
        try:
            ours = families.read(config)
        except UserError:
            continue
        try:
            theirs = as_written(config)
        except Exception:  # it has no default that fits
            continue
        assert ours == families.read(theirs), key


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen3-30b-a3b", {"num_experts_per_tok": 13}, "num_experts_per_tok is 13, and the model has 12 experts"),
        ("mixtral-8x7b", {"num_experts_per_tok": 13}, "num_experts_per_tok is 13"),
        ("gpt-oss-20b", {"num_experts_per_tok": 13}, "num_experts_per_tok is 13"),
        ("qwen3-8b", {"rms_norm_eps": None}, "rms_norm_eps must be a positive number, and it is None"),
        ("qwen3-8b", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ("qwen3-8b", {"attention_bias": "false"}, "attention_bias must be true or false"),
        ("qwen3-8b", {"num_hidden_layers": True}, "num_hidden_layers must be a positive whole number"),
        ("qwen3-8b", {"hidden_size": "64"}, "hidden_size must be a positive whole number, and it is '64'"),
        ("qwen3-8b", {"hidden_size": "left out"}, "hidden_size is missing"),
        ("qwen3-8b", {"rope_theta": "1e6"}, "rope_theta"),
        ("qwen3-8b", {"max_position_embeddings": "64"}, "max_position_embeddings"),
        ("granite-3.3-8b", {"residual_multiplier": "a"}, "residual_multiplier must be a positive number"),
        ("granite-3.3-8b", {"logits_scaling": 0}, "logits_scaling"),
        ("granite-3.3-8b", {"embedding_multiplier": None}, "embedding_multiplier"),
        ("gemma-2-2b", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar"),
        ("gemma-2-2b", {"attn_logit_softcapping": True}, "attn_logit_softcapping"),
        ("mistral-7b-v0.1", {"sliding_window": -1}, "sliding_window must be a positive whole number, and it is -1"),
        ("gemma-2-2b", {"sliding_window": 0}, "sliding_window"),
        ("smollm3-3b", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries, and num_hidden_layers is 4"),
        ("smollm3-3b", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ("qwen3-8b sliding", {"layer_types": ["chunked_attention"] * 3}, "layer type 'chunked_attention'"),
        ("gemma-2-2b", {"layer_types": ["chunked_attention"] * 3}, "layer type 'chunked_attention'"),
        ("qwen3-8b", {"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' needs 'factor'"),
        ("qwen3-8b", {"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs 'factor'"),
        ("qwen3-8b", {"rope_scaling": {"rope_type": "linear", "factor": None}}, "factor of rope type 'linear'"),
        ("qwen3-8b", {"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor of rope type 'yarn'"),
        ("qwen3-8b", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "needs 'short_factor'"),
        ("qwen3-8b", {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, "12 entries"),
        ("qwen3-8b", {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "needs 'low_freq_factor'"),
        ("qwen3-8b", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ("qwen3-8b", {"rope_scaling": {"rope_type": "wobbly"}}, "rope type 'wobbly' is not supported"),
        ("glm-4-9b", {"partial_rotary_factor": 2.0}, "partial_rotary_factor is 2.0"),
        ("qwen3-8b", {"hidden_act": "relu9"}, "activation 'relu9' is not supported"),
        ("gpt-oss-20b", {"rope_scaling": None}, "rope_parameters or rope_scaling is missing"),
        ("gpt-oss-20b", {"swiglu_limit": 5.0}, "swiglu_limit=5.0 is not supported"),
        ("gpt-oss-20b", {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0 is not supported"),
        ("olmo-3-7b", {"rope_parameters": {"full_attention": {}, "wobbly": {}}}, "no place for 'wobbly'"),
        ("olmo-3-7b", {"rope_parameters": {"full_attention": {}}}, "rope_parameters speaks of full_attention alone"),
        ("qwen3-8b", {"rope_scaling": {"rope_type": ["yarn"]}}, "is not supported"),
        ("hunyuan-1.8b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ("hunyuan-1.8b", {"rope_scaling": {"type": "dynamic", "alpha": "9"}}, "alpha and rope_theta must be positive"),
        ("hunyuan-1.8b", {"rope_scaling": {"type": "dynamic", "alpha": 9, "wobble": 1}}, "no setting 'wobble'"),
        ("qwen3-8b", {"rope_scaling": {"rope_type": "dynamic", "alpha": 9.0}}, "rope type 'dynamic' is not supported"),
        ("ernie-4.5-0.3b", {"use_bias": "no"}, "use_bias must be true or false"),
        ("exaone-4.0-32b", {"layer_types": None}, "sliding_window_pattern must be a positive whole number"),
        ("exaone-4.0-32b", {"sliding_window": None}, "sliding_window is missing"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_one_message(tmp_path, name, changes, words):
    plain, *sliding = name.split()
    if sliding:
        changes = {"use_sliding_window": True, "sliding_window": 8} | changes
    said = refused(tmp_path, plain, **changes)
    assert words in said and "fix: " in said


def test_no_window_and_as_many_keys_as_queries_are_said_by_null():
    nemo = shrunk("mistral-nemo-12b") | {"num_key_value_heads": None}
    assert nemo["sliding_window"] is None
    mixer = families.read(nemo)[0].layers[0].mixer
    assert (mixer.window, mixer.kv_heads) == (None, 4)
    left_out = {k: v for k, v in nemo.items() if k not in ("sliding_window", "num_key_value_heads")}
    mixer = families.read(left_out | {"num_attention_heads": 8})[0].layers[0].mixer
    assert (mixer.window, mixer.kv_heads) == (4096, 8)


@pytest.mark.parametrize(("name", "key"), [("olmo-3-7b", "rope_theta"), ("gemma-3-1b", "rope_local_base_freq")])
def test_a_null_base_is_the_default(name, key):
    config = shrunk(name)
    left_out = {k: v for k, v in config.items() if k != key}
    assert families.read(config | {key: None}) == families.read(left_out)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """(folder of a small tied model, its tensors)."""
    folder = tmp_path_factory.mktemp("tied")
    reference(shrunk("qwen3-0.6b")).save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


def with_head(tied, folder, change: float) -> None:
    source, tensors = tied
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += change
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())


def test_a_head_of_its_own_is_not_tied_away(tied, tmp_path):
    with_head(tied, tmp_path, 1e-3)
    with pytest.raises(UserError) as error:
        models.from_pretrained(tmp_path)
    said = str(error.value)
    assert "tie_word_embeddings" in said and "lm_head.weight" in said and "model.embed_tokens.weight" in said
    assert error.value.where == str(tmp_path / "config.json")


def test_the_same_head_twice_is_fine(tied, tmp_path):
    with_head(tied, tmp_path, 0.0)
    ours = models.from_pretrained(tmp_path)
    assert torch.equal(ours.lm_head.weight, tied[1]["model.embed_tokens.weight"])


def test_a_flag_that_asked_for_missing_biases_is_named(tied, tmp_path):
    _, tensors = tied
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(shrunk("qwen3-0.6b") | {"attention_bias": True}))
    with pytest.raises(UserError, match=r"lacks 12 tensors") as error:
        models.from_pretrained(tmp_path)
    assert "attention_bias" in error.value.fix and error.value.where == str(tmp_path)
