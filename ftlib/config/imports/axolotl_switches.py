"""Axolotl's switches that are several keys, or a section: recomputation, QAT, losses, rates of groups, ReLoRA, …"""

import re
from typing import Any

from ftlib.config.imports.rules import Imported, listed, recompute, track

_TRACKERS = {
    "wandb": ("use_wandb", "wandb_project"),
    "mlflow": ("use_mlflow", "mlflow_experiment_name", "mlflow_tracking_uri"),
    "tensorboard": ("use_tensorboard",),
}
_OPTIM_ARGS = {
    "momentum": ("muon", "dion"), "rank_fraction": ("dion",), "alpha": ("ademamix",), "beta3": ("ademamix",),
}  # fmt: skip
_TILE = 4096  # tokens, where the number of shards is not named: there it follows from the model's width


def memory(theirs: dict[str, Any], made: Imported) -> None:
    """What backward computes again, what waits in host memory, and feed-forward layers in pieces."""
    asked = theirs.get("gradient_checkpointing")
    if asked is not None:
        made.set("memory.recompute", recompute(asked))
    if str(asked).startswith(("offload", "unsloth")):
        made.set("memory.offload", True)
    if theirs.get("selective_checkpointing"):
        made.set("memory.recompute", "selective")
    if theirs.get("tiled_mlp"):
        pieces = theirs.get("tiled_mlp_num_shards")
        made.set("memory.tiled_mlp", max(1, int(theirs.get("sequence_len") or 512) // int(pieces)) if pieces else _TILE)


def rounding(theirs: dict[str, Any], made: Imported) -> None:
    """Quantization-aware training; LoftQ, which needs a base that is quantized."""
    qat = theirs.get("qat") or {}
    if qat:
        bits = str(qat.get("weight_dtype") or "int8").lower(), str(qat.get("activation_dtype")).lower()
        schemes = {("int4", "none"): "int4", ("int4", "int8"): "int8_int4", ("float8", "float8"): "fp8",
                   ("fp8", "fp8"): "fp8", ("float8_e4m3fn", "float8_e4m3fn"): "fp8"}  # fmt: skip
        if bits in schemes:
            made.set("qat.scheme", schemes[bits])
            if qat.get("group_size") and schemes[bits] != "fp8":
                made.set("qat.group", qat["group_size"])
            if qat.get("fake_quant_after_n_steps"):
                made.set("qat.after", qat["fake_quant_after_n_steps"])
        else:
            made.lost.append(
                ("qat", f"weights {bits[0]} with activations {bits[1]}: qat.scheme has int4, int8_int4, fp8")
            )
    loftq = theirs.get("loftq_config") or (theirs.get("peft") or {}).get("loftq_config")
    if loftq and theirs.get("adapter"):
        made.set("lora.init", "loftq")
        made.default("model.quantize", "int8" if loftq.get("loftq_bits") == 8 else "nf4")


def loss(theirs: dict[str, Any], made: Imported) -> None:
    """Cross-entropy with a weight for each token."""
    if theirs.get("use_eaft"):
        made.set("loss.name", "eaft")
        for key, kind in (("eaft_alpha", float), ("eaft_k", int)):
            if theirs.get(key) is not None:
                made.set(f"loss.{key}", kind(theirs[key]))
    elif theirs.get("use_dynamic_finetuning"):
        made.set("loss.name", "dft")


def groups(theirs: dict[str, Any], made: Imported) -> None:
    """Learning rates of some parameters, here as multiples of the one of all others; settings of the optimizer."""
    peak, found = made.get("optim.lr"), []
    for group in theirs.get("lr_groups") or []:
        if peak and group.get("lr"):
            match = "|".join(map(re.escape, listed(group.get("modules") or [])))
            found.append({"match": match, "lr_scale": float(f"{float(group['lr']) / peak:.6g}")})
    scale = theirs.get("embedding_lr_scale")
    if theirs.get("embedding_lr") and peak:
        scale = float(f"{float(theirs['embedding_lr']) / peak:.6g}")
    if scale:
        found.append({"match": "embed_tokens|lm_head", "lr_scale": float(scale)})
    if found:
        made.set("optim.groups", found)
    _optim_args(theirs.get("optim_args") or {}, made)


def _optim_args(given: Any, made: Imported) -> None:
    if isinstance(given, str):  # as on a command line: name=value,name=value
        given = dict(part.split("=", 1) for part in listed(given) if "=" in part)
    name = made.get("optim.name")
    for key, value in given.items():
        if key in ("eps", "weight_decay") or name in _OPTIM_ARGS.get(key, ()):
            made.set(f"optim.{key}", float(value))
        elif key == "betas":
            made.set("optim.betas", [float(beta) for beta in value])
        else:
            made.lost.append((f"optim_args.{key}", f"not a setting of {name}"))


def trackers(theirs: dict[str, Any], made: Imported) -> None:
    """Where rows also go, and tokens with a role."""
    for tracker, keys in _TRACKERS.items():
        if any(theirs.get(key) for key in keys):
            track(made, tracker)
    for name, token in (theirs.get("special_tokens") or {}).items():
        if name == "pad_token":
            made.set("tokenizer.pad_token", token)
        else:
            made.lost.append((f"special_tokens.{name}", "the tokenizer's own is used; change its files"))


def relora(theirs: dict[str, Any], made: Imported) -> None:
    """Merges while training; restarts of the rate without them have no equivalent."""
    every = theirs.get("jagged_restart_steps")
    if not (theirs.get("relora") and every):
        alone = [key for key in ("relora", "jagged_restart_steps") if theirs.get(key)]
        made.lost += [(key, "relora.every merges and restarts, never one without the other") for key in alone]
        return
    method = theirs.get("relora_prune_method") or "magnitude"
    if method not in ("magnitude", "reset"):
        made.lost.append(("relora_prune_method", f"{method!r}: moments are pruned by magnitude"))
    ratio = 1.0 if method == "reset" else float(theirs.get("relora_prune_ratio") or 0.9)
    made.set("relora.every", every)
    made.set("relora.warmup_steps", theirs.get("jagged_restart_warmup_steps") or 10)
    made.set("relora.keep", round(1 - ratio, 9))


ALL = (memory, rounding, loss, groups, trackers, relora)
