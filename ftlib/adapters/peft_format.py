"""Adapters in PEFT's file format, adapter_config.json and adapter_model.safetensors, which peft reads."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ftlib.adapters import hf_layers, initial, lora, saved_modules, token_rows
from ftlib.adapters.factors import LoraFactors
from ftlib.errors import UserError
from ftlib.layers.linear import Linear
from ftlib.models import hub, own, shards
from ftlib.models.resize import resize_embeddings
from ftlib.models.shards import unsharded
from ftlib.models.weights import save_tensors
from ftlib.quant import kept_in
from ftlib.sections import Lora

PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
ROWS = "token_adapter.trainable_tokens_delta"  # whole rows, whatever the name says
# Options that change what the files mean and that are not implemented: refused, never ignored.
REFUSED = {
    "bias": "none",
    "fan_in_fan_out": False,
    "layer_replication": None,
    "lora_bias": False,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
}


@torch.no_grad()
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

    An adapter that started inside W (PiSSA, OLoRA) is written as the plain one of twice the rank that it equals, so it
    belongs on the base it was made from, not on a changed one.
    """
    tensors, given, one = {}, {}, None
    for layer, _, one in lora.adapted(model, name):
        magnitude = None if one.magnitude is None else _plain(unsharded(one.stored("magnitude")))
        given[layer] = hf_layers.Factors(*map(_plain, _full_factors(one)), one.scale, magnitude)
    if one is None:
        raise UserError(f"the model carries no adapter named {name!r}")
    layers = hf_layers.fused(model, given)
    for module, (_, f) in layers.items():
        parts = {"lora_A": f.a, "lora_B": f.b, "magnitude": f.magnitude}
        tensors |= {f"{PREFIX}{module}.{KEYS[part]}": value for part, value in parts.items() if value is not None}
    modules = []
    for hf, _, copies in saved_modules.saved(model, name):
        modules.append(hf)
        tensors |= {f"{PREFIX}{hf}.{key}": _plain(unsharded(p)) for key, p in copies.named_parameters()}
    tokens = {}
    for hf, _, rows in token_rows.held(model, name):
        tensors[f"{PREFIX}{hf}.{ROWS}"] = _plain(unsharded(rows.rows))
        tokens[hf.rpartition(".")[2]] = list(rows.ids)
    if not write:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(model, layers, one, modules) | {"base_model_name_or_path": base, "revision": revision}
    config["trainable_token_indices"] = tokens or None
    save_tensors(tensors, folder / TENSORS)
    own.record(folder, {"model.quantize": kept_in(model)}, getattr(model, "code", None))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _full_factors(factors: LoraFactors) -> tuple[Tensor, Tensor]:
    """`factors.factors()` of whole tensors, though the trained ones may be sharded. Collective."""
    a, b = unsharded(factors.stored("lora_A")), unsharded(factors.stored("lora_B"))
    if factors.start_A is not None:
        start_a, start_b = unsharded(factors.stored("start_A")), unsharded(factors.stored("start_B"))
        a, b = torch.cat((a, start_a)), torch.cat((b, -start_b), 1)
    return a, b


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().to(torch.float32)


def _config(
    model: nn.Module,
    layers: dict[str, tuple[hf_layers.Place, hf_layers.Factors]],
    one: LoraFactors,
    modules: list[str],
) -> dict[str, Any]:
    """adapter_config.json: the commonest rank and alpha, and patterns for the layers that have others."""
    ranks, alphas = {}, {}
    for place, f in layers.values():
        rank = len(f.a) // model.get_submodule(place.target).experts if place.stack else len(f.a)
        ranks[place.key], alphas[place.key] = rank, hf_layers.alpha(f.scale, rank, one.rslora)
    rank, alpha = (Counter(of.values()).most_common(1)[0][0] for of in (ranks, alphas))
    named = [place for place, _ in layers.values() if place.stack or place.bare]
    parameters = {".".join(place.key.split(".")[-3:]) if place.stack else place.key for place in named}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": one.dropout,
        "target_modules": _short_names(model, [p.target for p, _ in layers.values() if p not in named]),
        "target_parameters": sorted(parameters) or None,
        "rank_pattern": {key: r for key, r in ranks.items() if r != rank},
        "alpha_pattern": {key: a for key, a in alphas.items() if a != alpha},
        "modules_to_save": modules or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": one.rslora,
        "use_dora": one.magnitude is not None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def check(model: nn.Module, name: str = "policy") -> None:
    """UserError where adapter `name` could be trained but not be written so that peft reads it."""
    adapted = {layer: factors for layer, _, factors in lora.adapted(model, name)}
    for layer, place in hf_layers.places(model, adapted).items():
        factors = adapted[layer]
        for key, wrong in (("dropout", factors.dropout > 0), ("dora", factors.magnitude is not None)):
            if place.bare and wrong:
                raise UserError(
                    f"lora.{key} on {layer}: peft knows no such adapter on a dense layer of a model that has experts",
                    where=f"lora.{key}",
                    fix="leave it out, or set lora.targets: [q_proj, k_proj, v_proj, o_proj]",
                )


