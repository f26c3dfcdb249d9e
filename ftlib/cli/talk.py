"""A conversation with a model: its messages so far, and answers that appear token by token. Imports torch."""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from ftlib.cli import loading, sampling
from ftlib.errors import UserError
from ftlib.generation import Engine, SamplingParams
from ftlib.tokenizers import Tokenizer


@dataclass
class Talk:
    """`answer(text, write)` adds two messages: what was said, and what the model made of it."""

    engine: Engine
    tokenizer: Tokenizer
    params: SamplingParams
    stops: list[str]
    device: str
    messages: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def open(cls, args: argparse.Namespace) -> "Talk":
        """The model that the options of `tune chat` name."""
        model, tokenizer, device, *_ = loading.named(args)
        if tokenizer.chat_template is None:
            fix = "use a model made for conversations, or `tune generate --raw`"
            raise UserError(f"{args.model} has no chat template", fix=fix)
        tokenizer.set_template_args(args.template_arg, "--template-arg")
        params = sampling.params(args, tokenizer, sampling.TALKING)
        talk = cls(Engine(model, compile="graphs"), tokenizer, params, args.stop, device)
        talk.reset(args.system)
        return talk

    def reset(self, system: str | None = None) -> None:
        """Forget everything; the system message stays unless there is a new one (an empty text removes it)."""
        kept = self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else []
        if system is not None:
            kept = [{"role": "system", "content": system}] if system else []
        self.messages = kept

    def undo(self) -> None:
        """Forget the last question and its answer."""
        if len(self.messages) >= 2 and self.messages[-1]["role"] == "assistant":
            del self.messages[-2:]

    def answer(self, said: str, write: Callable[[str], None]) -> str:
        """The model's answer, also handed to `write` piece by piece. Ctrl-C ends it early; what was said stays."""
        asked = [*self.messages, {"role": "user", "content": said}]
        prompt = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True)
        limit = self.engine.model.arch.max_positions
        if limit and len(prompt) >= limit:
            raise UserError(f"the conversation is {len(prompt)} tokens, the model was made for {limit}", fix="/reset")
        pieces: list[str] = []

        def hear(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        try:
            params = dataclasses.replace(self.params, seed=self.params.seed + len(self.messages))
            sampling.draw(self.engine, self.tokenizer, [prompt], params, stops=self.stops, write=hear)
        except KeyboardInterrupt:
            pass
        answer = "".join(pieces)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer
