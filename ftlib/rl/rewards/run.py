"""All rewards of a config over the completions of a step: in processes, with time limits, every failure counted."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ftlib.errors import Problems, UserError, about, did_you_mean
from ftlib.rl.rewards.text import said
from ftlib.rl.rewards.worker import Died, Failed, TooSlow, Worker, find
from ftlib.sections.rl import Reward

PASSED = ("prompts", "completions", "completion_ids")  # what every function is offered besides the columns
MOST_EMPTY = 5  # times that rewards are asked and none scores anything, before the run ends
MOST_LOST = 3  # processes that a function may hang or crash in a step, before the rest of its completions is left out
Values = list[float | None]
Messages = list[dict[str, Any]]
Scorer = Callable[[list[Messages], list[Messages]], list[float]]  # prompts, completions -> a score for each


class Rewards:
    """`rewards(prompts, completions, completion_ids, columns)` -> a list of values per reward, in the config's order.

    `models` are those of rewards that name one, by their place in the config. `counts` holds what went wrong since it
    was last cleared: `timeouts`, `errors`, `unscorable`.
    """

    def __init__(
        self, cfg: Sequence[Reward], say: Callable[[str], None] = print, models: Mapping[int, Scorer] | None = None
    ) -> None:
        self.cfg, self.names, self.say = cfg, names(cfg), say
        self.weights = [reward.weight for reward in cfg]
        self.counts: Counter[str] = Counter()
        self._models = dict(models or {})
        self._workers = [[Worker("rewards", r.fn) for _ in range(r.workers)] if r.fn else [] for r in cfg]
        self._signatures = [_parameters(find("rewards", r.fn)) if r.fn else set() for r in cfg]
        self._told: set[str] = set()
        self._empty: int | None = 0  # times that nothing was scored; None once anything was

    def __call__(
        self,
        prompts: list[Messages],
        completions: list[Messages],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
        texts: Sequence[str | None] = (),
    ) -> list[Values]:
        """Rewards of every completion: [function][completion]. UserError if a function fails on all of them, or if none
        has scored anything in the first `MOST_EMPTY` calls.

        `texts`: of each prompt its text, None of one that is messages. A function gets such a prompt and its completion
        as text, as TRL's do; a model gets the messages.
        """
        texts = texts or [None] * len(prompts)
        seen = {
            "prompts": [prompt if text is None else text for prompt, text in zip(prompts, texts, strict=True)],
            "completions": [one if text is None else said(one) for one, text in zip(completions, texts, strict=True)],
        }
        offered = {**seen, "completion_ids": completion_ids, **columns}
        found = [
            self._scores(i, prompts, completions) if i in self._models else self._one(i, offered, len(completions))
            for i in range(len(self.cfg))
        ]
        if self.cfg and completions:
            self._scored(any(value is not None for values in found for value in values))
        return found

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in (worker for pool in self._workers for worker in pool):
            worker.stop()

    def _scores(self, number: int, prompts: list[Messages], completions: list[Messages]) -> Values:
        """Those of a model."""
        reward = self.cfg[number]
        values = [_value(score, reward.model) for score in self._models[number](prompts, completions)]
        self._note(reward, values, [])
        return values

    def _one(self, number: int, offered: dict[str, list[Any]], count: int) -> Values:
        reward, pool, wanted = self.cfg[number], self._workers[number], self._signatures[number]
        given = {k: v for k, v in offered.items() if (wanted is None or k in wanted) and k not in reward.args}
        size = max(1, math.ceil(count / len(pool)))
        spans = [range(at, min(at + size, count)) for at in range(0, count, size)]
        failed: list[Failed | TooSlow] = []
        with ThreadPoolExecutor(len(pool)) as threads:
            work = (threads.submit(self._chunk, reward, w, given, s, failed) for w, s in zip(pool, spans, strict=False))
            values = [value for future in list(work) for value in future.result()]
        self._note(reward, values, failed)
        return values

    def _chunk(self, reward: Reward, worker: Worker, given: dict, span: range, failed: list) -> Values:
        """A stretch of completions in one call; if that fails, one by one, so that one bad answer costs only itself.
        `failed` is that of all workers of the function: after `MOST_LOST` no more is asked of it in this step."""
        try:
            return self._call(reward, worker, given, span, reward.timeout_s * max(1, len(span)) ** 0.5)
        except (Failed, TooSlow):
            found: Values = []
            for i in span:
                lost = [error for error in failed if isinstance(error, (Died, TooSlow))]
                if len(lost) >= MOST_LOST:
                    failed.append(lost[0])
                    found.append(None)
                    continue
                try:
                    found += self._call(reward, worker, given, range(i, i + 1), reward.timeout_s)
                except (Failed, TooSlow) as error:
                    failed.append(error)
                    found.append(None)
            return found

    def _call(self, reward: Reward, worker: Worker, given: dict, span: range, seconds: float) -> Values:
        part = {key: values[span.start : span.stop] for key, values in given.items()}
        values = worker.call(seconds, **part, **reward.args)
        if not isinstance(values, (list, tuple)) or len(values) != len(span):
            got = f"{len(values)} values" if isinstance(values, (list, tuple)) else type(values).__name__
            fix = "return a list with a number, or None, for each completion"
            what = f"{reward.fn} returned {got} for {len(span)} completions"
            raise UserError(what, where=self._key(reward), fix=fix)
        with about(self._key(reward)):
            return [_value(value, reward.fn) for value in values]

    def _scored(self, any_value: bool) -> None:
        """A run whose rewards never score anything has nothing to learn from, however long it lasts."""
        if any_value or self._empty is None:
            self._empty = None
            return
        self._empty += 1
        if self._empty == MOST_EMPTY:
            what = f"no reward has scored any completion in {MOST_EMPTY} rounds: each gave None, NaN or an infinity"
            raise UserError(what, where="rewards", fix="return a number for what can be scored")

    def _key(self, reward: Reward) -> str:
        return f"rewards[{self.cfg.index(reward)}].fn"

    def _note(self, reward: Reward, values: Values, failed: Sequence[Failed | TooSlow]) -> None:
        slow, raised = ([str(e) for e in failed if isinstance(e, kind)] for kind in (TooSlow, Failed))
        self.counts["timeouts"] += len(slow)
        self.counts["errors"] += len(raised)
        self.counts["unscorable"] += sum(value is None for value in values)
        if failed and len(failed) == len(values):
            more = "raise its timeout_s" if slow else "let it return None for what it cannot score"
            raise UserError(
                f"it failed on every completion: {failed[0]}",
                where=self._key(reward),
                fix=f"mend the function, or {more}",
            )
        lost = sum(isinstance(error, (Died, TooSlow)) for error in failed)
        rest = f" ({MOST_LOST} times in one step: the rest of it was not asked)" if lost > MOST_LOST else ""
        for text in slow[:1] + raised[:1]:
            self._tell(text + rest)
        if not failed and values and all(value is None for value in values):
            self._tell(f"{reward.fn or reward.model} gave None, NaN or an infinity for every completion of a step")

    def _tell(self, text: str) -> None:
        if text not in self._told and len(self._told) < 20:
            self._told.add(text)
            self.say(f"reward: {text}; such completions count as unscorable")


def names(cfg: Sequence[Reward]) -> list[str]:
    """A name for each reward, as its metrics are called: the function's own, numbered where two are alike."""
    plain = [reward.fn.rpartition(":")[2] if reward.fn else "model" for reward in cfg]
    return [f"{name}_{plain[:i].count(name) + 1}" if name in plain[:i] else name for i, name in enumerate(plain)]


