"""Answer held-out conversations and compare with their reference answer, word for word."""

from collections.abc import Sequence
from dataclasses import dataclass

from ftlib.generation import Engine, SamplingParams
from ftlib.tokenizers import Tokenizer


@dataclass(frozen=True)
class Answer:
    """One held-out conversation: what was asked, what the reference says, what the model said."""

    prompt: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        return self.given.strip() == self.expected.strip()


def answered(messages: list[dict] | None) -> bool:
    """Whether a row is a conversation that ends with an answer to something."""
    last = messages[-1] if messages and len(messages) > 1 else {}
    return last.get("role") == "assistant" and bool(last.get("content"))


def answer(
    engine: Engine, tokenizer: Tokenizer, conversations: Sequence[list[dict]], max_new_tokens: int
) -> list[Answer]:
    """Greedy answers to the last assistant turn of each conversation (messages that end with it)."""
    prompts = [
        tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True) for messages in conversations
    ]
    given = _greedy(engine, tokenizer, prompts, max_new_tokens)
    return [
        Answer(messages[-2].get("content") or "", messages[-1]["content"], text)
        for messages, text in zip(conversations, given, strict=True)
    ]


def say(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, *, continued: bool = False
) -> list[str]:
    """Greedy answers to user messages, or continuations of texts."""
    if continued:
        return _greedy(engine, tokenizer, [tokenizer.encode(text) for text in prompts], max_new_tokens)
    asked = [[{"role": "user", "content": text}] for text in prompts]
    tokens = [tokenizer.apply_chat_template(messages, add_generation_prompt=True) for messages in asked]
    return _greedy(engine, tokenizer, tokens, max_new_tokens)


def _greedy(engine: Engine, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    params = SamplingParams(max_new_tokens, temperature=0, stop_ids=tokenizer.stop_ids)
    return [tokenizer.decode(done[0].token_ids, skip_special=True) for done in engine.generate(prompts, params)]


def score(answers: Sequence[Answer]) -> float:
    """Share of answers that equal their reference."""
    return sum(a.right for a in answers) / max(1, len(answers))
