"""From a config to layers of low precision, and what cannot be combined."""

import shlex
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftlib import config
from ftlib.errors import UserError
from ftlib.layers.linear import Linear
from ftlib.models import hub
from ftlib.quant import convert, float8, qat
from ftlib.quant.formats import FORMATS
from ftlib.sections import Model


def attach(model: nn.Module, cfg: Any) -> None:
    """Replace the linear layers of a model on meta as `cfg.model` says; before adapters, and before weights."""
    section, below_adapters = cfg.model, getattr(cfg, "lora", None) is not None
    for where in ("qat", "to"):
        if (rounding := getattr(cfg, where, None)) is not None:
            qat.attach(model, rounding, where)
    if section.fp8 is not None:
        rows, turn = section.fp8 == "rowwise", section.quantize is None
        if not float8.compute_in_fp8(model, rows, section.fp8_smallest, below_adapters, turn):
            what = f"no layer has {section.fp8_smallest} inputs and outputs at least, both multiples of 16"
            fix = "leave model.fp8 out: small layers lose speed by it; to try it all the same: model.fp8_smallest=64"
            raise UserError(what, where="model.fp8, model.fp8_smallest", fix=fix)
        if section.quantize is None:
            return
    if section.quantize is not None:
        convert.hold(model, section.quantize)


def commands(cfg: Any, model: nn.Module, merged: bool) -> list[str]:
    """What there is to do with the result of a run: merge its adapter, unless it is, and round what `qat` trained."""
    found, path = [], f"{cfg.output_dir}/final"
    if not merged:
        form = convert.kept_in(model)
        flags = f" --quantize {form}" if form in FORMATS else ""
        flags += " --dtype fp32" if cfg.qat and cfg.dtype == "fp32" else ""
        found.append(f"tune merge {cfg.model.path} {path} MERGED{flags}")
        path = "MERGED"
    if cfg.qat:
        group = [f"to.group={cfg.qat.group}"] if cfg.qat.group else []
        words = [f"model.path={path}", f"to.scheme={cfg.qat.scheme}", *group, f"data={config.brief(cfg.data)}"]
        words += [f"batch={config.brief(cfg.batch)}", f"dtype={cfg.dtype}", f"output_dir={cfg.output_dir}/rounded"]
        found.append(shlex.join(["tune", "run", "recipes/quantize.py", *words]))
    return found


def check(cfg: Any, kept: dict) -> None:
    """UserError where a combination does not work, with the nearest that does. `kept`: the model's config.json."""
    section, below_adapters = cfg.model, getattr(cfg, "lora", None) is not None
    if section.quantize and not below_adapters:
        fix = "train adapters (recipes/lora_sft.py, a lora section), or leave it out; model.fp8 computes in 8 bits"
        if hasattr(cfg, "to"):
            fix = "leave it out: to.scheme says what is rounded here"
        what = "only the frozen matrices below an adapter can be quantized"
        raise UserError(what, where="model.quantize", fix=fix)
    if section.quantize in ("int8", "fp8") and getattr(cfg.lora, "init", None) == "loftq":
        what = f"loftq begins with what {section.quantize} loses, which is little: A and B both begin near 0"
        warnings.warn(f"lora.init: {what} and learn slowly at first; it is for model.quantize=nf4", stacklevel=2)
    packed = hub.packed(kept)
    if section.quantize and packed:
        what = f"model.path is kept in {packed.get('quant_method', 'few bits')} already"
        warnings.warn(f"{what}: model.quantize={section.quantize} rounds those weights a second time", stacklevel=2)
    for where in ("qat", "to"):
        if getattr(cfg, where, None) is not None:
            _check_rounding(cfg, where)
    if hasattr(cfg, "to"):
        _check_conversion(cfg.output_dir / "final", packed)
    if section.fp8 is None:
        if section.fp8_smallest != Model.fp8_smallest:
            what = "it says which layers multiply in 8 bits, and none does"
            raise UserError(what, where="model.fp8_smallest", fix="model.fp8=tensorwise or rowwise, or leave it out")
        return
    if cfg.parallel.tp > 1:
        raise UserError(
            "the scales of 8-bit products are those of whole matrices",
            where="model.fp8, parallel.tp",
            fix="set parallel.tp=1; the other axes work",
        )
    if section.quantize not in (None, "fp8"):
        raise UserError(
            f"a base kept in {section.quantize} is made whole for its products, which then are not in fp8",
            where="model.quantize, model.fp8",
            fix="model.quantize=fp8, or leave one of them out",
        )
    if torch.cuda.is_available() and not float8.supported(torch.device("cuda")):
        raise UserError(
            f"{torch.cuda.get_device_name()} has no 8-bit products",
            where="model.fp8",
            fix="leave it out; model.quantize saves memory on any GPU",
        )


