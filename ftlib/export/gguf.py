"""A model folder -> one GGUF file, as llama.cpp and Ollama read it: llama, mistral, qwen2 and qwen3."""

import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlib import tokenizers
from ftlib.errors import UserError
from ftlib.export import gguf_format, gguf_tokenizer
from ftlib.export.gguf_format import Entry, Unsigned
from ftlib.layers.rope import LinearScaling, Llama3Scaling, Scaling, YarnScaling
from ftlib.models import LanguageModel, load
from ftlib.models.keys import plan
from ftlib.models.remote import size
from ftlib.models.weights import Weights

# model_type -> GGUF's name of the architecture, and whether its rope turns neighbours instead of halves.
ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
}  # fmt: skip
THEIRS = "llama.cpp's own converter may know it: python convert_hf_to_gguf.py"
FILE_TYPE = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
NAMES = {
    r"model\.embed_tokens": "token_embd", r"model\.norm": "output_norm", r"lm_head": "output",
    r"model\.layers\.(\d+)\.input_layernorm": r"blk.\1.attn_norm",
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"blk.\1.ffn_norm",
    r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj": r"blk.\1.attn_\2",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": r"blk.\1.attn_output",
    r"model\.layers\.(\d+)\.self_attn\.([qk])_norm": r"blk.\1.attn_\2_norm",
    r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj": r"blk.\1.ffn_\2",
}  # fmt: skip


def export(folder: Path, out: Path, stored: str = "f16", pre: str | None = None) -> int:
    """Write the model in `folder` to `out`; matrices are stored as `stored`, vectors in float32. Bytes written.

    UserError for what GGUF has no place for; `out` appears whole or not at all.
    """
    model = load.build(folder, torch.float32)
    weights = load.check_weights(model, folder)
    metadata = _metadata(model, folder, stored)
    metadata |= gguf_tokenizer.metadata(tokenizers.from_pretrained(folder), model.arch.vocab, pre)
    entries = _entries(model, weights, stored)
    total = sum(entry.size for entry in entries)
    out.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out.parent).free < 1.01 * total + (64 << 20):
        raise UserError(f"no room for {out}: it will be {size(total)}", where=str(out.parent), fix="free some space")
    partial = out.with_name(f".{out.name}.part")
    try:
        with partial.open("wb") as file:
            gguf_format.write(file, metadata, entries)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return out.stat().st_size


def _metadata(model: LanguageModel, folder: Path, stored: str) -> dict[str, Any]:
    config, arch = model.config, model.arch
    if config["model_type"] not in ARCHITECTURES:
        fix = f"exported: {', '.join(ARCHITECTURES)}; {THEIRS} {folder}"
        raise UserError(f"model_type {config['model_type']!r} is not exported to GGUF", where=str(folder), fix=fix)
    name, _ = ARCHITECTURES[config["model_type"]]
    attention, ffn = arch.layers[0].mixer, arch.layers[0].ffn
    windows = {layer.mixer.window for layer in arch.layers}
    if len(windows) > 1 or (windows != {None} and config["model_type"] != "mistral"):
        what = "layers with a sliding window are not exported for this family"
        raise UserError(what, where=f"{folder}: sliding_window of config.json", fix=f"{THEIRS} {folder}")
    sizes = {
        "block_count": len(arch.layers),
        "context_length": arch.max_positions or 0,
        "embedding_length": arch.dim,
        "feed_forward_length": ffn.hidden,
        "vocab_size": arch.vocab,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "rope.dimension_count": attention.rope.dim,
    }
    if attention.window:
        sizes["attention.sliding_window"] = attention.window
    made: dict[str, Any] = {f"{name}.{key}": Unsigned(value) for key, value in sizes.items()}
    made |= {f"{name}.rope.freq_base": float(attention.rope.theta)}
    made |= {f"{name}.attention.layer_norm_rms_epsilon": float(arch.norm_eps)}
    made |= {f"{name}.rope.scaling.{key}": value for key, value in _scaling(attention.rope.scaling, folder).items()}
    general = {"general.architecture": name, "general.type": "model", "general.name": folder.resolve().name}
    numbers = {"general.file_type": Unsigned(FILE_TYPE[stored]), "general.quantization_version": Unsigned(2)}
    return general | numbers | made


