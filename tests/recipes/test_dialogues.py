"""Tools within a completion: what the model is shown, what is run, and what of it all is trained."""

import json
from dataclasses import replace

import pytest

from ftlib import tokenizers
from ftlib.data import prompts
from ftlib.errors import UserError
from ftlib.generation import Completion
from ftlib.models import hub
from ftlib.rl import environments
from ftlib.rl.environments import Dialogues, hidden, schemas
from ftlib.rl.rollouts import Rollouts
from ftlib.sections import Source
from ftlib.sections.rl import Dialogue, Prompts, Rollout

OWN = '''
def add(a: int, b: int) -> int:
    """Sum of two numbers."""
    while a > 99:
        pass
    return a + b

def wait(seconds: int, self: str = ""):
    """Names that are also those of what calls it; and nothing that JSON can hold."""
    return seconds if seconds else {1, 2}

def sleeps(messages, columns):
    while True:
        pass

def breaks(messages, columns):
    raise RuntimeError("boom")

def breaks_later(messages, columns, seen=[]):
    seen.append(messages)
    if len(seen) > 1:
        raise RuntimeError("boom")
'''


class Scripted:
    """An engine that says what it is told to: for each call a list of texts."""

    def __init__(self, tokenizer, *turns):
        self.tokenizer, self.turns, self.asked = tokenizer, list(turns), []

    def generate(self, asked, params, n=1):
        self.asked.append(asked)
        drawn = [self.tokenizer.encode(f"{text}<|im_end|>") for text in self.turns.pop(0)]
        done = [Completion(ids, [-1.0] * len(ids), "stop") for ids in drawn]
        return [done[i * n : (i + 1) * n] for i in range(len(asked))]


def call(a, b):
    return f'<tool_call>{{"name": "add", "arguments": {json.dumps({"a": a, "b": b})}}}</tool_call>'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(tokenizer, config of the dialogue, the one prompt)."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "own.py").write_text(OWN)
    (folder / "rows.jsonl").write_text('{"prompt": "2 + 3?"}\n')
    tokenizer = tokenizers.from_pretrained(hub.resolve("ftlib:demo/model"))
    cfg = Dialogue(tools=(f"{folder / 'own.py'}:add",), timeout_s=3)
    sets = prompts.load(Prompts(sources=(Source(path=str(folder / "rows.jsonl")),)), tokenizer, 9, 0, schemas(cfg))
    return tokenizer, cfg, sets.train.sources[0][0]


def test_what_tools_say_is_read_and_never_trained(made):
    """A call that is answered, one that hangs beside one that is answered, and an answer without any."""
    tokenizer, cfg, prompt = made
    assert '"description": "Sum of two numbers."' in tokenizer.decode(prompt.ids)
    turns = ["Let me see." + call(2, 3), call(100, 1) + call(4, 4), "5"], ["It is 5.", "It is 8."]
    engine = Scripted(tokenizer, *turns)
    with Dialogues(cfg) as dialogues:
        samples = Rollouts(Rollout(max_new_tokens=400), engine, tokenizer, dialogues)([prompt], 3, (0, 1, 0, 0))
    said = [[(m["role"], m["content"]) for m in sample.messages] for sample in samples]
    assert said[0] == [("assistant", turns[0][0]), ("tool", "5"), ("assistant", "It is 5.")]
    assert [role for role, _ in said[1]] == ["assistant", "tool", "tool", "assistant"]
    assert said[1][1][1].startswith("error: ") and "no answer within 3 s" in said[1][1][1] and said[1][2][1] == "8"
    assert said[2] == [("assistant", "5")]
    assert [(s.calls, s.failed_calls, s.finish) for s in samples] == [(1, 0, "end"), (1, 1, "end"), (0, 0, "end")]
    for sample, first, last in zip(samples, turns[0], [*turns[1], None], strict=True):
        drawn = [token for token, mine in zip(sample.ids, sample.drawn, strict=True) if mine]
        assert tokenizer.decode(drawn) == "".join(f"{text}<|im_end|>" for text in (first, last) if text)
        whole = [*prompt.messages, *sample.messages]
        text = tokenizer.apply_chat_template(whole, prompt.tools, tokenize=False)
        assert tokenizer.decode([*prompt.ids, *sample.ids]) == text.removesuffix("\n")
    for asked, sample in zip(engine.asked[1], samples, strict=False):
        rest = [*prompt.ids, *sample.ids][len(asked) :]
        assert [*prompt.ids, *sample.ids][: len(asked)] == asked and tokenizer.decode(rest).startswith("It is")


