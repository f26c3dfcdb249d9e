"""Published config.json files shrunk in sizes only, and the transformers model of each with every weight random."""

import json
from pathlib import Path

import torch
from torch import nn

CONFIGS = Path(__file__).parent / "configs"


def published(name: str) -> dict:
    """A config.json as published (kept in `configs/`)."""
    return json.loads((CONFIGS / f"{name}.json").read_text())


def shrunk(name: str, **changes: object) -> dict:
    """The published config with small sizes; every flag, ratio and rope setting kept.

    Windows shrink to 8 and the range a rope was made for to 16, so that short sequences go past both. Of a vision
    model, the language model's part.
    """
    config = published(name)
    if "text_config" in config:
        tied = config.get("tie_word_embeddings")
        config = config["text_config"] | ({} if tied is None else {"tie_word_embeddings": tied})
    heads = config.get("num_attention_heads", 2)
    kv = config.get("num_key_value_heads", heads if "num_attention_heads" in config else 1)
    config |= {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": (4 if kv == heads else 2) if kv > 1 else 1, "vocab_size": 160, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64, "dtype": "float32",
    }
    for key in ("torch_dtype", "quantization_config"):
        config.pop(key, None)
    if "head_dim" in config or config["model_type"] in ("gemma2", "gemma3_text"):
        config["head_dim"] = 24  # 4 x 24 is not the hidden size: an explicit head_dim must be obeyed
    _layers(config)
    _experts(config)
    _rope(config)
    return config | changes


def _layers(config: dict) -> None:
    """Three layers, or as many as show every kind of layer."""
    count = {"gemma3_text": 7, "smollm3": 4, "olmo3": 4, "gpt_oss": 2, "exaone4": 4}.get(config["model_type"], 3)
    config["num_hidden_layers"] = count
    for key in ("layer_types", "no_rope_layers"):
        if config.get(key):
            config[key] = config[key][:count]
    if config.get("sliding_window"):
        config["sliding_window"] = 8
    if config.get("max_window_layers"):
        config["max_window_layers"] = 1


def _experts(config: dict) -> None:
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if key in config:
            config[key] = 12
    for key in ("num_experts_per_tok", "experts_per_token"):
        if key in config:
            config[key] = min(config[key], 4)
    if "moe_intermediate_size" in config:
        config["moe_intermediate_size"] = 48
    if "shared_expert_intermediate_size" in config:
        config["shared_expert_intermediate_size"] = 80


def _rope(config: dict) -> None:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if "original_max_position_embeddings" in config:
        config["original_max_position_embeddings"] = 16
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] = 16
    for key in ("short_factor", "long_factor"):
        if key in scaling:
            width = config["hidden_size"] // config["num_attention_heads"]
            scaling[key] = scaling[key][-int(width * config.get("partial_rotary_factor", 1.0)) // 2 :]
    if "short_factor" in scaling:  # ones as published would not tell whether they are read
        scaling["short_factor"] = [1.0 + i / 8 for i in range(len(scaling["short_factor"]))]


def reference(config: dict, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' model of a config, all weights (norms and biases too) drawn at random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = config["model_type"]
    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    torch.manual_seed(seed)
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **json.loads(json.dumps(fields))), attn_implementation="eager", dtype=dtype
    )
    theirs.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            parameter.copy_(center + torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.08))
        for module in theirs.modules():
            if type(module).__name__.endswith(("TopKRouter", "TopkRouter")):
                skew(module)
    theirs.tie_weights()
    return theirs.eval()


def skew(router: nn.Module) -> None:
    """Send tokens to the first 2 * top_k experts, unevenly, and none to the others.

    The first come in pairs of opposite rows, so that of each pair one always scores above the others' zero.
    """
    k, weight = router.top_k, router.weight
    weight[1 : 2 * k : 2] = -weight[0 : 2 * k : 2]
    weight[: 2 * k] += 0.01 * torch.arange(2 * k)[:, None] * weight[: 2 * k].sign()
    weight[2 * k :] = 0
    if getattr(router, "bias", None) is not None:
        router.bias.zero_()
    if (correction := getattr(router, "e_score_correction_bias", None)) is not None:
        correction.copy_(0.1 * torch.randn_like(correction))  # scores go from 0 to 1: both decide who is chosen
        correction[2 * k :] = -1


@torch.no_grad()
def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