def load(model: nn.Module, folder: str | Path, *, name: str = "policy", trainable: bool = False) -> None:
    """Attach the adapter in `folder` to a model with weights, as adapter `name`.

    A model with too few embedding rows for the adapter's tokens gets more. Raises UserError when the folder is no LoRA
    adapter, uses options we do not have, or does not fit the model.
    """
    where = tokens(folder)
    resize_embeddings(model, max([_rows(Path(folder)), *(i + 1 for ids in where.values() for i in ids)]))
    lora.attach_section(model, section(model, folder), name=name, dtype=_dtype(Path(folder)), tokens=where)
    fill(model, folder, name=name)
    for parts in (lora.adapted(model, name), saved_modules.saved(model, name), token_rows.held(model, name)):
        for _, _, part in parts:
            part.requires_grad_(trainable)


def base_form(folder: str | Path) -> str | None:
    """`quant.kept_in` of the model that the adapter in `folder` was trained on. None: plain, or not known."""
    return own.noted(Path(folder), "model.quantize")


def tokens(folder: str | Path) -> token_rows.Where:
    """The tokens whose rows the adapter in `folder` trains: those of the embedding, and of a head of its own."""
    listed = read_config(Path(folder)).get("trainable_token_indices") or {}
    return {token_rows.EMBEDDING: listed} if isinstance(listed, list) else listed


def _rows(folder: Path) -> int:
    """Embedding rows that modules which the adapter holds whole have."""
    ends = (f"{token_rows.EMBEDDING}.weight", f"{token_rows.HEAD}.weight")
    keys = [key for key in _keys(folder) if key.endswith(ends)]
    with _opened(folder / TENSORS) as opened:
        return max((opened.get_slice(PREFIX + key).get_shape()[0] for key in keys), default=0)


