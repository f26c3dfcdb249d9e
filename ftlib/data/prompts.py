"""Prompts for reinforcement learning: rows of any file -> messages, token ids, and the columns a reward looks at."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftlib.data import thinking
from ftlib.data.collect import examples
from ftlib.data.examples import no_weights
from ftlib.data.messages import MESSAGES
from ftlib.data.packing import share, shuffled
from ftlib.data.records import NO_WEIGHTS
from ftlib.data.report import UNRENDERED, counted, spread
from ftlib.data.sources import files_of, read_all
from ftlib.errors import UserError
from ftlib.sections import Source
from ftlib.sections.rl import Prompts as Section
from ftlib.tokenizers import Rendered, Tokenizer

COLUMNS = ("prompt", *MESSAGES, "question", "problem", "query", "instruction", "input")  # of a question, by rank


@dataclass(frozen=True)
class Prompt:
    """A question: `messages`, their `ids` up to where the model goes on, and the row's other `columns`.

    `text`: what the row asks, where that is text and one turn answers it. Rewards get text then, as TRL's do.
    """

    messages: list[dict[str, Any]]
    ids: list[int]
    columns: dict[str, Any]
    where: str
    tools: list[dict[str, Any]] | None = None
    text: str | None = None


@dataclass
class Asked:
    """Training prompts: a list for each source, and the sources' weights."""

    sources: list[list[Prompt]]
    weights: list[float]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokens, columns and weights: equal fingerprints give the same steps."""
        digest = hashlib.sha256(repr(self.weights).encode())
        for prompt in (prompt for source in self.sources for prompt in source):
            digest.update(repr((prompt.ids, sorted(prompt.columns.items()))).encode())
        return digest.hexdigest()


@dataclass
class PromptSets:
    """What a run asks while it trains, what it is evaluated on, and lines about both."""

    train: Asked
    eval: list[Prompt]
    report: list[str]

    @property
    def columns(self) -> set[str]:
        """Columns that every prompt has: what rewards can ask for."""
        every = [prompt.columns.keys() for source in self.train.sources for prompt in source]
        return set.intersection(*map(set, [*every, *(prompt.columns for prompt in self.eval)]))


def load(
    cfg: Section, tokenizer: Tokenizer, room: int, seed: int, tools: list[dict[str, Any]] | None = None,
    several: bool = False,
) -> PromptSets:  # fmt: skip
    """Every prompt of the config's sources; those that leave less than `room` tokens of a row are dropped and counted.

    `tools`: what the chat template shows the model, for rows that bring none. `several`: something answers the model,
    so a completion has several turns and is no text. UserError with file and line.
    """
    report: list[str] = []
    sources = [
        _read(source, cfg, tokenizer, room, tools, report, f"data.sources[{i}]") for i, source in enumerate(cfg.sources)
    ]
    held_out: list[Prompt] = []
    if isinstance(cfg.eval, (int, float)):
        sources, held_out = _hold_out(sources, cfg.eval, seed)
        if held_out:
            report.append(f"held out: {len(held_out):,} prompts of these")
    else:
        for i, source in enumerate(cfg.eval or ()):
            held_out += _read(source, cfg, tokenizer, room, tools, report, f"data.eval[{i}]")
    if several:
        held_out, *sources = [[replace(prompt, text=None) for prompt in part] for part in (held_out, *sources)]
    return PromptSets(Asked(sources, [source.weight for source in cfg.sources]), held_out, report)


class PromptLoader:
    """Endless steps of `per_step` prompts in an order that depends on (seed, epoch) alone; the state is a position."""

    def __init__(self, asked: Asked, per_step: int, seed: int) -> None:
        self.asked, self.per_step, self.seed = asked, per_step, seed
        self._epoch = self._next = 0
        if not sum(len(self._order(epoch)) for epoch in range(2)):
            raise UserError("an epoch has no prompts", where="data.sources", fix="raise the weights of the sources")

    def __next__(self) -> list[Prompt]:
        """The next step's prompts; a step may reach into the next epoch."""
        return self.take(self.per_step)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        found: list[Prompt] = []
        while len(found) < count:
            order = self._order(self._epoch)
            more = order[self._next : self._next + count - len(found)]
            found += [self.asked.sources[source][index] for source, index in more]
            self._next += len(more)
            if self._next >= len(order):
                self._epoch, self._next = self._epoch + 1, 0
        return found

    def peek(self) -> list[Prompt]:
        """The next step's prompts, left where they are."""
        place = self.state_dict()
        found = next(self)
        self.load_state_dict(place)
        return found

    def steps_per_epoch(self) -> float:
        """Optimizer steps of the first epoch."""
        return len(self._order(0)) / self.per_step

    def state_dict(self) -> dict[str, int]:
        """{"epoch", "next"}: the position of the next prompt."""
        return {"epoch": self._epoch, "next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a `state_dict`. UserError if it is no position."""
        values = [state.get(key) for key in ("epoch", "next")]
        if not all(isinstance(value, int) and value >= 0 for value in values):
            raise UserError(f"{state} is no position in the prompts", fix="resume from another checkpoint")
        self._epoch, self._next = values

    def _order(self, epoch: int) -> list[tuple[int, int]]:
        members = []
        for number, (prompts, weight) in enumerate(zip(self.asked.sources, self.asked.weights, strict=True)):
            members += [(number, int(i)) for i in share(len(prompts), weight, self.seed, number, epoch)]
        return [members[i] for i in shuffled(len(members), self.seed, epoch)]


def _read(
    source: Source, cfg: Section, tokenizer: Tokenizer, room: int, tools: list | None, report: list[str], key: str
) -> list[Prompt]:
    try:
        _, rows = examples(_as_prompts(source), key)
        found, dropped, unwritten, lengths = [], 0, 0, []
        for row in rows:
            prompt, lost = _prompt(row, cfg, tokenizer, tools)
            unwritten += lost
            lengths.append(len(prompt.ids))
            if len(prompt.ids) + room > cfg.seq_len:
                dropped += 1
            else:
                found.append(prompt)
    except UserError as error:
        raise UserError(error.what, where=error.where or key, fix=error.fix) from None
    if not found:
        raise UserError(
            f"no prompt of {source.path} leaves {room:,} of data.seq_len={cfg.seq_len:,} tokens for the completion; "
            f"the shortest has {min(lengths, default=0):,}",
            where=key,
            fix="raise data.seq_len or lower rollout.max_new_tokens",
        )
    report.append(f"{source.path}: {len(found):,} prompts, tokens {spread(np.array(lengths))}")
    if dropped:
        report.append(f"  {dropped:,} dropped: with {room:,} new tokens longer than data.seq_len={cfg.seq_len:,}")
    if unwritten:
        report.append(f"  warning: the reasoning of {counted(unwritten, 'message')} {UNRENDERED}")
    return found


def _as_prompts(source: Source) -> Source:
    """A source whose format was not named: its first column that can be a question is one, all others are columns."""
    if source.format != "auto":
        return source
    if "prompt" in source.columns:
        return replace(source, format="prompt")
    first = next(read_all(files_of(source), source.split)).row.value
    names = {name.lower(): name for name in first} | {name: name for name in first} if isinstance(first, dict) else {}
    column = next((names[name] for name in COLUMNS if name in names and first[names[name]]), None)
    return source if column is None else replace(source, format="prompt", columns={**source.columns, "prompt": column})


def _prompt(row: Any, cfg: Section, tokenizer: Tokenizer, tools: list | None) -> tuple[Prompt, int]:
    """A row's prompt, and how many of its messages reason in words that the template leaves out."""
    messages, columns = list(no_weights(row, NO_WEIGHTS).messages or ()), dict(row.extra)
    while messages and messages[-1]["role"] == "assistant":  # the answer to imitate is here one to compare with
        columns.setdefault("answer", messages.pop()["content"])
    if not messages:
        raise UserError("it has no prompt", where=row.where)
    if cfg.system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": cfg.system})
    tools = row.tools or tools
    text = tokenizer.apply_chat_template(messages, tools, add_generation_prompt=True, tokenize=False)
    prompt = Prompt(messages, tokenizer.encode(text), columns, row.where, tools, (row.record or {}).get("prompt"))
    return prompt, thinking.unwritten(messages, Rendered(text, []))


def _hold_out(sources: list[list[Prompt]], amount: float, seed: int) -> tuple[list[list[Prompt]], list[Prompt]]:
    places = [(number, i) for number, prompts in enumerate(sources) for i in range(len(prompts))]
    count = round(amount * len(places)) if amount < 1 else int(amount)
    if count >= len(places):
        what = f"holding out {count:,} of {len(places):,} prompts leaves none to train on"
        raise UserError(what, where="data.eval", fix="hold out fewer")
    chosen = {places[i] for i in shuffled(len(places), seed, 3)[:count]}
    train = [[p for i, p in enumerate(prompts) if (n, i) not in chosen] for n, prompts in enumerate(sources)]
    return train, [sources[number][i] for number, i in sorted(chosen)]
