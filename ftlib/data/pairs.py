"""Rows that hold one question and its answer, under the many names that these columns go by."""

from typing import Any

from ftlib.data.examples import Example, Shape
from ftlib.data.messages import add_turns
from ftlib.errors import UserError

ALPACA = (
    ("instruction", "output"), ("instruction", "response"), ("INSTRUCTION", "RESPONSE"), ("instruction", "revision"),
    ("instruction", "answer"), ("instruction", "completion"),
)  # fmt: skip
QUESTIONS = (
    ("question", "answer"), ("question", "response"), ("query", "response"), ("prompt", "response"),
    ("problem", "solution"), ("message_1", "message_2"), ("question", "solution"), ("question", "explanation"),
    ("question", "ground_truth"), ("article", "summary"), ("prompt", "generation"), ("user", "assistant"),
    ("human", "assistant"), ("input", "output"), ("inputs", "targets"), ("prompt", "answer"),
)  # fmt: skip
COMPLETIONS = (("prompt", "completion"), ("prompt", "canonical_solution"))
SYSTEM, CONTEXT = ("system", "system_prompt"), ("context", "article", "passage")
UNANSWERED = "The text does not say."  # what is learned of a question that its text does not answer


def read_alpaca(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """instruction, input, output, system, history."""
    example = opening(row, shape, where)
    question = shape.text(row, "input", where, needed=False)
    example.add("user", "\n".join(filter(None, (shape.text(row, "instruction", where), question))))
    example.add("assistant", shape.text(row, "output", where))
    return example


def read_qa(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """question, answer, and where they are there context, choices, system, history."""
    example = opening(row, shape, where)
    context = _first(row, shape, "context", CONTEXT)
    question = shape.text(row, "question", where)
    context = "" if context == question else context
    choices = row.get(shape.column("choices"))
    if isinstance(choices, dict):  # {text: […], label: […]}
        choices = [f"{a}. {b}" for a, b in zip(choices.get("label", ()), choices.get("text", ()), strict=False)]
    if choices is not None and not isinstance(choices, list):
        raise UserError(f"column {shape.column('choices')!r} must be a list", where=where)
    example.add("user", "\n\n".join(filter(None, (context, question, "\n".join(map(str, choices or ()))))))
    example.add("assistant", shape.text(row, "answer", where))
    return example


def read_unanswerable(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """A text and a question that it does not answer, to which the answer is to say so."""
    example = opening(row, shape, where)
    context = _first(row, shape, "context", CONTEXT)
    example.add("user", "\n\n".join(filter(None, (context, shape.text(row, "unanswerable_question", where)))))
    example.add("assistant", UNANSWERED)
    return example


def read_instances(row: dict[str, Any], shape: Shape, where: str) -> list[Example]:
    """One instruction with several inputs and outputs: a record for each."""
    instances = shape.value(row, "instances", where)
    if not isinstance(instances, list) or not all(isinstance(one, dict) for one in instances):
        raise UserError(f"column {shape.column('instances')!r} must be a list of objects", where=where)
    return [read_alpaca({**row, **instance}, shape, where) for instance in instances]


def read_completion(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """prompt and completion, as text side by side without a template; as messages, a conversation."""
    prompt, completion = (shape.value(row, name, where) for name in ("prompt", "completion"))
    if isinstance(prompt, list):
        example = add_turns(shape.example(where), prompt, shape, "prompt")
        return add_turns(example, completion, shape, "completion")
    texts = [shape.text(row, name, where) for name in ("prompt", "completion")]
    return Example(where, segments=[(texts[0], False), (texts[1], True)], closed=True)


def opening(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """A conversation with the row's system message and the turns that came before."""
    example = shape.example(where)
    system = _first(row, shape, "system", SYSTEM)
    if system:
        example.add("system", system)
    history = row.get(shape.column("history")) or []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(said, str) for said in turn):
            raise UserError(
                f"column {shape.column('history')!r} must be a list of [question, answer] pairs", where=where
            )
        example.add("user", turn[0])
        example.add("assistant", turn[1])
    return example


def _first(row: dict[str, Any], shape: Shape, name: str, aliases: tuple[str, ...]) -> str:
    names = [shape.columns[name]] if name in shape.columns else aliases
    value = next((row[column] for column in names if row.get(column)), "")
    return value if isinstance(value, str) else ""
