"""Config -> a model with weights, adapters and sharding: the one order that every recipe goes through."""

import dataclasses
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftlib import budget, data, loop, preflight, quant, tokenizers
from ftlib.adapters import freeze, relora, token_rows
from ftlib.adapters import setup as adapters
from ftlib.adapters.fuse import fuse
from ftlib.checkpoint import exchange
from ftlib.data import streaming
from ftlib.errors import Problems, UserError, about
from ftlib.layers.attention import choose_backend
from ftlib.models import LanguageModel, heads, hub, initial, load, mtp, own, resize
from ftlib.models.load import DTYPES
from ftlib.optim import adamw, in_backward, lisa, schedule_free
from ftlib.optim.groups import parameter_groups
from ftlib.parallel import check as mesh
from ftlib.parallel import offload, replicas
from ftlib.parallel.apply import apply
from ftlib.parallel.run import Run, sizes
from ftlib.preference import check as preference
from ftlib.sections import Data, Init, Lora, Mtp, Reward
from ftlib.tokenizers import Tokenizer


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
    folder, built = _shapes(cfg)
    weights = None if from_scratch(cfg) else load.check_weights(built, folder)
    quant.attach(built, cfg)
    trained, fresh = new_tokens(cfg, built)
    if fresh and weights is not None:
        weights = resize.Grown(weights, built, fresh)
    built.model.use_attention(_backend(cfg, built, run.device))
    mtp.attach(built, getattr(cfg, "mtp", Mtp()))
    section: Lora | None = getattr(cfg, "lora", None)
    if section is not None:
        adapters.attach(built, section, reference, trained)
        relora.attach(built, cfg)
    elif hasattr(cfg, "train"):
        freeze.apply(built, cfg.train)
    lisa.attach(built, cfg)
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
        offload.attach(built)
    if run.dense["fsdp"].size() == 1:
        built.replicas = _replicas(built, cfg, run)
    built.source, built.code = folder, own.mark(cfg.model.code)
    for begun in filter(None, (folder, getattr(section, "start_from", None)) if run.is_main else ()):
        own.compare(begun, own.recorded(hub.resolve(begun)), built.code, "model.code=FILE.py:CLASS")
    if cfg.memory.budget_gib is not None:
        budget.settle(built.train(), cfg, run)
    return built.train()


def _shapes(cfg: Any) -> tuple[Path, LanguageModel]:
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
    built.model.use_attention(_backend(cfg, built, run.device))
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


def _check_trained(cfg: Any, built: LanguageModel, fresh: tuple[int, ...]) -> None:
    """UserError where rows for new tokens would stay as they began."""
    if fresh and hasattr(cfg, "train") and not built.model.embed_tokens.weight.requires_grad:
        raise UserError(
            "new tokens need an embedding that trains, and it is frozen",
            where="tokenizer.add_tokens, train",
            fix="name embed_tokens and lm_head in train.only, or leave them out of train.freeze",
        )
    if cfg.parallel.tp > 1 and any(token_rows.held(built, "policy")):
        raise UserError(
            "rows of new tokens cannot be trained beside matrices that several processes share",
            where="tokenizer.add_tokens, parallel.tp",
            fix="set parallel.tp=1, or lora.modules_to_save=[embed_tokens, lm_head]",
        )


def _replicas(built: LanguageModel, cfg: Any, run: Run) -> replicas.Replicas | replicas.Tree | None:
    """What sums gradients over whole copies of the model."""
    deterministic, micro_batches = getattr(cfg, "deterministic", False), 0
    if deterministic == "elastic":
        micro_batches = cfg.batch.rows // (cfg.batch.micro_rows * run.data_ranks)
    return replicas.build(built, run.dense["dp_replicate"].get_group(), deterministic, micro_batches)


def check(cfg: Any, world: int = 1) -> None:
    """Everything that can be known before the first step without a GPU; raises one error listing all problems.

    `cfg` is a recipe's Config: sections it does not have are not checked.
    """
    problems, found = [], []
    checks = (_check_model, lambda cfg: _check_parallel(cfg, world), loop.check, _check_stream, _check_loss)
    for part in (partial(check, cfg) for check in checks):
        try:
            found.append(part())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise Problems(problems)
    built, shards, *_ = found
    if hasattr(cfg, "dpo") or isinstance(getattr(cfg, "reward", None), Reward):
        preference.check(cfg)
    mesh.check(built, cfg, cfg.parallel.cp, cfg.parallel.tp)
    preflight.check(built, cfg, shards)


def check_data(cfg: Any) -> list[str]:
    """Tokenizer, chat template and every row, as a run would read them, and what it would say of them; raises UserError
    naming file and line."""
    if not isinstance(getattr(cfg, "data", None), Data):
        return []
    return datasets(cfg, tokenizer(cfg)).report.lines()