def test_failures_are_said_and_end_nothing_else(made):
    """An environment that raises is told once; a tool's odd result is an error that the model reads."""
    tokenizer, cfg, prompt = made
    own, said = cfg.tools[0].removesuffix(":add"), []
    turns = [f'<tool_call>{{"name": "wait", "arguments": {{"seconds": {n}}}}}</tool_call>' for n in (3, 0)]
    with Dialogues(Dialogue(tools=(f"{own}:wait",), timeout_s=3)) as dialogues:
        engine = Scripted(tokenizer, turns, ["a", "b"])
        samples = Rollouts(Rollout(max_new_tokens=400), engine, tokenizer, dialogues)([prompt], 2, (0, 1, 0, 0))
    assert samples[0].messages[1]["content"] == "3" and samples[0].failed_calls == 0
    assert "not JSON serializable" in samples[1].messages[1]["content"] and samples[1].failed_calls == 1
    with Dialogues(Dialogue(environment=f"{own}:breaks", timeout_s=3), said.append) as dialogues:
        engine = Scripted(tokenizer, ["a", "b"])
        samples = Rollouts(Rollout(max_new_tokens=400), engine, tokenizer, dialogues)([prompt], 2, (0, 1, 0, 0))
    assert [s.failed_calls for s in samples] == [1, 1] and len(said) == 1 and "RuntimeError: boom" in said[0]


def test_an_environment_that_always_hangs_ends_the_run(made):
    tokenizer, cfg, prompt = made
    own, count = cfg.tools[0].removesuffix(":add"), environments.MOST_SLOW
    with Dialogues(Dialogue(environment=f"{own}:sleeps", timeout_s=0.1), lambda line: None) as dialogues:
        engine = Scripted(tokenizer, ["a"] * (count + 1))
        with pytest.raises(UserError, match=f"no answer within 0.1 s, {count} times in a row") as error:
            Rollouts(Rollout(max_new_tokens=400), engine, tokenizer, dialogues)([prompt], count + 1, (0, 1, 0, 0))
    assert error.value.where == "dialogue.environment"


def test_an_environment_that_never_answers_ends_the_run(made):
    """The row's columns are named: what it asks for may have become the prompt."""
    tokenizer, cfg, prompt = made
    prompt = replace(prompt, columns={"answer": "5", "level": 1})
    own, count, said = cfg.tools[0].removesuffix(":add"), environments.MOST_FAILED, []
    with Dialogues(Dialogue(environment=f"{own}:breaks", timeout_s=3), said.append) as dialogues:
        engine = Scripted(tokenizer, ["a"] * count)
        with pytest.raises(UserError, match=f"each of its first {count} calls.*RuntimeError: boom") as error:
            Rollouts(Rollout(max_new_tokens=400), engine, tokenizer, dialogues)([prompt], count, (0, 1, 0, 0))
    assert error.value.where == "dialogue.environment" and "answer, level" in error.value.fix
    assert len(said) == 1 and "the row has answer, level" in said[0]
    with Dialogues(Dialogue(environment=f"{own}:breaks_later", timeout_s=3), said.append) as dialogues:
        engine = Scripted(tokenizer, ["a"] * (count + 1))
        samples = Rollouts(Rollout(max_new_tokens=400), engine, tokenizer, dialogues)([prompt], count + 1, (0, 1, 0, 0))
    assert sum(sample.failed_calls for sample in samples) == count  # one that has answered may fail often


def test_tools_that_the_template_does_not_show_are_told(made):
    tokenizer, cfg, prompt = made
    assert hidden(prompt, tokenizer) == []
    plain = tokenizers.from_pretrained(hub.resolve("ftlib:demo/model"))
    plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    sets = prompts.load(Prompts(sources=(Source(path=prompt.where.rpartition(":")[0]),)), plain, 9, 0, schemas(cfg))
    (line,) = hidden(sets.train.sources[0][0], plain)
    assert "does not show the model its tools" in line and "data.template" in line
