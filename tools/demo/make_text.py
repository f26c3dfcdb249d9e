"""Writes the text the demo model is trained on: the same bytes for the same seed.

    python tools/demo/make_text.py OUT_FOLDER [--chats 48000] [--stories 2500] [--seed 0]

`pretrain_chat.jsonl.gz` holds conversations ({"messages": […]}, some with `tools`), `pretrain_stories.jsonl.gz` running
text ({"text": "…"}). Standard library only. What is never in it, so that later stages have something new to learn: a
sum whose two operands both lie in skills.HELD_OUT (50..89), a difference of numbers above 50 outside tool calls, and
the wording of orders.
"""

import argparse
import gzip
import io
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from skills import operands, turn
from stories import story
from words import pick, weighted

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Works out a sum.",
        "parameters": {"type": "object", "properties": {"sum": {"type": "string"}}, "required": ["sum"]},
    },
}


def conversation(rng: random.Random) -> dict:
    """One to four questions with answers, at times under a system message that changes nothing or asks for capitals."""
    turns = [turn(rng) for _ in range(weighted(rng, {1: 5, 2: 3, 3: 2, 4: 1}))]
    messages = []
    manner = weighted(rng, {"": 88, "You are a helpful assistant.": 8, "Answer in capital letters.": 4})
    if manner:
        messages.append({"role": "system", "content": manner})
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        answer = answer.upper() if "capital" in manner and "{" not in answer else answer
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def tool_conversation(rng: random.Random) -> dict:
    """A sum worked out by the calculator, and an answer from its result."""
    a, b = sorted(operands(rng), reverse=True)
    sign, result = pick(rng, (("+", a + b), ("-", a - b)))
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"sum": f"{a} {sign} {b}"}}}
    messages = [
        {"role": "user", "content": f"Use the calculator: {a} {sign} {b}"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": str(result)},
        {"role": "assistant", "content": f"It is {result}."},
    ]
    return {"messages": messages, "tools": [CALCULATOR]}


def chats(count: int, seed: int) -> Iterator[dict]:
    """`count` conversations, one in a hundred with a tool."""
    rng = random.Random(f"demo chats {seed}")
    for _ in range(count):
        yield weighted(rng, {conversation: 99, tool_conversation: 1})(rng)


def stories(count: int, seed: int) -> Iterator[dict]:
    """`count` short stories."""
    rng = random.Random(f"demo stories {seed}")
    for _ in range(count):
        yield {"text": story(rng)}


def write_jsonl(path: Path, items: Iterable[dict]) -> None:
    """One JSON object a line; gzipped without a time stamp where the name ends in .gz: equal rows are equal bytes."""
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()
    if path.suffix == ".gz":
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9, mtime=0, filename="") as stream:
            stream.write(text)
        text = packed.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)


def write_text(folder: Path, chat_count: int = 48_000, story_count: int = 2_500, seed: int = 0) -> None:
    """The two files."""
    write_jsonl(folder / "pretrain_chat.jsonl.gz", chats(chat_count, seed))
    write_jsonl(folder / "pretrain_stories.jsonl.gz", stories(story_count, seed))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--chats", type=int, default=48_000)
    parser.add_argument("--stories", type=int, default=2_500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_text(args.out, args.chats, args.stories, args.seed)


if __name__ == "__main__":
    main()
