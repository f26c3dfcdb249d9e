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

    Windows shrink to 8 and the range a rope was made for to 16, so that short sequences go past both.
    """
    config = published(name)
    heads, kv = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    kv_heads = {True: 4, False: 2}[kv == heads] if kv > 1 else 1
    config |= {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": kv_heads, "vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "max_position_embeddings": 64, "dtype": "float32",
    }
    config.pop("torch_dtype", None)
    if "head_dim" in config:
        config["head_dim"] = 24  # 4 x 24 is not the hidden size: an explicit head_dim must be obeyed
    if config.get("sliding_window"):
        config["sliding_window"] = 8
    if config.get("max_window_layers"):
        config["max_window_layers"] = 1
    scaling = config.get("rope_scaling")
    if scaling and "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] = 16
    return config | changes


def reference(config: dict, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' model of a config, all weights (norms and biases too) drawn at random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = config["model_type"]
    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    torch.manual_seed(seed)
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **fields), attn_implementation="eager", dtype=dtype
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            parameter.copy_(center + torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.08))
    theirs.tie_weights()
    return theirs.eval()


@torch.no_grad()
def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
