"""Tokenizers of every kind behind one interface, and chat templates in a sandbox.

    tokenizer = from_pretrained("Qwen3-0.6B")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
"""

from typing import Any

from ftlib.tokenizers.jinja import render
from ftlib.tokenizers.spans import Rendered, Span
from ftlib.tokenizers.templates import BUILTIN, load_template
from ftlib.tokenizers.tokenizer import Tokenizer, from_pretrained

__all__ = ["BUILTIN", "Rendered", "Span", "Tokenizer", "from_pretrained", "load_template", "render_chat_template"]


def render_chat_template(
    template: str,
    messages: list[dict],
    tools: list[dict] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """A conversation as text, as transformers renders it. `variables`: bos_token, eos_token, what the template reads.

    Runs in a sandbox with a limit on time and size; UserError for whatever the template does wrong.
    """
    known = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt, **variables}
    return render(template, messages, known)[0]
