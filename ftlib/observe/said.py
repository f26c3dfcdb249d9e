"""An answer to look at: a line for people, and the same as a row of samples.jsonl."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Said:
    """`str()` is the line that is printed; `row` joins samples.jsonl beside the step, unless it is empty."""

    line: str
    row: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.line


def said(prompt: str, answer: str, of: str, reference: str | None = None) -> Said:
    """An answer to a prompt `of` a held-out set or of `eval.prompts`, beside the reference answer if there is one."""
    row, line = {"set": of, "prompt": prompt, "answer": answer}, f"  {prompt!r} -> {answer.strip()!r}"
    if reference is None:
        return Said(line, row)
    verdict = "right" if answer.strip() == reference.strip() else f"expected {reference!r}"
    return Said(f"{line}  ({verdict})", row | {"reference": reference})
