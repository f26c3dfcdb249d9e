"""Config -> its tokenizer, its rows, and the batches of a process."""

from functools import partial
from typing import Any

from ftlib import data, tokenizers
from ftlib.checkpoint import exchange
from ftlib.data import streaming
from ftlib.data.report import counted
from ftlib.errors import UserError, about
from ftlib.models import hub, own, sizes
from ftlib.parallel.run import Run
from ftlib.sections import Data, Reward
from ftlib.tokenizers import Tokenizer

PADDED = 0.25  # of all positions: from here on a run says how many are padding
_PROBE = "The quick brown fox, 1234567 of them, jumped over; \n\n  def f(x):\n\treturn x['é'] ≠ 0 # Straße, 日本語, мир"


def tokenizer(cfg: Any) -> Tokenizer:
    """The tokenizer of a recipe's config, with the chat template its data asks for."""
    with about("tokenizer.path" if cfg.tokenizer.path else "model.path"):
        found = tokenizers.from_pretrained(hub.resolve(cfg.tokenizer.path or cfg.model.path))
    found.add_tokens(cfg.tokenizer.add_tokens)
    if cfg.tokenizer.pad_token is not None:
        found.set_pad(cfg.tokenizer.pad_token)
    if cfg.data.template is not None:
        found.chat_template = tokenizers.load_template(cfg.data.template)
    found.set_template_args(cfg.data.template_args)
    return found


def other_tokens(cfg: Any, path: str) -> bool:
    """Whether the tokenizer of the model at `path` gives other ids than the config's own; not if it has none there."""
    try:
        theirs = tokenizers.from_pretrained(hub.resolve(path))
    except UserError:
        return False
    ours = tokenizer(cfg)
    return ours.encode(_PROBE, special=False) != theirs.encode(_PROBE, special=False)


def datasets(cfg: Any, tokenizer: Tokenizer) -> data.Datasets | streaming.Streamed:
    """Training and held-out rows of a recipe's config, or its stream, opened; UserError where a row has a token that
    the model does not."""
    if (rows := _asked(cfg, "sizes", "vocab")) and rows < (ids := tokenizer.vocab_size):
        what = f"the tokenizer has {ids:,} ids, and the embedding would have {rows:,} rows"
        raise UserError(what, where="sizes.vocab", fix=f"set it to {ids} or more")
    if (stream := getattr(cfg, "stream", None)) is not None:
        size = {"rows": cfg.batch.rows, "vocab": _known_tokens(cfg, tokenizer)}
        opened = streaming.open_stream(cfg.data, stream, tokenizer, seed=cfg.seed, **size)
        opened.report.totals += _unreached(cfg) + _fit(cfg, tokenizer, cfg.data.seq_len)
        return opened
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
    longest = max(int(rows.lengths.max(initial=0)) for rows in (found.train, *found.eval.values()))
    found.report.totals += _short(cfg, found) + _fit(cfg, tokenizer, longest)
    if asked.kind == "train":
        found.report.totals += _padding(cfg, found.train)
        return found
    mismatched = asked.kind == "rated" and cfg.dpo.mismatched
    options = {"mismatched": mismatched, "seed": cfg.seed, "seq_len": cfg.data.seq_len}
    options["shared"] = (getattr(cfg, "dpo", None) or cfg.reward).share_prompt
    sets = {name: data.Preferences(rows, **options) for name, rows in found.eval.items()}
    train = data.Preferences(found.train, **options)
    found.report.totals += _padding(cfg, train)
    return data.Datasets(train, sets, found.report)


def _unreached(cfg: Any) -> list[str]:
    """A line where a run ends before the last of the shares that it was given."""
    last = max((point.step for point in cfg.stream.mix), default=0)
    if cfg.steps is None or last <= cfg.steps:
        return []
    return [f"warning: stream.mix goes on to step {last:,}, the run (steps) ends at {cfg.steps:,}"]


def _fit(cfg: Any, tokenizer: Tokenizer, longest: int) -> list[str]:
    """Lines where the model is none for this tokenizer, or for documents of `longest` tokens."""
    arch, ids, said = own.arch(cfg.model, cfg.model.path), tokenizer.vocab_size, []
    length = _asked(cfg, "context", "length") or arch.max_positions
    if hasattr(cfg, "sizes") and cfg.from_scratch:
        if cfg.sizes.changed:
            said += sizes.note(hub.read_config(hub.resolve(cfg.model.path)), cfg.sizes)
        if (rows := cfg.sizes.vocab or arch.vocab) > 2 * ids:
            what = f"the tokenizer has {ids:,} ids, the embedding {rows:,} rows, most of which will not learn"
            said.append(f"warning: {what}: sizes.vocab={ids} leaves them out")
    elif cfg.tokenizer.path and other_tokens(cfg, cfg.model.path):
        said.append("warning: tokenizer.path cuts text into other tokens than the model's own, which its weights know")
    if length and longest > length:
        what = f"documents have up to {longest:,} tokens, and the model's range is {length:,}"
        fix = f": context.length={longest} makes it longer" if hasattr(cfg, "context") else ""
        said.append(f"warning: {what} (max_position_embeddings){fix}")
    return said


def _short(cfg: Any, found: data.Datasets) -> list[str]:
    """A line where an epoch does not fill one step."""
    train, batch = found.train, getattr(cfg, "batch", None)
    if not hasattr(cfg, "steps") or not hasattr(batch, "rows"):
        return []
    lengths = data.Preferences(train).lengths if train.compared else train.lengths
    rows = -(-int(lengths.sum()) // cfg.data.seq_len) if cfg.data.pack else len(train)
    if rows >= batch.rows:
        return []
    what = f"batch.rows is {batch.rows}, and all of the data fills about {counted(rows, 'row')} of data.seq_len"
    return [f"warning: {what}: each step has the same documents several times"]


def _padding(cfg: Any, train: data.Documents | data.Preferences) -> list[str]:
    """A line where much of what a step computes is padding."""
    if cfg.data.pack or not hasattr(batch := getattr(cfg, "batch", None), "micro_rows"):
        return []
    share = data.Plan(train, cfg.data.seq_len, cfg.seed, packed=False).padding(batch.micro_rows)
    if share < PADDED:
        return []
    what = f"{share:.0%} of the positions that a step computes are padding, as each document has a row of its own"
    return [f"warning: {what}: data.pack=true puts several into one, and they never see each other"]


def _known_tokens(cfg: Any, tokenizer: Tokenizer) -> int:
    """How many tokens the model has an embedding for."""
    added = [tokenizer.special_tokens[token] + 1 for token in cfg.tokenizer.add_tokens]
    with about("model.path"):
        hub.read_config(hub.resolve(cfg.model.path))
    with about("model.code"):
        return max([_asked(cfg, "sizes", "vocab") or own.arch(cfg.model, cfg.model.path).vocab, *added])


def _asked(cfg: Any, section: str, key: str) -> int | None:
    """What a section of pretraining, if there is one, sets in place of the model's own."""
    return getattr(getattr(cfg, section, None), key, None)


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
        multiple=run.multiple,
    )


def check_data(cfg: Any) -> list[str]:
    """Tokenizer, chat template and every row, as a run would read them, and what it would say of them; raises UserError
    naming file and line."""
    if not isinstance(getattr(cfg, "data", None), Data):
        return []
    return datasets(cfg, tokenizer(cfg)).report.lines()
