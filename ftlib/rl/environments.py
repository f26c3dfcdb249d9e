"""What answers the model within a completion: tools it calls, or a function that plays the other side.

Both are plain functions, run in a process of their own with a time limit. Nothing that they say is trained on.
"""

import inspect
import json
import re
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

from ftlib.data.prompts import Prompt
from ftlib.errors import UserError, about
from ftlib.rl.rewards.worker import Failed, TooSlow, Worker, find
from ftlib.rl.samples import Sample
from ftlib.sections.rl import Dialogue
from ftlib.tokenizers import Tokenizer

CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
MARK = "\u2402answer\u2402"  # stands for what the model said while a template is rendered
MOST_SLOW = 5
MOST_FAILED = 20  # calls of an environment that has never answered, before the run ends
KINDS = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array", dict: "object"}
Messages = list[dict[str, Any]]


class Dialogues:
    """`answer(sample)` asks the environment or runs the tools that the last turn calls.

    An environment that fails ends that completion; the first such failure is said. One that gives no answer in time to
    `MOST_SLOW` completions in a row, or that failed in each of its first `MOST_FAILED` calls, ends the run.
    """

    def __init__(self, cfg: Dialogue, say: Callable[[str], None] = print) -> None:
        self.cfg, self._say, self._told, self._slow = cfg, say, False, 0
        self._failed: int | None = 0  # calls that failed; None once one did not
        self.tools = {find("tools", ref).__name__: Worker("tools", ref) for ref in cfg.tools}
        self.environment = Worker("environments", cfg.environment) if cfg.environment else None

    def answer(self, sample: Sample) -> tuple[Messages | None, int]:
        """Messages that follow the last turn, None to end here; and how many calls failed."""
        if self.environment is None:
            return self._run_tools(sample.messages[-1])
        history = [*sample.prompt.messages, *sample.messages]
        try:
            said = self.environment.call(self.cfg.timeout_s, history, sample.prompt.columns)
        except (Failed, TooSlow) as error:
            self._slow = self._slow + 1 if isinstance(error, TooSlow) else 0
            if self._slow == MOST_SLOW:
                fix = "mend the function, or raise dialogue.timeout_s"
                raise UserError(f"{error}, {MOST_SLOW} times in a row", where="dialogue.environment", fix=fix) from None
            if self._failed is not None:
                self._failed += 1
            columns = ", ".join(sample.prompt.columns) or "no columns"
            if self._failed == MOST_FAILED:
                what = f"it failed on each of its first {MOST_FAILED} calls: {error}"
                fix = f"mend the function; the row has {columns}"
                raise UserError(what, where="dialogue.environment", fix=fix) from None
            if not self._told:
                more = f"such completions end there and count in tool_failures; the row has {columns}"
                self._say(f"dialogue: {error}; {more}")
                self._told = True
            return None, 1
        self._slow, self._failed = 0, None
        if said is None:
            return None, 0
        good = isinstance(said, list) and all(isinstance(m, dict) and m.keys() >= {"role", "content"} for m in said)
        if not good:
            raise UserError(
                f"{self.cfg.environment} returned {said!r}",
                where="dialogue.environment",
                fix="return a list of messages, or None to end",
            )
        return said, 0

    def tail(self, tokenizer: Tokenizer, sample: Sample, said: Messages) -> list[int]:
        """Token ids from the end of the model's turn to where it goes on, as the chat template writes them.

        What the model drew is not rendered again: a mark stands for it, and what the template writes behind that is
        taken, less the end of turn that was drawn.
        """
        turns = [*sample.prompt.messages, *sample.messages[:-1], {"role": "assistant", "content": MARK}, *said]
        text = tokenizer.apply_chat_template(turns, sample.prompt.tools, add_generation_prompt=True, tokenize=False)
        if text.count(MARK) != 1:
            raise UserError("the chat template does not write what the model said as it is", where="data.template")
        tail = text[text.index(MARK) + len(MARK) :]
        end = tokenizer.decode(sample.ids[-1:])
        return tokenizer.encode(tail.removeprefix(end) if tail.startswith(end) else tail)

    @property
    def any(self) -> bool:
        """Whether anything answers."""
        return bool(self.tools) or self.environment is not None

    def __enter__(self) -> "Dialogues":
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in (*self.tools.values(), *filter(None, [self.environment])):
            worker.stop()

    def _run_tools(self, turn: dict[str, Any]) -> tuple[Messages | None, int]:
        said, failed = [], 0
        for text in CALL.findall(turn["content"]):
            try:
                result = self._call(json.loads(text))
                result = result if isinstance(result, str) else json.dumps(result)
            except (ValueError, TypeError, KeyError, Failed, TooSlow) as error:
                result, failed = f"error: {error}", failed + 1
            said.append({"role": "tool", "content": result})
        return said or None, failed

    def _call(self, call: dict[str, Any]) -> Any:
        name, arguments = call["name"], call.get("arguments", {})
        if name not in self.tools:
            raise ValueError(f"there is no tool {name!r}")
        return self.tools[name].call(self.cfg.timeout_s, **arguments)


def schemas(cfg: Dialogue) -> list[dict[str, Any]] | None:
    """What a chat template shows the model of the tools: names, docstrings, arguments; None without tools."""
    found = [_schema(find("tools", ref)) for ref in cfg.tools]
    return found or None


def hidden(prompt: Prompt, tokenizer: Tokenizer) -> list[str]:
    """A line to say where the chat template does not show the model the tools of a prompt."""
    bare = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True)
    if not prompt.tools or bare != prompt.ids:
        return []
    mend = "take a data.template that does, or describe them in data.system"
    return [f"warning: the chat template does not show the model its tools: {mend}"]


def check(cfg: Dialogue) -> None:
    """UserError where a tool or an environment does not exist or has no use here."""
    with about("dialogue.tools"):
        schemas(cfg)
    if cfg.environment is not None:
        with about("dialogue.environment"):
            find("environments", cfg.environment)


def _schema(function: Callable[..., Any]) -> dict[str, Any]:
    """JSON schema of a function from its annotations; its docstring says what it does."""
    if not inspect.getdoc(function):
        raise UserError(f"{function.__name__} has no docstring to show the model", where="dialogue.tools")
    hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    properties = {name: _kind(hints.get(name, str)) for name in parameters}
    required = [name for name, p in parameters.items() if p.default is p.empty]
    inside = {"type": "object", "properties": properties, "required": required}
    described = {"name": function.__name__, "description": inspect.getdoc(function), "parameters": inside}
    return {"type": "function", "function": described}


def _kind(hint: Any) -> dict[str, Any]:
    origin = get_origin(hint) or hint
    made: dict[str, Any] = {"type": KINDS.get(origin, "string")}
    if origin is list and get_args(hint):
        made["items"] = _kind(get_args(hint)[0])
    return made