def _check_model(cfg: Any) -> LanguageModel:
    folder, built = _shapes(cfg)
    _backend(cfg, built, default_device())
    if not from_scratch(cfg):
        with about("model.path"):
            load.check_weights(built, folder)
    quant.check(cfg)
    quant.attach(built, cfg)
    trained, fresh = new_tokens(cfg, built)
    mtp.attach(built, getattr(cfg, "mtp", Mtp()))
    if getattr(cfg, "lora", None) is not None:
        adapters.attach(built, cfg.lora, tokens=trained)
        relora.attach(built, cfg)
    elif hasattr(cfg, "train"):
        freeze.apply(built, cfg.train)
    lisa.attach(built, cfg)
    _check_trained(cfg, built, fresh)
    if hasattr(cfg, "optim"):
        parameter_groups(built, cfg.optim)
        adamw.check(built, cfg.optim)
    if hasattr(cfg, "schedule"):
        schedule_free.check(cfg.optim, cfg.schedule)
    return built


def _check_stream(cfg: Any) -> None:
    if getattr(cfg, "stream", None) is not None:
        streaming.check(cfg.data, cfg.stream, cfg.steps, cfg.eval.exact_match)


def _check_loss(cfg: Any) -> None:
    if hasattr(cfg, "loss") and not cfg.loss.plain and cfg.parallel.tp > 1:
        raise UserError(
            "a loss that looks at all logits of a token needs the whole vocabulary on each process",
            where="loss, parallel.tp",
            fix="set parallel.tp=1, or leave the loss as it is",
        )


def _check_parallel(cfg: Any, world: int) -> int:
    """How many processes share one copy of the parameters."""
    replicate, shard, cp, tp = shape = sizes(cfg.parallel, world)
    replicas.check(cfg, shape)
    if cfg.memory.offload and default_device().type != "cuda":
        raise UserError("offload needs a GPU to offload from", where="memory.offload", fix="set memory.offload=false")
    budget.check(cfg, world)
    per_forward = cfg.batch.micro_rows * replicate * shard
    if getattr(cfg.batch, "rows", per_forward) % per_forward:
        raise UserError(
            f"batch.rows {cfg.batch.rows} is no multiple of batch.micro_rows {cfg.batch.micro_rows} x "
            f"{replicate * shard} data-parallel processes (parallel.dp_replicate x parallel.dp_shard)",
            where="batch.rows, batch.micro_rows",
            fix=_rows_fix(cfg.batch.rows, cfg.batch.micro_rows, replicate * shard),
        )
    in_backward.check(cfg, per_forward, shape)
    lisa.check(cfg, shape)
    return shard * cp * tp


def _rows_fix(rows: int, micro_rows: int, processes: int) -> str:
    """Fewer rows a forward train the same where that is enough; other rows a step do not."""
    other = f"batch.rows to a multiple of {micro_rows * processes}"
    if rows % processes:
        return f"set {other}"
    fewer = max(n for n in range(1, micro_rows + 1) if rows // processes % n == 0)
    return f"set batch.micro_rows={fewer}, which trains the same, or {other}"


def _backend(cfg: Any, built: LanguageModel, device: torch.device) -> str:
    """The attention backend of a model; UserError where the one that is asked for cannot serve it."""
    arch, asked = built.arch, cfg.model.attention
    chosen = choose_backend(asked, device, DTYPES[cfg.dtype], arch.softcap, arch.sinks)
    cut = "parallel.cp_style" if cfg.parallel.cp > 1 and cfg.parallel.cp_style == "allgather" else None
    masked = cut or ("diffusion" if hasattr(cfg, "diffusion") else None)  # where every score has a mask of its own
    if chosen != "flex" or masked is None:
        return chosen
    if asked == "flex":
        where, fix = f"model.attention, {masked}", "use auto or reference" + (", or cp_style=ulysses" if cut else "")
        raise UserError("attention backend 'flex' serves whole rows that look back", where=where, fix=fix)
    return "reference"


def _head(cfg: Any) -> heads.Head | None:
    """What stands in place of the vocabulary in a model that scores."""
    section = getattr(cfg, "reward", None)
    return (heads.STEPS if section.kind == "steps" else heads.SEQUENCE) if isinstance(section, Reward) else None


def fingerprint(cfg: Any, rows: data.Datasets) -> dict[str, Any]:
    """What must be equal for a run to be continued: base model, data, order and size of a step."""
    folder = hub.resolve(cfg.model.path)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:  # a header holds names, shapes and places of tensors; reading all takes minutes
            digest.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(1 << 16))
    found = {
        "model": digest.hexdigest(),
        "data": rows.train.fingerprint,
        "data.seq_len": cfg.data.seq_len,
        "data.pack": getattr(cfg.data, "pack", True),
        "batch.rows": getattr(cfg.batch, "rows", None),
        "seed": cfg.seed,
        "dtype": cfg.dtype,
    }
    if code := own.mark(cfg.model.code):
        found["model.code"] = code.sha256
    if getattr(cfg, "qat", None) is not None:
        found["qat"] = dataclasses.asdict(cfg.qat)
    for key in ("quantize", "fp8"):
        if getattr(cfg.model, key):
            found[f"model.{key}"] = getattr(cfg.model, key)
    if getattr(cfg, "mtp", Mtp()).depth:
        found["mtp"] = dataclasses.asdict(cfg.mtp)
    if getattr(getattr(cfg, "optim", None), "states", None) is not None:
        found["optim.states"] = cfg.optim.states
    if cfg.tokenizer.add_tokens:
        found["tokenizer.add_tokens"] = list(cfg.tokenizer.add_tokens)
    if getattr(cfg, "lora", None) is not None:
        found |= adapters.fingerprint(cfg.lora) | relora.fingerprint(cfg)
    if hasattr(cfg, "dpo"):
        found["dpo"] = dataclasses.asdict(cfg.dpo)
    if isinstance(section := getattr(cfg, "reward", None), Reward):
        found["reward"] = dataclasses.asdict(section)
    if getattr(getattr(cfg, "lisa", None), "layers", 0):
        found["lisa"] = dataclasses.asdict(cfg.lisa)
    if hasattr(cfg, "train"):
        found |= {"train.only": cfg.train.only, "train.freeze": cfg.train.freeze}
    return found