def _scaling(scaling: Scaling | None, folder: Path) -> dict[str, Any]:
    """GGUF's keys of a longer range; Llama 3.1's is a tensor instead."""
    if scaling is None or isinstance(scaling, Llama3Scaling):
        return {}
    if isinstance(scaling, LinearScaling):
        return {"type": "linear", "factor": float(scaling.factor)}
    if isinstance(scaling, YarnScaling) and scaling.truncate:
        usual = 0.1 * math.log(scaling.factor) + 1  # which llama.cpp multiplies with by itself
        return {
            "type": "yarn",
            "factor": float(scaling.factor),
            "original_context_length": Unsigned(scaling.original_max_positions),
            "attn_factor": scaling.gain / usual,
            "yarn_beta_fast": float(scaling.beta_fast),
            "yarn_beta_slow": float(scaling.beta_slow),
        }
    kind = "yarn with truncate: false" if isinstance(scaling, YarnScaling) else "longrope"
    what = f"rope scaling of type {kind} is not exported to GGUF, but linear, yarn and llama3 are"
    raise UserError(what, where=f"{folder}: rope_scaling of config.json", fix=f"{THEIRS} {folder}")


def _entries(model: LanguageModel, weights: Weights, stored: str) -> list[Entry]:
    keys = dict.fromkeys(piece.hf for piece in plan(load.base_state(model), model.table).values())
    if model.arch.tied:
        keys.pop("lm_head.weight")
    found = [_entry(model, weights, key, stored) for key in keys]
    scaling = model.arch.layers[0].mixer.rope.scaling
    if isinstance(scaling, Llama3Scaling):
        factors = frequency_factors(model)
        found.append(Entry("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors.numpy().tobytes()))
    return found


def _entry(model: LanguageModel, weights: Weights, key: str, stored: str) -> Entry:
    stem, _, kind = key.rpartition(".")
    pattern = next((pattern for pattern in NAMES if re.fullmatch(pattern, stem)), None)
    if pattern is None:
        file = weights.files[key]
        raise UserError(f"{key} has no place in a GGUF file", where=str(file), fix=f"{THEIRS} {file.parent}")
    shape = weights.shapes[key]
    as_stored = "f32" if len(shape) == 1 else "f16" if stored == "q8_0" and shape[-1] % 32 else stored
    attention = model.arch.layers[0].mixer
    heads = {"q_proj": attention.heads, "k_proj": attention.kv_heads}.get(stem.rpartition(".")[2])
    turns = ARCHITECTURES[model.config["model_type"]][1]

    def data() -> bytes:
        tensor = weights.read(key)
        return encode(interleave(tensor, heads) if turns and heads else tensor, as_stored)

    return Entry(re.sub(pattern, NAMES[pattern], stem) + f".{kind}", shape, as_stored, data)


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k from halves (x_i beside x_{i + d/2}) to neighbours (x_{2i} beside x_{2i + 1}), head by head."""
    rows, rest = tensor.shape[0], tensor.shape[1:]
    return tensor.reshape(heads, 2, rows // heads // 2, *rest).transpose(1, 2).reshape(rows, *rest)


def encode(tensor: Tensor, stored: str) -> bytes:
    """The bytes of a tensor as GGUF stores it."""
    if stored == "bf16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
    if stored == "q8_0":
        return _q8_0(tensor.float().numpy())
    return tensor.to({"f32": torch.float32, "f16": torch.float16}[stored]).contiguous().numpy().tobytes()


def _q8_0(values: np.ndarray) -> bytes:
    """Blocks of 32: a float16 scale, the largest magnitude / 127, then int8 multiples, halves rounded away from 0."""
    blocks = values.reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    scaled = blocks * inverse
    codes = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))
    return np.concatenate([scale.astype("<f2").view(np.uint8), codes.astype(np.int8).view(np.uint8)], 1).tobytes()


def frequency_factors(model: LanguageModel) -> Tensor:
    """What Llama 3.1's scaling divides each rope frequency by, float32 [rope dim / 2]."""
    rope = model.arch.layers[0].mixer.rope
    plain = rope.theta ** -(torch.arange(0, rope.dim, 2, dtype=torch.float64) / rope.dim)
    return (plain / rope.scaling.apply(plain)).float()

