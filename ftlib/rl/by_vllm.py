"""What rollouts by vLLM (ftlib.generation.vllm) do not go together with."""

from importlib import metadata
from typing import Any

from ftlib import build
from ftlib.adapters import hf_layers, lora, saved_modules, token_rows
from ftlib.build.models import new_tokens, shapes
from ftlib.errors import UserError
from ftlib.generation.vllm import VERSION
from ftlib.models import LanguageModel

COOLEST, HOTTEST = 0.01, 2.0  # between 0 and these vLLM draws at the coolest, and above it refuses


def problems(cfg: Any, world: int) -> list[str]:
    """What does not go together with drawing by vLLM, known before anything is loaded."""
    warm = COOLEST <= cfg.rollout.temperature <= HOTTEST
    found = [
        (_installed(), "", 'pip install "ftlib[vllm]"'),
        (world > 1 and "one process learns, and starts the one in which vLLM draws", "parallel", "start one"),
        (cfg.rollout.staleness and "drawing ahead has its own engine", "rollout.staleness", "set it to 0"),
        (not warm and "vLLM would not draw at it", "rollout.temperature", f"take one from {COOLEST} to {HOTTEST:g}"),
        (cfg.deterministic and "vLLM's bits depend on what else it draws", "deterministic", "set it to false"),
        (cfg.lora and cfg.dtype == "fp32" and "vLLM has no adapters in float32", "dtype, lora", "take dtype=bf16"),
        (cfg.model.code is not None and "vLLM has its own model, not yours", "model.code", "leave it out"),
        (cfg.model.quantize and "vLLM would draw with plain weights", "model.quantize", "leave it out"),
        (cfg.model.fp8 and "vLLM would draw with plain weights", "model.fp8", "leave it out"),
    ]
    try:
        found += _unlike(build.check_model(cfg), cfg)
    except UserError:
        pass  # the check of the model says it
    either = [(what, f"rollout.engine, {key}" if key else "rollout.engine", fix) for what, key, fix in found if what]
    return [str(UserError(what, where=key, fix=f"{fix}, or set rollout.engine=native")) for what, key, fix in either]


def _installed() -> str | None:
    """What is wrong with the package vllm here. It is not imported."""
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return "this engine is the package vllm, which is not installed"
    return None if version.startswith(VERSION) else f"this engine is made for vllm {VERSION}*; here is {version}"


def _unlike(built: LanguageModel, cfg: Any) -> list[tuple[Any, str, str]]:
    """What vLLM would compute in another way than `built`, a model on meta with its adapters."""
    adapted = {layer: factors for layer, _, factors in lora.adapted(built)}
    experts = any(place.stack or place.bare for place in hf_layers.places(built, adapted).values())
    whole = any(saved_modules.saved(built, "policy")) or any(token_rows.held(built, "policy"))
    plain = shapes(cfg)[1]
    packed = any(part.get("quantization_config") for part in (plain.config, plain.config.get("text_config") or {}))
    fresh = new_tokens(cfg, plain)[1]
    attention = "name others: lora.targets=[q_proj, k_proj, v_proj, o_proj]"
    return [
        (packed and "vLLM would draw with the packed weights of the folder", "model.path", "name a plain one"),
        (fresh and "vLLM reads the folder, which has no rows for new tokens", "tokenizer", "add none"),
        (any(f.magnitude is not None for f in adapted.values()) and "vLLM has no DoRA", "lora.dora", "leave it out"),
        (whole and "vLLM's adapters hold no whole modules or rows", "lora.modules_to_save", "leave them out"),
        (experts and "adapters on experts were not compared with vLLM's", "lora.targets", attention),
    ]