def section(model: nn.Module, folder: str | Path) -> Lora:
    """The adapter in `folder` as a config's section, its targets and modules by the names this model has for them.

    `model` may be on the meta device; only headers of the file are read.
    """
    folder = Path(folder)
    config, keys = read_config(folder), _keys(folder)
    files = sorted({key.split(".lora_")[0] for key in keys if ".lora_" in key})
    modules = sorted({key.rpartition(".")[0] for key in keys if ".lora_" not in key and not key.endswith(ROWS)})
    known = saved_modules.candidates(model)
    unknown = [hf for hf in modules if hf not in known]
    if unknown or not files:
        named = ", ".join(unknown[:3]) or "no lora_A / lora_B tensor at all"
        raise UserError(f"the adapter does not fit this model: {named}", where=str(folder / TENSORS))
    layers = hf_layers.targeted(model, config.get("target_parameters") or (), files)
    patterns = {key: _patterns(model, layers, config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")}
    for wanted in config.get("modules_to_save") or ():
        if not any(hf == wanted or hf.endswith(f".{wanted}") for hf in modules):
            raise UserError(f"modules_to_save names {wanted!r}, which the file lacks", where=str(folder / TENSORS))
    init = config.get("init_lora_weights", True)
    return Lora(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets="|".join(layer.replace(".", r"\.") for layer in layers),
        rslora=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
        init=init if init in initial.FROM_WEIGHT else "kaiming",
        modules_to_save=tuple(modules),
        **patterns,
    )


def _patterns(model: nn.Module, layers: list[str], patterns: dict[str, Any]) -> dict[str, Any]:
    """Patterns over transformers' layers as ones over ours: kept where the names are the same."""
    places = hf_layers.places(model, layers)
    out = {key: value for key, value in patterns.items() if any(lora.ends(key, layer) for layer in layers)}
    for layer in layers:
        if places[layer].key != layer:
            own = [value for key, value in patterns.items() if lora.ends(key, places[layer].key)]
            out |= {layer: own[0]} if own else {}
    return out


def fill(model: nn.Module, folder: str | Path, *, name: str = "policy") -> None:
    """Read the adapter's tensors into adapter `name`, attached as `section` says, on a model with weights."""
    file = Path(folder) / TENSORS
    wanted: list[tuple[str, slice, Tensor]] = []
    adapted = {layer: factors for layer, _, factors in lora.adapted(model, name)}
    for layer, place in hf_layers.places(model, adapted).items():
        for part in ("lora_A", "lora_B", "magnitude"):
            rows = slice(*place.rows) if place.rows and part != "lora_A" else slice(None)
            if (target := adapted[layer].stored(part)) is not None:
                wanted.append((f"{PREFIX}{place.module}.{KEYS[part]}", rows, target))
    for hf, _, copies in saved_modules.saved(model, name):
        wanted += [(f"{PREFIX}{hf}.{key}", slice(None), p) for key, p in copies.named_parameters()]
    for hf, _, rows in token_rows.held(model, name):
        wanted.append((f"{PREFIX}{hf}.{ROWS}", slice(None), rows.rows))
    if any(factors.start_A is not None for _, _, factors in lora.adapted(model, name)):
        lora.reset(model, 0, name)  # the start inside W follows from W
    with _opened(file) as opened:
        found = set(opened.keys())
        for key, rows, target in wanted:
            if key not in found:
                raise UserError(f"the adapter has no {key}", where=str(file))
            value = opened.get_tensor(key)[rows]
            if value.shape != target.shape:
                raise UserError(
                    f"{key.removeprefix(PREFIX)}: the adapter has {list(value.shape)}, "
                    f"the model needs {list(target.shape)}",
                    where=str(file),
                    fix="use the base model this adapter was trained on",
                )
            shards.fill(target, value)


def read_config(folder: Path) -> dict:
    """adapter_config.json of a LoRA adapter without options that we would have to ignore."""
    file = folder / CONFIG
    if not file.exists():
        fix = hub.of_run(folder, (CONFIG,)) or f"name a folder with {CONFIG} and {TENSORS}, as final/ of a LoRA run is"
        raise UserError(f"{folder} is no adapter: it has no adapter_config.json", fix=fix)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        what = f"adapter_config.json is not valid JSON: {error}"
        raise UserError(what, where=str(file), fix="copy or download it again") from None
    if config.get("peft_type") != "LORA":
        raise UserError(f"adapter type {config.get('peft_type')!r} is not supported", where=str(file), fix="use LORA")
    for key, neutral in REFUSED.items():
        if config.get(key, neutral) not in (neutral, None):
            raise UserError(f"{key}={config[key]!r} is not supported", where=str(file))
    # These change the base in a way that cannot be found again from its weights; the others only say how A and B began.
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith("pissa_") or start in ("corda", "loftq", "lora_ga"):
        fix = "convert it with peft: save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        raise UserError(f"init_lora_weights={start!r} needs a changed base model", where=str(file), fix=fix)
    return config


def _opened(file: Path) -> safe_open:
    if not file.exists():
        what = f"an adapter is {CONFIG} and {TENSORS}, and this folder lacks the second"
        raise UserError(what, where=str(file), fix="copy the whole folder")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(f"damaged or cut off: {error}", where=str(file), fix="copy or download it again") from None


def _keys(folder: Path) -> list[str]:
    file = folder / TENSORS
    with _opened(file) as opened:
        return [key.removeprefix(PREFIX) for key in opened.keys()]  # noqa: SIM118 - not a dict


def _dtype(folder: Path) -> torch.dtype:
    with _opened(folder / TENSORS) as opened:
        return opened.get_tensor(next(iter(opened.keys()))).dtype


def _short_names(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of `names` when they pick exactly these layers, else the full names."""
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    linears = [n for n, m in model.named_modules() if isinstance(m, Linear)]
    linears = {place.target for place in hf_layers.places(model, linears).values()}
    picked = [n for n in linears if n.rsplit(".", 1)[-1] in short]
    return short if sorted(picked) == sorted(names) else names
