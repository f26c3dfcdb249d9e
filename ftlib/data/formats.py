"""Which shape the rows of a source have: detected from the columns, or named in the config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ftlib import plugins
from ftlib.data import pairs, records
from ftlib.data.examples import ROLES, Example, Shape, listed, nested
from ftlib.data.messages import ALIASES, MESSAGES, is_pair, read_messages
from ftlib.errors import UserError, did_you_mean

Columns = Mapping[str, str]
Read = Callable[[dict[str, Any], Shape, str], Example | list[Example]]
_ANSWERS = ("answer", "antwort", "respuesta", "a", "output", "completion", "reply", "response", "target", "bot")


@dataclass(frozen=True)
class Format:
    """`match(row, columns)` gives the deciding columns (ours -> the file's), or nothing if the row is no such row.

    `kind`: what the rows are good for; supervised training takes `train` alone.
    """

    match: Callable[[dict[str, Any], Columns], dict[str, str]]
    read: Read
    columns: tuple[str, ...]
    needs: str
    kind: str = "train"


def choose_shape(
    row: dict[str, Any],
    format: str,
    columns: dict[str, str],
    roles: dict[str, str],
    key: str,
    train_on: tuple[str, ...] = ("assistant",),
) -> Shape:
    """The shape of a source, from its first row and what the config says (`key`: its place there, for errors)."""
    for theirs, ours in roles.items():
        if ours not in ROLES:
            raise UserError(
                f"role {theirs!r} is mapped to {ours!r}", where=f"{key}.roles", fix=f"one of: {', '.join(ROLES)}"
            )
    if format != "auto" and format not in FORMATS:
        return _own(format, columns, {**ALIASES, **roles}, key, train_on)
    row = nested(row, columns)
    for ours, theirs in columns.items():
        if ours not in MESSAGE_COLUMNS and theirs not in row:
            what = f"column {theirs!r} not found{did_you_mean(theirs, row)}; the file has {listed(row)}"
            fix = "name one of these, or leave columns out where they have the format's own names"
            raise UserError(what, where=f"{key}.columns.{ours}", fix=fix)
    name, found = _matched(row, format, columns) or _matched_by_letters(row, format, columns)
    if name is None:
        raise _unmatched(row, format, key)
    for ours in columns:
        if ours not in FORMATS[name].columns and kind(name) != "prompt":  # whose other columns go to the rewards
            raise UserError(
                f"format {name} has no column {ours!r}{did_you_mean(ours, FORMATS[name].columns)}",
                where=f"{key}.columns",
                fix=f"its columns: {', '.join(FORMATS[name].columns)}",
            )
    evidence = "named in the config"
    if format == "auto":
        decided = [theirs for ours, theirs in found.items() if ours not in _OPTIONAL]
        evidence = f"it has {' and '.join(dict.fromkeys(decided))}"
    return Shape(name, {**found, **columns}, {**ALIASES, **roles}, evidence, train_on, FORMATS[name].read)


def _matched(row: dict[str, Any], format: str, columns: Columns) -> tuple[str, dict[str, str]] | None:
    """The first format that a row has, or the one that is asked for, and its deciding columns (ours -> the file's)."""
    tried = ((name, FORMATS[name].match(row, columns)) for name in (FORMATS if format == "auto" else [format]))
    return next(((name, found) for name, found in tried if found), None)


def _matched_by_letters(row: dict[str, Any], format: str, columns: Columns) -> tuple[str | None, dict[str, str]]:
    """The same whether letters are large or small, of a row that fits none otherwise: `Question` and `Response`."""
    names = {name.lower(): name for name in reversed(row)} | {name: name for name in row}
    name, found = _matched({small: row[name] for small, name in names.items()}, format, columns) or (None, {})
    more = {ours: names[ours] for ours in _OPTIONAL if name and ours in FORMATS[name].columns and ours in names}
    return name, {ours: names[theirs] for ours, theirs in found.items()} | more


def unused(row: dict[str, Any], shape: Shape) -> list[str]:
    """Columns of a row that nothing is made of; for prompts and functions of the user, which get the row, none."""
    if shape.format not in FORMATS or kind(shape.format) in ("prompt", "evaluation"):
        return []
    watched = _Watched(nested(row, shape.columns))
    try:
        read_examples(watched, shape, "")
    except UserError:  # said, with its place, where the row is read
        return []
    known = {part for theirs in shape.columns.values() for part in (theirs, theirs.partition(".")[0])}
    return [name for name in row if name not in watched.seen | known]


class _Watched(dict):
    """A row that notes which of its columns are looked at."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.seen.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.add(name)
        return super().get(name, default)


def read_examples(row: dict[str, Any], shape: Shape, where: str) -> list[Example]:
    """The records of a row of that shape; `where` is its `file:line`."""
    found = shape.read(nested(row, shape.columns), shape, where)
    return found if isinstance(found, list) else [found]


def read_example(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """The record of a row that holds one."""
    return read_examples(row, shape, where)[0]


def kind(format: str, own: str = "train") -> str:
    """What rows of a format are good for: `train`, `preference`, `unpaired`, `stepwise`, `prompt`, `evaluation`; `own`
    for a function of the user."""
    return FORMATS[format].kind if format in FORMATS else own


def _own(format: str, columns: Columns, roles: Columns, key: str, train_on: tuple[str, ...]) -> Shape:
    """A function of the user: row -> messages, text, or a row of a known format."""
    try:
        function = plugins.find("formats", format, {name: known.read for name, known in FORMATS.items()})
    except UserError as error:
        fix = f"one of: auto, {', '.join(FORMATS)}; or your own as ./file.py:name"
        if ":" in format:
            fix = error.fix or "name a function that is there: ./file.py:name, seen from the working directory"
        what = error.what if ":" in format else f"unknown format {format!r}{did_you_mean(format, ['auto', *FORMATS])}"
        raise UserError(what, where=f"{key}.format", fix=fix) from None
    plugins.check_call(function, ["row"], {}, f"{key}.format")

    def read(row: dict[str, Any], shape: Shape, where: str) -> list[Example]:
        try:
            made = function(row)
        except UserError:
            raise
        except Exception as error:
            what = f"{format} failed: {type(error).__name__}: {error}"
            fix = "mend the function, or let it return None to leave a row out"
            raise UserError(what, where=where, fix=fix) from None
        found = []
        for one in made if isinstance(made, list) and (not made or "role" not in made[0]) else [made]:
            if one is None:
                continue
            one = {"messages": one} if isinstance(one, list) else {"text": one} if isinstance(one, str) else one
            if not isinstance(one, dict):
                what = f"{format} returned {type(one).__name__}"
                fix = "return a row with messages or text, a list of messages, or text"
                raise UserError(what, where=where, fix=fix)
            inner = choose_shape(one, "auto", {}, {}, key, train_on)
            found += read_examples(one, inner, where)
        return found

    return Shape(format, columns, roles, "named in the config", train_on, read)


def _unmatched(row: dict[str, Any], format: str, key: str) -> UserError:
    wanted = "fit no known format" if format == "auto" else f"do not fit the format {format}"
    named = [name for name in FORMATS if FORMATS[name].kind == "train"] if format == "auto" else [format]
    needs = "; ".join(f"{name} needs {FORMATS[name].needs}" for name in named)
    return UserError(
        f"the columns {listed(row)} {wanted} ({needs})",
        where=key,
        fix=f"say which column is which, for example {key}.columns: {_mapping(row, format)}",
    )


def _mapping(row: dict[str, Any], format: str) -> str:
    """`columns` that would fit, where the row has one or two texts and no format is asked for; else an example."""
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if len(texts) == 2 and format in ("auto", "qa"):
        question, answer = reversed(texts) if texts[0].lower() in _ANSWERS else texts
        return f"{{question: {question}, answer: {answer}}}"
    if len(texts) == 1 and format in ("auto", "text"):
        return f"{{text: {texts[0]}}}"
    return "{instruction: question, output: answer}"


def _messages(row: dict[str, Any], columns: Columns) -> dict[str, str]:
    names = [columns["messages"]] if "messages" in columns else MESSAGES
    return next(({"messages": name} for name in names if name in row and not isinstance(row[name], int)), {})


def _sharegpt(row: dict[str, Any], columns: Columns) -> dict[str, str]:
    found = _messages(row, columns)
    turns = row[found["messages"]] if found else None
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    return found if "from" in first or is_pair(first) else {}


def _columns(*alternatives: tuple[str, ...], names: tuple[str, ...] | None = None) -> Callable[..., dict[str, str]]:
    """Any of the alternatives is there; `names` are the format's own names for them, by default the first's."""
    names = names or alternatives[0]

    def match(row: dict[str, Any], columns: Columns) -> dict[str, str]:
        for alternative in alternatives:
            found = {name: columns.get(name, theirs) for name, theirs in zip(names, alternative, strict=True)}
            if all(column in row for column in found.values()):
                return found
        return {}

    return match


def _unpaired(row: dict[str, Any], columns: Columns) -> dict[str, str]:
    label = columns.get("label", "label")
    answered = _messages(row, columns) or _columns(*records.RATED)(row, columns)
    if not answered and isinstance(row.get(columns.get("completion", "completion")), list):
        answered = {"completion": columns.get("completion", "completion")}  # the whole conversation
    return {"label": label, **answered} if isinstance(row.get(label), bool) and answered else {}


def _prompt(row: dict[str, Any], columns: Columns) -> dict[str, str]:
    if "prompt" in columns or "prompt" in row:
        return {"prompt": columns.get("prompt", "prompt")}
    return {"prompt": "question"} if isinstance(row.get("question"), list) else {}


def _asked(row: dict[str, Any], columns: Columns) -> dict[str, str]:
    """Messages that end with a question, and what its answer is judged by."""
    found = _messages(row, columns)
    turns = row[found["messages"]] if found else None
    last = turns[-1] if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else {}
    judged = next((name for name in ("ground_truth", "reward_model") if name in row), None)
    if not found or not judged or last.get("role", last.get("from")) in ("assistant", "gpt"):
        return {}
    return {"prompt": found["messages"], judged: judged}


def _answer(row: dict[str, Any], columns: Columns) -> dict[str, str]:
    """A question and its answer, both text."""
    found = _columns(*pairs.QUESTIONS)(row, columns)
    return {} if found and isinstance(row[found["question"]], list) else found


_OPTIONAL = ("system", "history", "context", "choices", "input", "tools")  # that decide on no format
MESSAGE_COLUMNS = ("role", "content")  # keys of a message, not columns of a row
_CONVERSATION = ("messages", "tools", "system", *MESSAGE_COLUMNS)
_PREFERENCE = ("chosen", "rejected", "prompt", "system", "history")
FORMATS = {  # in the order of detection
    "pretokenized": Format(
        _columns(("input_ids",)), records.read_pretokenized, ("input_ids", "labels", "attention_mask"), "`input_ids`"
    ),
    "segments": Format(_columns(("segments",)), records.read_segments, ("segments",), "`segments`"),
    "preference": Format(
        _columns(*records.CHOSEN), records.read_preference, _PREFERENCE, "`chosen` and `rejected`", "preference"
    ),
    "ranked": Format(
        _columns(("prompt", "answers")), records.read_ranked, ("prompt", "answers"), "`prompt` and `answers`",
        "preference",
    ),
    "stepwise": Format(
        _columns(("completions", "labels")), records.read_stepwise, ("prompt", "completions", "labels"),
        "`completions` and `labels`", "stepwise",
    ),
    "unpaired": Format(
        _unpaired, records.read_unpaired, ("prompt", "completion", "label", "messages"), "an answer and a `label`",
        "unpaired",
    ),
    "judged": Format(_asked, records.read_prompt, ("prompt", "messages"), "`messages` and `ground_truth`", "prompt"),
    "sharegpt": Format(_sharegpt, read_messages, _CONVERSATION, "a list of {from, value} in `conversations`"),
    "messages": Format(_messages, read_messages, _CONVERSATION, "a list in `messages` or `conversations`"),
    "oasst": Format(_columns(("message_tree_id", "prompt")), records.read_oasst, ("prompt",), "`message_tree_id`"),
    "unanswerable": Format(
        _columns(("unanswerable_question",)), pairs.read_unanswerable,
        ("unanswerable_question", "context", "system", "history"), "`unanswerable_question`",
    ),
    "instances": Format(
        _columns(("instruction", "instances")), pairs.read_instances, ("instruction", "instances"),
        "`instruction` and `instances`",
    ),
    "alpaca": Format(
        _columns(*pairs.ALPACA), pairs.read_alpaca, ("instruction", "input", "output", "system", "history"),
        "`instruction` and `output`",
    ),
    "qa": Format(
        _answer, pairs.read_qa, ("question", "answer", "context", "choices", "system", "history"),
        "`question` and `answer`",
    ),
    "completion": Format(
        _columns(*pairs.COMPLETIONS), pairs.read_completion, ("prompt", "completion"), "`prompt` and `completion`"
    ),
    "prompt": Format(_prompt, records.read_prompt, ("prompt", "system"), "`prompt`", "prompt"),
    "text": Format(_columns(("text",)), records.read_text, ("text",), "`text`"),
    "reference": Format(_columns(("id", "ground_truth")), records.read_fields, (), "`ground_truth`", "evaluation"),
    "equivalence": Format(
        _columns(("gold", "pred"), ("a", "b")), records.read_fields, (), "`gold` and `pred`", "evaluation"
    ),
}  # fmt: skip