def tokenizer(cfg: Any) -> Tokenizer:
    """The tokenizer of a recipe's config, with the chat template its data asks for."""
    with about("tokenizer.path" if cfg.tokenizer.path else "model.path"):
        found = tokenizers.from_pretrained(hub.resolve(cfg.tokenizer.path or cfg.model.path))
    found.add_tokens(cfg.tokenizer.add_tokens)
    if cfg.tokenizer.pad_token is not None:
        found.set_pad(cfg.tokenizer.pad_token)
    if cfg.data.template is not None:
        found.chat_template = tokenizers.load_template(cfg.data.template)
    return found


def datasets(cfg: Any, tokenizer: Tokenizer) -> data.Datasets | streaming.Streamed:
    """Training and held-out rows of a recipe's config, or its stream, opened; UserError where a row has a token that
    the model does not."""
    if (stream := getattr(cfg, "stream", None)) is not None:
        size = {"rows": cfg.batch.rows, "vocab": _known_tokens(cfg, tokenizer)}
        return streaming.open_stream(cfg.data, stream, tokenizer, seed=cfg.seed, **size)
    asked = wanted(cfg)
    found = data.load(cfg.data, tokenizer, seed=cfg.seed, wanted=asked)
    highest = max(rows.max_token_id for rows in (found.train, *found.eval.values()))
    known = _known_tokens(cfg, tokenizer)
    if highest >= known:
        raise UserError(
            f"the tokenizer gives token {highest:,}, the model has embeddings for {known:,} tokens",
            where="tokenizer.path" if cfg.tokenizer.path else str(hub.resolve(cfg.model.path) / "config.json"),
            fix="use the tokenizer that belongs to the model",
        )
    if asked.kind == "train":
        return found
    mismatched = asked.kind == "rated" and cfg.dpo.mismatched
    options = {"mismatched": mismatched, "seed": cfg.seed, "seq_len": cfg.data.seq_len}
    options["shared"] = (getattr(cfg, "dpo", None) or cfg.reward).share_prompt
    sets = {name: data.Preferences(rows, **options) for name, rows in found.eval.items()}
    return data.Datasets(data.Preferences(found.train, **options), sets, found.report)


def _known_tokens(cfg: Any, tokenizer: Tokenizer) -> int:
    """How many tokens the model has an embedding for."""
    added = [tokenizer.special_tokens[token] + 1 for token in cfg.tokenizer.add_tokens]
    with about("model.code"):
        return max([own.arch(cfg.model, cfg.model.path).vocab, *added])


def wanted(cfg: Any) -> data.Wanted:
    """What a recipe makes of a row of its data, by the sections of its config."""
    if hasattr(cfg, "dpo"):
        return data.Wanted("rated" if cfg.dpo.rated else "pairs")
    if isinstance(section := getattr(cfg, "reward", None), Reward):
        return data.Wanted(section.kind, section.separator, section.last_step)
    return data.Wanted()


def loader(
    cfg: Any, documents: data.Documents | data.Preferences | streaming.StreamPlan, tokenizer: Tokenizer, run: Run
) -> data.Loader | streaming.StreamLoader:
    """Training batches of a recipe's config for this process."""
    run.wait_for_all()  # one process of each machine may have prepared the data for the others
    if isinstance(documents, streaming.StreamPlan):
        return streaming.StreamLoader(
            documents,
            micro_rows=cfg.batch.micro_rows,
            pad_id=tokenizer.pad_id or 0,
            workers=cfg.stream.workers,
            rank=run.data_rank,
            ranks=run.data_ranks,
            pin=run.device.type == "cuda",
            share=run.share if run.data["cp"].size() > 1 else None,
            gather=partial(exchange, run) if run.world > 1 else None,
        )
    return data.Loader(
        documents,
        seq_len=cfg.data.seq_len,
        rows=cfg.batch.rows,
        micro_rows=cfg.batch.micro_rows,
        seed=cfg.seed,
        pack=cfg.data.pack,
        pad_id=tokenizer.pad_id or 0,
        rank=run.data_rank,
        ranks=run.data_ranks,
        pin=run.device.type == "cuda",
        share=run.share if run.data["cp"].size() > 1 else None,
    )
