"""How large things should be: lengths of the rows, what fits into memory, and so the numbers of `tune init`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ftlib import data, preflight, tokenizers
from ftlib.data import sources
from ftlib.errors import UserError
from ftlib.models import LanguageModel, hub, load, own, remote
from ftlib.models.remote import size
from ftlib.sections import Data, Source

SAMPLE = 2000  # rows that are tokenised
LONGEST = 1 << 24


@dataclass
class Known:
    """What could be learnt of a model without its weights; None where it could not be reached."""

    model: LanguageModel | None  # on meta
    tokenizer: Any
    reason: str = ""  # why it could not


@dataclass
class Rows:
    """A file of rows: how many, and the lengths of the first of them in tokens."""

    count: int
    lengths: np.ndarray
    summary: str
    lines: list[str]
    template: str | None  # that the config has to name, as the tokenizer has none
    kind: str  # `train`: texts to imitate; `pairs` of answers; `rated` ones; answers in `steps`


@dataclass
class Plan:
    """The numbers of a config, and what the user should know about them."""

    seq_len: int
    rows: int
    micro_rows: int
    epochs: int
    held_out: str
    dtype: str
    truncate: bool = False  # prompts, rather than leave rows out
    notes: list[str] = field(default_factory=list)


def look_at(name: str, code: str | None = None) -> Known:
    """Config and tokenizer of a model: local, cached or fetched (small files only). Unsupported models raise.

    `code`: as `model.code`.
    """
    decoder = own.find(code)
    try:
        is_id = hub.HUB_ID.fullmatch(name) and not Path(name).expanduser().exists()
        folder = remote.fetch(name, weights=False) if is_id else hub.resolve(name)
    except UserError as error:
        if "cannot be reached" not in error.what:
            raise
        return Known(None, _Guess(), f"{name} cannot be reached: lengths are guessed, 4 characters a token")
    return Known(load.build(folder, torch.bfloat16, decoder), tokenizers.from_pretrained(folder))


class _Guess:
    """Stands in for a tokenizer: four characters a token, eight tokens a message for what the template adds."""

    bos_id, eos_id = None, 0
    chat_template = "unknown"

    def encode_with_offsets(self, text: str, special: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        spans = [(i, min(i + 4, len(text))) for i in range(0, len(text), 4)]
        return [0] * len(spans), spans

    def render_with_spans(self, messages: list[dict], tools: list[dict] | None = None, **more: Any) -> Any:
        text, spans = "", []
        for i, message in enumerate(messages):
            text += " " * 32
            start = len(text)
            text += str(message["content"] or "") + "</s>"
            spans += [SimpleNamespace(start=start, end=len(text), message_index=i)]
        return SimpleNamespace(text=text, spans=spans)


def measure(path: str, known: Known, kinds: Sequence[str] = ("train", "pairs", "rated")) -> Rows:
    """Read the rows, tokenise the first of them as the first of `kinds` that they are. Raises what loading them for
    training would raise."""
    tokenizer, template = known.tokenizer, None
    file = sources.locate(path)
    count = sum(1 for _ in sources.read(file))
    if known.model is not None and tokenizer.chat_template is None:
        tokenizer.chat_template, template = tokenizers.load_template("chatml"), "chatml"
    cfg = Data(sources=(Source(path=path, split=f"[:{SAMPLE}]"),), seq_len=LONGEST)
    kind, found = _first_kind(cfg, tokenizer, kinds)
    source = found.report.sources[0]
    lengths = np.array(source.lengths) if kind == "train" else data.Preferences(found.train).lengths
    about = "" if known.model is not None else "about "
    middle = f"{about}{np.median(lengths):,.0f} tokens in the median row"
    summary = f"{count:,} rows of {source.format}, {middle}, at most {lengths.max():,}"
    return Rows(count, lengths, summary, [known.reason] * bool(known.reason) + found.report.lines()[:-1],
                template if source.format != "text" else None, kind)  # fmt: skip


def _first_kind(cfg: Data, tokenizer: Any, kinds: Sequence[str]) -> tuple[str, data.Datasets]:
    first: UserError | None = None
    for kind in kinds:
        try:
            return kind, data.load(cfg, tokenizer, seed=0, wanted=data.Wanted(kind))
        except UserError as error:
            first = first or error
    raise first


def plan(known: Known, rows: Rows, *, full: bool) -> Plan:
    """Numbers for this machine. A batch of 16 rows or fewer, at least 20 steps an epoch where there are rows enough."""
    where, have, _ = preflight.available()
    gpu = torch.cuda.is_available()
    answers = 2 if rows.kind == "pairs" else 1  # of a row, each of which may be as long as the model reads
    limit = answers * (known.model.arch.max_positions or 0) if known.model is not None else None
    seq_len = _seq_len(rows.lengths, limit)
    total = rows.lengths.clip(max=seq_len).mean() * rows.count
    batch = 16
    while batch > 1 and total / seq_len / batch < 20:
        batch //= 2
    held_out = "0.05" if rows.count >= 200 else str(max(1, rows.count // 10)) if rows.count >= 10 else ""
    made = Plan(seq_len, batch, 1, 1 if rows.count > 10_000 else 3, held_out, "bf16" if gpu else "fp32")
    over = float((rows.lengths > seq_len).mean())
    made.truncate = over > 0.01 and rows.kind in ("pairs", "rated")
    if over:
        done = "lose the beginning of their prompt (overlong: truncate)" if made.truncate else "will be left out"
        made.notes.append(f"{over:.1%} of the rows are longer than seq_len {seq_len} and {done}")
    if known.model is not None:
        fixed, per_row = _memory(known.model, seq_len, full, 2 if gpu else 4)
        while made.micro_rows < batch and fixed + 2 * made.micro_rows * per_row < 0.8 * have:
            made.micro_rows *= 2
        need = fixed + made.micro_rows * per_row
        made.notes.append(f"memory: about {size(need)} of the {size(have)} of {where}")
        if need > have:
            made.notes.append("this will not fit: take a smaller model or another machine, or lower data.seq_len")
    return made


def _seq_len(lengths: np.ndarray, limit: int | None) -> int:
    """A multiple of 64 that holds nearly every row, and several of them where they are short."""
    longest = lengths.max() if lengths.max() <= 4096 else np.percentile(lengths, 99)
    wanted = max(256, int(-(-longest // 64) * 64))
    return min(wanted, limit or wanted)


def _memory(model: LanguageModel, seq_len: int, full: bool, width: int) -> tuple[float, float]:
    """Bytes that do not depend on the batch, and bytes a row, with every block recomputed in backward."""
    arch = model.arch
    count = sum(p.numel() for p in model.model.parameters()) + (0 if arch.tied else model.lm_head.weight.numel())
    fixed = count * width * (4 if full else 1.1)
    block = max(preflight.block_elements(arch, layer, seq_len) for layer in arch.layers)
    return fixed, seq_len * width * ((len(arch.layers) + 2) * arch.dim + 2 * block)