def _check_conversion(result: Path, form: dict | None) -> None:
    """UserError where another model would be replaced; a warning where the one to round is rounded already."""
    if result.exists():
        raise UserError(f"{result} exists and stays as it is", where="output_dir", fix="name another, or remove it")
    if form:
        what = f"model.path is kept in {form.get('quant_method', 'few bits')}"
        warnings.warn(f"{what}: what is rounded, and scored before, are those weights", stacklevel=2)


def _check_rounding(cfg: Any, where: str) -> None:
    if cfg.model.quantize or cfg.model.fp8:
        also = ", ".join(f"model.{key}" for key in ("quantize", "fp8") if getattr(cfg.model, key))
        raise UserError(
            f"{where} rounds layers as its result will be, not in a second way beside it",
            where=f"{where}, {also}",
            fix=f"leave {also} out",
        )
    if cfg.parallel.tp > 1:
        what = f"{where} rounds whole matrices, and tp gives each process a part of them"
        raise UserError(what, where=f"{where}, parallel.tp", fix="set parallel.tp=1; the other axes work")
    steps, lora = getattr(cfg, "steps", None), getattr(cfg, "lora", None)
    if where == "qat" and steps is not None and cfg.qat.after >= steps:
        raise UserError(f"rounding would begin after the last of {steps} steps", where="qat.after", fix="a smaller one")
    if lora is not None and (lora.dora or lora.dropout):
        raise UserError(
            "what is rounded is the merged matrix, which has no dropout and no gradient for a length",
            where="qat, lora.dropout, lora.dora",
            fix="lora.dropout=0 and lora.dora=false",
        )
    inside = [name for name in getattr(lora, "modules_to_save", ()) if name not in ("embed_tokens", "lm_head", "norm")]
    if inside:
        what = f"{', '.join(inside)}: a module trained whole inside a block is not rounded"
        raise UserError(what, where="qat, lora.modules_to_save", fix="train it by an adapter")


def note(model: nn.Module) -> list[str]:
    """What a run says: how many matrices are kept how, and in how many bits a weight; how many products run in fp8."""
    lines = []
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    held = [module.base for module in model.modules() if hasattr(module, "base")]
    if held:
        size = sum(base.nbytes for base in held)
        bits = sum(base.bits * base.shape.numel() for base in held) / sum(base.shape.numel() for base in held)
        form = held[0].form.removesuffix("_turned")
        lines.append(f"base: {len(held)} matrices in {form}, {bits:.2f} bits a weight, {size / 2**20:,.1f} MiB")
    if layers := qat.rounded(model):
        begins = f", after step {layers[0].after}" if layers[0].after else ""
        lines.append(f"rounding: {len(layers)} layers of {len(linears) - 1} to {layers[0].name}{begins}")
    eight = [module for module in linears if isinstance(module, float8.Float8Linear | float8.Float8Frozen)]
    if eight:
        scales = "a scale a row" if eight[0].rows else "a scale a tensor"
        where = "" if torch.cuda.is_available() else ", as a GPU would compute them"
        lines.append(f"fp8: products of {len(eight)} layers of {len(linears) - 1}, {scales}{where}")
    return lines
