"""Chat templates by name, for models that come without one; each marks what the assistant writes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ftlib.errors import UserError, about, did_you_mean
from ftlib.tokenizers.classic import STYLES, template
from ftlib.tokenizers.jinja import variables

GIVEN = (  # by whoever renders, each time
    "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token",
)  # fmt: skip
Scalar = bool | int | float | str | None

CHATML = """\
{%- set ns = namespace(tools='') -%}
{%- if tools -%}
{%- set ns.tools = 'You can call these functions:\\n<tools>' -%}
{%- for tool in tools -%}{%- set ns.tools = ns.tools + '\\n' + (tool | tojson) -%}{%- endfor -%}
{%- set ns.tools = ns.tools + '\\n</tools>\\nWrite each call as a JSON object with name and arguments, between' -%}
{%- set ns.tools = ns.tools + ' <tool_call> and </tool_call>.' -%}
{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\\n' + ns.tools + '<|im_end|>\\n' }}{%- endif -%}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] or '' }}
{%- for call in message['tool_calls'] or [] -%}
{{ '\\n' if message['content'] or not loop.first }}{{ '<tool_call>\\n{"name": ' }}
{{- call['function']['name'] | tojson }}{{ ', "arguments": ' }}
{{- call['function']['arguments'] | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ message['content'] + ('\\n\\n' + ns.tools if loop.first and message['role'] == 'system' and tools else '') }}
{{- '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else -%}
{{ message['content'] | trim + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""

LLAMA2 = """\
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{ bos_token + '[INST] ' + ns.system + message['content'] | trim + ' [/INST]' }}{%- set ns.system = '' -%}
{%- elif message['role'] == 'assistant' -%}
{% generation %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endgeneration %}
{%- else -%}
{{ raise_exception('llama2 has no role ' + message['role']) }}
{%- endif -%}
{%- endfor -%}
"""

ZEPHYR = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ message['content'] + eos_token + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""

GEMMA = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = message['content'] | trim + '\\n\\n' -%}
{%- elif message['role'] == 'assistant' -%}
{{ '<start_of_turn>model\\n' }}
{%- generation %}{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ '<start_of_turn>' + message['role'] + '\\n' + ns.system + message['content'] | trim + '<end_of_turn>\\n' }}
{%- set ns.system = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

ALPACA = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '### Response:\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- else -%}
{{ message['content'] + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""

VICUNA = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
{%- elif message['role'] == 'user' -%}
{{ 'USER: ' + message['content'] + ' ' }}
{%- else -%}
{{ message['content'] + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

BUILTIN = {
    "chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2, "zephyr": ZEPHYR, "gemma": GEMMA, "alpaca": ALPACA,
    "vicuna": VICUNA, **{name: template(style) for name, style in STYLES.items()},
}  # fmt: skip


def load_template(name_or_path: str) -> str:
    """A built-in template by name, or the content of a .jinja file."""
    if name_or_path in BUILTIN:
        return BUILTIN[name_or_path]
    path = Path(name_or_path)
    with about("data.template"):
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: is not UTF-8 text (byte {error.start})", fix="save it as UTF-8") from None
        if path.suffix in (".jinja", ".j2", ".txt"):
            raise UserError(f"{path}: no such template file", fix="name one that is there, or a built-in template")
    raise UserError(
        f"no chat template is called {name_or_path!r}{did_you_mean(name_or_path, BUILTIN)}",
        where="data.template",
        fix=f"built in: {', '.join(BUILTIN)}; or the path of a .jinja file",
    )


def with_defaults(template: str, values: Mapping[str, Scalar]) -> str:
    """A template whose variables have these values wherever it is rendered without others.

    They are written in front of it and not kept beside it, so that every library that reads the template has them too.
    """
    lines = (f"{{% set {name} = {name} | default({_literal(value)}) %}}\n" for name, value in sorted(values.items()))
    return "".join(lines) + template  # the engine leaves out a line's end behind a statement


def check_read(names: Mapping[str, Scalar], templates: Sequence[str], where: str) -> None:
    """UserError for a name that is no variable which one of the templates reads."""
    known = frozenset().union(*map(variables, templates)) - {*GIVEN}
    for name in names:
        if name not in known:
            fix = f"it reads {', '.join(sorted(known))}" if known else "it reads none; leave it out"
            what = f"the chat template never reads {name!r}{did_you_mean(name, known)}"
            raise UserError(what, where=f"{where}.{name}", fix=fix)


def _literal(value: Scalar) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
