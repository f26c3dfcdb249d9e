"""Config -> a model with weights, adapters and sharding: the one order that every recipe goes through."""

from pathlib import Path
from typing import Any

import torch

from ftlib import budget, quant
from ftlib.adapters import freeze, relora
from ftlib.adapters import setup as adapters
from ftlib.adapters.fuse import fuse
from ftlib.build.rows import tokenizer
from ftlib.errors import UserError, about
from ftlib.kernels.flash4_attention import in_any_order
from ftlib.layers.attention import choose_backend, serving
from ftlib.models import LanguageModel, heads, hub, initial, load, mtp, own, resize
from ftlib.models.load import DTYPES
from ftlib.optim import lisa
from ftlib.parallel import graphs, offload, replicas
from ftlib.parallel.apply import apply
from ftlib.parallel.run import Run
from ftlib.sections import Init, Lora, Mtp, Reward


def default_device() -> torch.device:
    """Where a run on this machine would compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def from_scratch(cfg: Any) -> bool:
    """Whether weights are drawn from the seed instead of read."""
    return getattr(cfg, "from_scratch", False)


def model(cfg: Any, run: Run, reference: bool = False) -> LanguageModel:
    """The model of a recipe's config, ready to train on `run`'s device.

    A config with a `lora` section gets a frozen model with trainable adapters; else every parameter trains that its
    `train` section, if it has one, leaves. `reference`: a run that continues an adapter also holds it frozen.
    """
    folder, built = shapes(cfg)
    weights = None if from_scratch(cfg) else load.check_weights(built, folder)
    quant.attach(built, cfg)
    trained, fresh = new_tokens(cfg, built)
    if fresh and weights is not None:
        weights = resize.Grown(weights, built, fresh)
    built.model.use_attention(backend(cfg, built, run.device))
    attach(built, cfg, trained, reference)
    section: Lora | None = getattr(cfg, "lora", None)
    apply(built, run, cfg.memory, DTYPES[cfg.dtype])
    built.to_empty(device=run.device)
    built.tie()
    start = getattr(cfg, "init", Init())
    if weights is None:
        initial.init_weights(built, cfg.seed, start.std, start.scaled)
    else:
        load.load_weights(built, weights)
    if built.mtp is not None:
        mtp.fill(built, None if weights is None else folder, cfg.seed, start.std)
    if section is not None:
        adapters.fill(built, section, cfg.seed)
        if run.device.type == "cuda" and run.dense["fsdp"].size() * run.dense["tp"].size() == 1:
            fuse(built)
    if cfg.memory.offload:
        offload.attach(built, cfg.memory.recompute_layers)
    if run.dense["fsdp"].size() == 1:
        built.replicas = _replicas(built, cfg, run)
    built.source, built.code = folder, own.mark(cfg.model.code)
    for begun in filter(None, (folder, getattr(section, "start_from", None)) if run.is_main else ()):
        own.compare(begun, own.recorded(hub.resolve(begun)), built.code, "model.code=FILE.py:CLASS")
    if run.is_main and section is not None:
        adapters.compare_base(built, section)
    if cfg.memory.budget_gib is not None:
        budget.settle(built.train(), cfg, run)
    if cfg.memory.cuda_graph:
        graphs.attach(built)
    return built.train()


def attach(built: LanguageModel, cfg: Any, trained: tuple[int, ...], reference: bool = False) -> None:
    """Give a model on meta what it trains besides its own weights, and freeze what it does not train. `trained`: ids of
    tokens whose rows do; `reference`: as `model`."""
    mtp.attach(built, getattr(cfg, "mtp", Mtp()))
    if getattr(cfg, "lora", None) is not None:
        adapters.attach(built, cfg.lora, reference, trained)
        relora.attach(built, cfg)
    elif hasattr(cfg, "train"):
        freeze.apply(built, cfg.train)
    lisa.attach(built, cfg)


def shapes(cfg: Any) -> tuple[Path, LanguageModel]:
    """The folder of a config's model, and the model on meta."""
    with about("model.code"):
        decoder = own.find(cfg.model.code)
    with about("model.path"):
        folder = hub.resolve(cfg.model.path)
        return folder, load.build(folder, DTYPES[cfg.dtype], decoder, _head(cfg))


