"""Prompt styles that differ only in what stands around a message: a table, and the one template made of it."""

from typing import NamedTuple


class Style(NamedTuple):
    """`heads`: role -> what stands in front of its message; `ends`: behind it, `eos` being the tokenizer's EOS.

    `between` follows an assistant's turn and is not trained; `lead` is what every answer begins with, the model's own
    part as the prompt stops before it. A role that is missing is refused.
    """

    heads: dict[str, str]
    ends: dict[str, str]
    between: str = ""
    lead: str = ""
    bos: bool = True
    trim: bool = True


def template(style: Style) -> str:
    """The Jinja template of a style; what the assistant says and its end are marked."""
    lines = ["{{- bos_token -}}"] if style.bos else []
    lines.append("{%- for message in messages -%}")
    content = "message['content'] | trim" if style.trim else "message['content']"
    for number, (role, head) in enumerate(style.heads.items()):
        end = "eos_token" if style.ends[role] == "eos" else _quoted(style.ends[role])
        lines.append(f"{{%- {'elif' if number else 'if'} message['role'] == '{role}' -%}}")
        lead = f"{_quoted(style.lead)} + " if style.lead and role == "assistant" else ""
        said = f"{{{{ {lead}{content} + {end} }}}}"
        if role == "assistant":
            said = f"{{% generation %}}{said}{{% endgeneration %}}" + _literal(style.between)
        lines.append(_literal(head) + said)
    lines += ["{%- else -%}", "{{ raise_exception('this template has no role ' + message['role']) }}", "{%- endif -%}"]
    lines.append("{%- endfor -%}")
    lines.append("{%- if add_generation_prompt -%}" + _literal(style.heads["assistant"]) + "{%- endif -%}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _literal(text: str) -> str:
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _marked(form: str, end: str, roles: dict[str, str] | None = None) -> Style:
    """Every role in the same form, `{}` standing for its name."""
    names = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", **(roles or {})}
    return Style({role: form.format(name) for role, name in names.items()}, dict.fromkeys(names, end))


_COHERE = {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT", "tool": "SYSTEM"}
STYLES = {
    "phi3": Style(
        {role: f"<|{role}|>\n" for role in ("system", "user", "assistant")},
        {"system": "<|end|>\n", "user": "<|end|>\n", "assistant": "<|end|>"}, "\n", bos=False,
    ),
    "phi4": _marked("<|im_start|>{}<|im_sep|>", "<|im_end|>")._replace(bos=False),
    "tulu": Style(
        {"system": "<|system|>\n", "user": "<|user|>\n", "assistant": "<|assistant|>\n"},
        {"system": "\n", "user": "\n", "assistant": "eos"}, "\n", bos=False, trim=False,
    ),
    "metharme": Style(
        {"system": "<|system|>", "user": "<|user|>", "assistant": "<|model|>"},
        {"system": "", "user": "", "assistant": "eos"},
    ),
    "mistral": Style(
        {"system": "[INST] ", "user": "[INST] ", "assistant": ""},
        {"system": "[/INST]", "user": "[/INST]", "assistant": "eos"}, lead=" ",
    ),
    "openchat": Style(
        {"system": "", "user": "GPT4 Correct User: ", "assistant": "GPT4 Correct Assistant:"},
        dict.fromkeys(("system", "user", "assistant"), "<|end_of_turn|>"), lead=" ",
    ),
    "command_r": _marked("<|START_OF_TURN_TOKEN|><|{}_TOKEN|>", "<|END_OF_TURN_TOKEN|>", _COHERE),
    "deepseek": Style(
        {"system": "", "user": "<｜User｜>", "assistant": "<｜Assistant｜>"},
        {"system": "", "user": "", "assistant": "<｜end▁of▁sentence｜>"}, trim=False,
    ),
    "granite": Style(
        {role: f"<|start_of_role|>{role}<|end_of_role|>" for role in ("system", "user", "assistant")},
        {"system": "<|end_of_text|>\n", "user": "<|end_of_text|>\n", "assistant": "<|end_of_text|>"}, "\n", bos=False,
    ),
    "falcon": Style(
        {"system": "System: ", "user": "User: ", "assistant": "Falcon:"},
        {"system": "\n\n", "user": "\n\n", "assistant": "eos"}, "\n\n", " ", bos=False,
    ),
}  # fmt: skip
