"""OpenAI's completion requests, read strictly: what is not supported is refused by name, never ignored."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftlib.errors import UserError, did_you_mean
from ftlib.generation.params import SamplingParams, listed
from ftlib.tokenizers import Tokenizer

COMMON = ("model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "logprobs")
OURS = ("top_k", "min_p")  # not OpenAI's; as vLLM names them
CHAT = ("messages", "max_completion_tokens", "chat_template_kwargs")
TEXT = ("prompt",)
# Accepted with the value that changes nothing.
NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"),
    "top_logprobs": (0,), "functions": ([],), "modalities": (["text"],),
}  # fmt: skip
# About the account or the service, not about the answer.
UNREAD = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
MOST_CHOICES, MOST_STOPS = 128, 16


class ApiError(Exception):
    """A request that is answered with an error; `param` names the key at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status

    @property
    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": None}}


@dataclass(frozen=True)
class Job:
    """What a request asks for."""

    chat: bool
    prompts: list[list[int]]
    params: SamplingParams
    n: int
    stops: tuple[str, ...]
    stream: bool
    usage: bool  # a last chunk of a stream says how many tokens there were
    logprobs: bool


def read(body: Any, chat: bool, tokenizer: Tokenizer, name: str, context: int) -> Job:
    """The job of a request's JSON. `name`: of the model; `context`: most tokens of prompt and answer together."""
    if not isinstance(body, dict):
        raise ApiError("the body is no JSON object")
    _known(body, (*COMMON, *OURS, *(CHAT if chat else TEXT)))
    given = {key: value for key, value in body.items() if value is not None}
    if given.get("model", name) != name:
        raise ApiError(f"there is no model {given['model']!r} here, only {name!r}", "model", 404)
    prompts = _chat(given, tokenizer) if chat else _prompts(given, tokenizer)
    n = _number(given, "n", 1, int, lambda x: 1 <= x <= MOST_CHOICES, f"from 1 to {MOST_CHOICES}")
    stream = _flag(given, "stream", False)
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or (options and not stream):
        raise ApiError("stream_options is an object, and goes with stream", "stream_options")
    stops = given.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops) or len(stops) > MOST_STOPS:
        raise ApiError(f"stop is a text, or a list of at most {MOST_STOPS}", "stop")
    params = _params(given, chat, tokenizer, context - max(map(len, prompts)))
    usage = bool(options.get("include_usage"))
    return Job(chat, prompts, params, n, tuple(stops), stream, usage, _logprobs(given, chat))


def _logprobs(given: dict, chat: bool) -> bool:
    """Whether the log-probabilities of drawn tokens are wanted; those of others are not to be had."""
    if chat:
        return _flag(given, "logprobs", False)
    wanted = "0: of the drawn tokens, not of others"
    return "logprobs" in given and _number(given, "logprobs", 0, int, lambda x: x == 0, wanted) == 0


def _known(body: dict, names: tuple[str, ...]) -> None:
    for key, value in body.items():
        if key in names or key in UNREAD or value is None:
            continue
        if key not in NEUTRAL:
            raise ApiError(f"unknown parameter {key!r}{did_you_mean(key, names)}", key)
        if value not in NEUTRAL[key]:
            raise ApiError(f"{key} is not supported", key)


def _params(given: dict, chat: bool, tokenizer: Tokenizer, room: int) -> SamplingParams:
    if room < 1:
        raise ApiError("the prompt leaves no room for an answer", "messages" if chat else "prompt")
    key = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    limit = _number(given, key, room if chat else min(16, room), int, lambda x: x >= 1, "at least 1")
    if limit > room:
        raise ApiError(f"{limit} tokens are asked for, the prompt leaves room for {room}", key)
    seed = _number(given, "seed", secrets.randbits(62), int, lambda x: True, "")
    own = listed(tokenizer.files.generation)
    rules = {
        "temperature": (1.0, lambda x: 0 <= x <= 10, "from 0 to 10"),
        "top_p": (1.0, lambda x: 0 < x <= 1, "above 0, at most 1"),
        "min_p": (0.0, lambda x: 0 <= x <= 1, "from 0 to 1"),
    }
    found = {
        name: _number(given, name, own.get(name, usual), float, fits, say) for name, (usual, fits, say) in rules.items()
    }
    top_k = _number(given, "top_k", own.get("top_k", 0), int, lambda x: x >= -1, "at least 0")
    return SamplingParams(limit, top_k=max(0, top_k), seed=seed, stop_ids=tokenizer.stop_ids, **found)


def _number(given: dict, key: str, usual: Any, kind: type, fits: Callable[[Any], bool], say: str) -> Any:
    value = given.get(key, usual)
    right = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if not right or not fits(value):
        raise ApiError(f"{key} is {'a number' if kind is float else 'an integer'}{say and f', {say}'}", key)
    return kind(value)


def _flag(given: dict, key: str, usual: bool) -> bool:
    if not isinstance(given.get(key, usual), bool):
        raise ApiError(f"{key} is true or false", key)
    return given.get(key, usual)


def _prompts(given: dict, tokenizer: Tokenizer) -> list[list[int]]:
    """Texts or token ids, one or several."""
    prompt = given.get("prompt")
    single = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int))
    found = []
    for item in [prompt] if single else prompt if isinstance(prompt, list) else []:
        if isinstance(item, str):
            item = tokenizer.encode(item, bos=tokenizer.bos_id is not None)
        elif not isinstance(item, list) or not all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in item):
            raise ApiError("prompt is a text, a list of token ids, or a list of either", "prompt")
        found.append(item)
    if not found or not all(found):
        raise ApiError("prompt is missing or empty", "prompt")
    return found


def _chat(given: dict, tokenizer: Tokenizer) -> list[list[int]]:
    """The conversation as ids, ready for an answer."""
    if tokenizer.chat_template is None:
        raise ApiError("this model has no chat template: use /v1/completions", "messages")
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages is a list of messages", "messages")
    variables = given.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise ApiError("chat_template_kwargs is an object", "chat_template_kwargs")
    try:
        talk = [_message(message) for message in messages]
        return [tokenizer.apply_chat_template(talk, add_generation_prompt=True, **variables)]
    except (UserError, TypeError) as error:
        raise ApiError(str(error), "messages") from None


def _message(message: Any) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError("a message is an object with role and content", "messages")
    content = message.get("content")
    if isinstance(content, list):  # parts
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise ApiError("content has parts that are no text", "messages")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ApiError("content is a text", "messages")
    return {"role": message["role"], "content": content}