def frozen(cfg: Any, run: Run, path: str, head: heads.Head | None = None) -> LanguageModel:
    """A model that a run looks at and never trains: a teacher, what a full fine-tune began with; with `head` scores."""
    folder, dtype = hub.resolve(path), DTYPES[cfg.dtype]
    built = load.build(folder, dtype, own.decoder(cfg.model, path), head)
    weights = load.check_weights(built, folder)
    built.model.use_attention(backend(cfg, built, run.device))
    built.requires_grad_(False)
    apply(built, run, cfg.memory, dtype)
    built.to_empty(device=run.device)
    built.tie()
    load.load_weights(built, weights)
    return built.eval()


def new_tokens(cfg: Any, built: LanguageModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of `tokenizer.add_tokens`, and of those (and a new pad token) that the model was never trained with.

    Gives `built`, which is on meta and bare, the embedding rows they need.
    """
    asked = getattr(cfg, "tokenizer", None)
    if asked is None or not (asked.add_tokens or asked.pad_token):
        return (), ()
    found, known = tokenizer(cfg), built.arch.vocab
    named = dict.fromkeys([*asked.add_tokens, *([asked.pad_token] if asked.pad_token else [])])
    ids = {token: found.special_tokens[token] for token in named}
    fresh = tuple(i for token, i in ids.items() if token in found.added or i >= known)
    unnamed = [token for token, i in found.special_tokens.items() if i >= known and i not in fresh]
    if unnamed:
        raise UserError(
            f"the tokenizer has tokens that the model has no embedding for: {', '.join(unnamed[:5])}",
            where="tokenizer.add_tokens",
            fix="name them all, or use the tokenizer that belongs to the model",
        )
    resize.resize_embeddings(built, max((i + 1 for i in fresh), default=0), asked.rows_multiple_of)
    return tuple(ids[token] for token in dict.fromkeys(asked.add_tokens)), fresh


def _replicas(built: LanguageModel, cfg: Any, run: Run) -> replicas.Replicas | replicas.Tree | None:
    """What sums gradients over whole copies of the model."""
    deterministic, micro_batches = getattr(cfg, "deterministic", False), 0
    if deterministic == "elastic":
        micro_batches = cfg.batch.rows // (cfg.batch.micro_rows * run.data_ranks)
    return replicas.build(built, run.dense["dp_replicate"].get_group(), deterministic, micro_batches)


def backend(cfg: Any, built: LanguageModel, device: torch.device) -> str:
    """The attention backend of a model; UserError where the one that is asked for cannot serve it."""
    arch, asked = built.arch, cfg.model.attention
    given = (device, DTYPES[cfg.dtype], arch.softcap, arch.sinks, arch.head_dims)
    if asked == "auto":
        return next(name for name in serving(*given) if _unfit(cfg, name, device) is None)
    chosen = choose_backend(asked, *given)
    unfit = _unfit(cfg, chosen, device)
    if unfit is None:
        return chosen
    (why, key), other = unfit, "reference" if arch.softcap or chosen == "flex" else "varlen"
    fix = f"use auto or {other}" + (", or cp_style=ulysses" if key == "parallel.cp_style" else "")
    raise UserError(f"attention backend {asked!r} {why}", where=f"model.attention, {key}", fix=fix)


def _unfit(cfg: Any, chosen: str, device: torch.device) -> tuple[str, str] | None:
    """Why a backend cannot serve this run, and the key that asks for more; None if it can."""
    cut = (chosen, cfg.parallel.cp_style) in (("flex", "allgather"), ("flash4", "ring")) and cfg.parallel.cp > 1
    masked = chosen in ("flex", "flash4") and hasattr(cfg, "diffusion")
    if cut or masked:
        return "serves whole rows that look back", "parallel.cp_style" if cut else "diffusion"
    if chosen == "flash4" and getattr(cfg, "deterministic", False) and in_any_order(device):
        return "adds gradients up in any order on this GPU", "deterministic"
    return None


def _head(cfg: Any) -> heads.Head | None:
    """What stands in place of the vocabulary in a model that scores."""
    section = getattr(cfg, "reward", None)
    return (heads.STEPS if section.kind == "steps" else heads.SEQUENCE) if isinstance(section, Reward) else None
