"""Rows of other kinds: without a template, and those that supervised training has no use for, such as preferences."""

import re
from typing import Any

from ftlib.data.examples import MEND, Example, Shape, cell, no_weights, shown
from ftlib.data.messages import MESSAGES, WEIGHTS, add_turns, read_tools, weight_of
from ftlib.data.pairs import SYSTEM, opening
from ftlib.errors import UserError

CHOSEN = (
    ("chosen", "rejected"), ("chosen_messages", "rejected_messages"), ("chosen_response", "rejected_response"),
)  # fmt: skip
RATED = (("prompt", "completion"), ("instruction", "completion"), ("question", "completion"))
NO_WEIGHTS = "preferences and prompts"
_HH = re.compile(r"\n\n(Human|Assistant): ?")
_ANSWERS = ("chosen", "rejected", "completion", "label", "completions", "labels", "answers")
_PROMPTS = (*MESSAGES, "prompt", "question", "instruction", "input")


def read_text(row: dict[str, Any], shape: Shape, where: str) -> Example:
    return Example(where, text=shape.text(row, "text", where))


def read_segments(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """segments: [{text, label}]; what is labelled true is trained, as much as its `weight` says; nothing is added."""
    segments = shape.value(row, "segments", where)
    good = isinstance(segments, list) and segments and all(
        isinstance(s, dict) and isinstance(s.get("text"), str) and isinstance(s.get("label"), bool) for s in segments
    )
    if not good:
        raise UserError("column 'segments' must be a list of {text: …, label: true or false}", where=where)
    found: list[tuple[str, bool | float]] = []
    for number, segment in enumerate(segments, 1):
        try:
            weight = weight_of(segment, ("label", *WEIGHTS))
        except UserError as error:
            raise UserError(f"segment {number}: {error.what}", where=where, fix=error.fix) from None
        found.append((segment["text"], segment["label"] if weight == segment["label"] else weight))
    return Example(where, segments=found)


def read_pretokenized(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """input_ids, and where they are there labels (-100: not trained; else the token itself) and attention_mask."""
    ids = shape.value(row, "input_ids", where)
    labels, mask = (row.get(shape.column(name)) for name in ("labels", "attention_mask"))
    for name, value in (("input_ids", ids), ("labels", labels), ("attention_mask", mask)):
        if value is not None and (not isinstance(value, list) or not all(type(i) is int for i in value)):
            raise UserError(f"column {shape.column(name)!r} must be a list of whole numbers", where=where)
        if value is not None and len(value) != len(ids):
            raise UserError(f"{shape.column(name)!r} has {len(value)} entries, input_ids has {len(ids)}", where=where)
    odd = next((number for number in ids if not 0 <= number < 1 << 31), None)
    if odd is not None:
        raise UserError(f"{odd} in {shape.column('input_ids')!r} is no token id", where=where)
    kept = [i for i in range(len(ids)) if mask is None or mask[i]]
    trained = [labels is None or labels[i] != -100 for i in kept]
    wrong = next((i for i in kept if labels and labels[i] not in (-100, ids[i])), None)
    if wrong is not None:
        what = f"labels[{wrong}] is {labels[wrong]}, neither -100 nor the token {ids[wrong]}"
        raise UserError(what, where=where, fix="labels must not be shifted: that is done in training")
    return Example(where, ids=[ids[i] for i in kept], trained_ids=trained)


def read_oasst(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """A tree of messages: the conversation along the best-ranked replies that nobody deleted."""
    example, node = shape.example(where), shape.value(row, "prompt", where)
    while node:
        if not isinstance(node, dict) or not isinstance(node.get("text"), str):
            raise UserError("a message of the tree has no text", where=where)
        example.add("user" if node.get("role") == "prompter" else "assistant", node["text"])
        replies = [reply for reply in node.get("replies") or () if not reply.get("deleted")]
        node = min(replies, key=lambda r: r["rank"] if r.get("rank") is not None else len(replies), default=None)
    return example


def read_preference(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """`messages`: the prompt; `record`: chosen and rejected, each a list of messages that follows it."""
    sides = []
    for name in ("chosen", "rejected"):
        value = shape.value(row, name, where)
        if isinstance(value, str):
            turns = _HH.split(value)
            value = [{"role": "assistant", "content": value}]
            if len(turns) > 2:
                roles = {"Human": "user", "Assistant": "assistant"}
                said = zip(turns[1::2], turns[2::2], strict=True)
                value = [{"role": roles[who], "content": text.strip()} for who, text in said]
        said = add_turns(shape.example(where), value, shape, shape.column(name))
        sides.append(no_weights(said, NO_WEIGHTS).messages)
    chosen, rejected = sides
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    example = _prompt(row, shape, where)
    if not common or not example.messages:
        for message in chosen[:common]:
            example.add(**message)
    example.record = {"chosen": chosen[common:], "rejected": rejected[common:]}
    return example


def read_ranked(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """answers: [{answer, rank}]: the best against the worst."""
    answers = shape.value(row, "answers", where)
    good = isinstance(answers, list) and all(isinstance(a, dict) and "rank" in a for a in answers)
    if not good or len(answers) < 2:
        raise UserError("column 'answers' must be a list of at least two {answer, rank}", where=where)
    best, *_, worst = sorted(answers, key=lambda a: a["rank"])
    example = _prompt(row, shape, where)
    sides = (("chosen", best), ("rejected", worst))
    example.record = {name: [{"role": "assistant", "content": a.get("answer")}] for name, a in sides}
    return example


def read_unpaired(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """An answer and whether it is a good one: `record` has `completion` (messages) and `label`."""
    example = _prompt(row, shape, where)
    completion = row.get(shape.column("completion"))
    if completion is None:
        completion = [example.messages.pop()] if example.messages else None
        del example.trained[-1:]
    elif isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    elif isinstance(completion, list) and not example.messages and len(completion) > 1:  # the prompt is in there
        add_turns(example, completion, shape, shape.column("completion"))
        completion = [no_weights(example, NO_WEIGHTS).messages.pop()]
        del example.trained[-1:]
    elif isinstance(completion, list):
        turns = add_turns(shape.example(where), completion, shape, shape.column("completion"))
        completion = no_weights(turns, NO_WEIGHTS).messages
    if not isinstance(completion, list):
        raise UserError("it has no answer that the label could be about", where=where)
    label = shape.value(row, "label", where)
    if label not in (0, 1, True, False):
        what = f"column {shape.column('label')!r} must be true or false, here it is {shown(label)}"
        raise UserError(what, where=where)
    example.record = {"completion": completion, "label": bool(label)}
    return example


def read_stepwise(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """Steps of an answer, each right or wrong: `record` has `completions` and `labels`."""
    steps, labels = (shape.value(row, name, where) for name in ("completions", "labels"))
    for name, value in (("completions", steps), ("labels", labels)):
        if not isinstance(value, list):
            what = f"column {shape.column(name)!r} must be a list, an entry a step, here it is {shown(value)}"
            raise UserError(what, where=where, fix=f"{MEND}, or set data.on_bad_row=skip")
    if len(steps) != len(labels):
        what = f"{shape.column('completions')!r} has {len(steps)} steps and {shape.column('labels')!r} {len(labels)}"
        raise UserError(f"{what}: each step needs its label", where=where, fix=f"{MEND}, or set data.on_bad_row=skip")
    example = _prompt(row, shape, where)
    example.record = {"completions": steps, "labels": labels}
    return example


def read_prompt(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """A question without its answer; whatever else the row has is in `extra`, for the reward. `record` has its text as
    `prompt`, where it is no list of messages."""
    example = _prompt(row, shape, where)
    if not example.messages:
        raise UserError("it has no prompt", where=where)
    example.record = example.record or {}
    own = ("prompt", "messages", "system", "history", "role", "content")  # all others are the rewards', under new names
    named = {ours: theirs for ours, theirs in shape.columns.items() if ours not in own}
    rest = {key: value for key, value in example.extra.items() if key not in named.values()}
    example.extra = rest | {ours: cell(row, theirs, where) for ours, theirs in named.items()}
    return example


def read_fields(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """Rows for evaluation that hold no conversation: their columns as they are."""
    return Example(where, record=dict(row))


def _prompt(row: dict[str, Any], shape: Shape, where: str) -> Example:
    example = opening(row, shape, where)
    example.tools = read_tools(row.get("tools", row.get("function")), where)
    columns = [shape.columns["prompt"]] if "prompt" in shape.columns else [c for c in _PROMPTS if row.get(c)]
    for column in columns[:1]:
        value = cell(row, column, where)
        while isinstance(value, list) and value and isinstance(value[0], list):  # turns of a benchmark
            value = [turn for part in value for turn in part]
        if isinstance(value, str) and column not in MESSAGES:
            more = row.get("input") if column == "instruction" else None
            text = "\n".join(filter(None, (value, more)))
            if not row.get(shape.column("history")):
                example.record = {"prompt": text}
            example.add("user", text)
        else:
            add_turns(example, value, shape, column)
    no_weights(example, NO_WEIGHTS)
    used = {*columns[:1], *map(shape.column, _ANSWERS), "tools", "function", "input", "history", *SYSTEM}
    example.extra = {key: value for key, value in row.items() if key not in used}
    return example