def check(cfg: Sequence[Reward], columns: set[str]) -> None:
    """UserError when a reward does not exist or wants what the rows (`columns`) and its `args` do not give."""
    problems = [str(error) for i, reward in enumerate(cfg) for error in _problems(reward, columns, i)]
    if problems:
        raise Problems(problems)


def _problems(reward: Reward, columns: set[str], number: int) -> list[UserError]:
    key = f"rewards[{number}]"
    if reward.fn is None:
        return []  # a model: ftlib.rl.reward_model looks at it
    try:
        function = find("rewards", reward.fn)
    except UserError as error:
        return [UserError(error.what, where=f"{key}.fn", fix=error.fix)]
    if reward.fn == "code_tests":
        from ftlib.rl import sandbox

        try:
            sandbox.check(reward.args.get("allow", False), reward.args.get("unsafe_local", False))
        except UserError as error:
            return [error]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return []
    required = {
        name for name, p in signature.parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }  # fmt: skip
    from ftlib.data.prompts import COLUMNS

    missing = required - {*PASSED, *columns} - reward.args.keys()
    found = []
    if missing:
        have = f"every row has {', '.join(sorted(columns))}" if columns else "no column is in every row"
        asked = "; the question is in prompts" if missing & {*COLUMNS} else ""
        fix = f"{have}{asked}; give it in {key}.args, or rename a column"
        what = f"{reward.fn} needs {', '.join(sorted(missing))}{did_you_mean(min(missing), {*PASSED, *columns})}"
        found.append(UserError(what, where=key, fix=fix))
    wanted = _parameters(function)
    own = {name for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD} - {*PASSED}
    strange = reward.args.keys() - own
    if strange and (wanted is not None or reward.fn in _builtin()):
        known = ", ".join(sorted(own)) or "none"
        found.append(
            UserError(f"{reward.fn} has no {', '.join(sorted(strange))}", where=f"{key}.args", fix=f"it has {known}")
        )
    return found


def _builtin() -> dict[str, Callable]:
    from ftlib.rl.rewards import BUILTIN

    return BUILTIN


def _parameters(function: Callable) -> set[str] | None:
    """Keyword arguments that a function takes; None: any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}


def _value(value: object, name: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} returned {value!r} as a reward", fix="return a number, or None") from None
    return number if math.isfinite(number) else None
