"""Adapters in PEFT's file format, adapter_config.json and adapter_model.safetensors, which peft and vLLM read."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftlib.adapters import lora
from ftlib.errors import UserError
from ftlib.layers.linear import Linear

PREFIX = "base_model.model."
# Options that change what the files mean and that are not implemented: refused, never ignored.
REFUSED = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "layer_replication": None,
    "lora_bias": False,
    "target_parameters": None,
    "trainable_token_indices": None,
}


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    base: str,
    revision: str | None = None,
    name: str = "policy",
    write: bool = True,
) -> None:
    """Write adapter `name`. `base`, `revision`: what peft should load it onto (`hub.origin`).

    All processes of a sharded model must call this.
    """
    tensors, names, factors = {}, [], None
    for layer_name, _, factors in lora.adapted(model, name):
        names.append(layer_name)
        for factor in ("lora_A", "lora_B"):
            tensors[f"{PREFIX}{layer_name}.{factor}.weight"] = _whole(getattr(factors, factor))
    if factors is None:
        raise UserError(f"the model carries no adapter named {name!r}")
    if not write:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": factors.rank,
        "lora_alpha": factors.alpha,
        "lora_dropout": factors.dropout,
        "target_modules": _short_names(model, names),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(model: nn.Module, folder: str | Path, *, name: str = "policy", trainable: bool = False) -> None:
    """Attach the adapter in `folder` to a model with weights, as adapter `name`.

    Raises UserError when the folder is no LoRA adapter, uses options we do not have, or does not fit the model.
    """
    folder = Path(folder)
    config = read_config(folder)
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise UserError(f"{folder} has no adapter_model.safetensors")
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(file).items()}
    layers = sorted({key.rsplit(".", 2)[0] for key in tensors if ".lora_" in key})
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    unknown = [layer for layer in layers if layer not in linears]
    extra = [key for key in tensors if ".lora_" not in key]
    if unknown or extra or not layers:
        named = ", ".join((unknown + extra)[:3]) or "no lora_A / lora_B tensor at all"
        raise UserError(f"the adapter does not fit this model: {named}", where=str(file))
    device = next(model.parameters()).device
    lora.attach(
        model,
        "|".join(layer.replace(".", r"\.") for layer in layers),
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        name=name,
        dtype=next(iter(tensors.values())).dtype,
    )
    for layer, _, factors in lora.adapted(model, name):
        for factor in ("lora_A", "lora_B"):
            value, target = tensors[f"{layer}.{factor}.weight"], getattr(factors, factor)
            if value.shape != target.shape:
                raise UserError(
                    f"{layer}.{factor}: the adapter has {list(value.shape)}, the model needs {list(target.shape)}",
                    where=str(file),
                    fix="use the base model this adapter was trained on",
                )
            lora.fill(target, value.to(device))
            target.requires_grad_(trainable)


def read_config(folder: Path) -> dict:
    """adapter_config.json of a LoRA adapter without options that we would have to ignore."""
    file = folder / "adapter_config.json"
    if not file.exists():
        raise UserError(f"{folder} is no adapter: it has no adapter_config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"adapter_config.json is not valid JSON: {error}", where=str(file)) from None
    if config.get("peft_type") != "LORA":
        raise UserError(f"adapter type {config.get('peft_type')!r} is not supported", where=str(file), fix="use LORA")
    for key, neutral in REFUSED.items():
        if config.get(key, neutral) not in (neutral, None):
            raise UserError(f"{key}={config[key]!r} is not supported", where=str(file))
    return config


def _short_names(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of `names` when they pick exactly these layers, else the full names."""
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    linears = [n for n, m in model.named_modules() if isinstance(m, Linear)]
    picked = [n for n in linears if n.rsplit(".", 1)[-1] in short]
    return short if sorted(picked) == sorted(names) else names


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous().to(torch.float32)
