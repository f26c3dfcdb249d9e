"""Rendering by substitution equals rendering, whatever the template and the contents; the rest is rendered."""

import random

import pytest
from shared_data import ROOT

from ftlib.errors import UserError
from ftlib.models import hub
from ftlib.tokenizers import BUILTIN, from_pretrained
from ftlib.tokenizers.replay import MARK, Replay
from ftlib.tokenizers.spans import render_with_spans

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None}
SAID = [
    "Hi", " leading", "trailing \n", "<think>\na thought\n</think>\n\nfour", "</think>", "x", "UPPER lower", "7", "0",
    "{{ no }}", "a\n\nb", "ü 東京", 'quotes " and \\ slashes', "<|im_end|>", "\n", " ", "", f"{MARK}0{MARK}", "a|b|c",
    "system", "assistant", "Hi there, this is longer than sixteen characters", "<tool_call>", "xx", "None",
]  # fmt: skip
ONE = "{% for m in messages %}{% generation %}|%s|{% endgeneration %}{% endfor %}"
WAYS = {  # what a template may do with a content, and whether that can be replayed
    "written": ("{{ m.content }}", True),
    "trimmed": ("{{ m.content | trim }}", True),
    "stripped": ("{{ m.content.strip() }}{{ m['content'].lstrip('\\n') }}{{ m.content.rstrip() }}", True),
    "added": ("{{ 'a' + m.content + 'b' + m.content | trim }}", True),
    "joined by ~": ("{{ 'a' ~ m.content ~ loop.index }}", True),
    "formatted": ("{{ '%s!' % m.content }}", False),
    "formatted in a tuple": ("{{ '%s %s' % (m.content, 1) }}", True),
    "asked what it holds": ("{% if '</think>' in m.content %}A{% else %}{{ m.content }}{% endif %}", True),
    "asked how it begins": ("{% if m.content.startswith('<') %}A{% endif %}{{ m.content }}", True),
    "compared": ("{% if m.content == 'x' or m.content in ['Hi', '7'] %}A{% endif %}{{ m.content }}", True),
    "asked whether it is": ("{% if m.content %}A{% endif %}{{ m.content or 'none' }}", True),
    "asked when trimmed": ("{% if m.content | trim %}A{% endif %}{{ m.content }}", True),
    "asked its kind": ("{% if m.content is string %}{{ m.content | string | default('') }}{% endif %}", True),
    "by a macro": ("{% macro f(x) %}{{ x }}{% endmacro %}{{ f(m.content) }}", True),
    "by a macro that adds": ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(m.content) + '!' }}", True),
    "by a variable": ("{% set c = m.content %}{{ c }}{% set c = c.strip() %}{{ c }}", True),
    "in a namespace": ("{% set n = namespace(c='') %}{% set n.c = m.content %}{{ n.c }}", True),
    "last of all": ("{{ messages[-1].content }}{{ messages | length }}{{ (messages | first).content }}", True),
    "selected by role": ("{{ (messages | selectattr('role', 'equalto', 'user') | list)[0].content }}", True),
    "split": ("{{ m.content.split('</think>')[-1] }}", False),
    "upper": ("{{ m.content | upper }}", False),
    "capitalised": ("{{ m.content.capitalize() }}", False),
    "as json": ("{{ m.content | tojson }}", False),
    "the message as json": ("{{ m | tojson }}", False),
    "the messages as text": ("{{ messages | string }}{{ m }}", False),
    "its length": ("{% if m.content | length > 16 %}A{% endif %}{{ m.content }}", False),
    "a slice": ("{{ m.content[:2] }}{{ m.content }}", False),
    "a letter": ("{{ m.content[0] | default('') }}", False),
    "letter by letter": ("{% for c in m.content %}{{ c }},{% endfor %}", False),
    "ordered": ("{% if m.content < 'M' %}A{% endif %}{{ m.content }}", False),
    "replaced": ("{{ m.content | replace('a', 'b') }}", False),
    "replacing": ("{{ 'abc'.replace('b', m.content) }}", False),
    "repeated": ("{{ m.content * 2 }}", False),
    "as a number": ("{{ m.content | int + 1 }}", False),
    "as a key": ("{{ {'x': 1, '7': 2}[m.content] | default('') }}", False),
    "joined": ("{{ [m.content, 'a'] | join('-') }}", False),
    "mapped": ("{{ messages | map(attribute='content') | join('-') }}", False),
    "with another": ("{% if m.content == messages[0].content %}A{% endif %}{{ m.content }}", False),
    "captured": ("{% set c %}{{ m.content }}{% endset %}{% if 'x' in c %}A{% endif %}{{ c }}", False),
    "filtered": ("{% filter trim %}{{ m.content }}{% endfilter %}", False),
    "trimmed as a whole": ("{{ (' ' + m.content) | trim }}", False),
    "asked as a whole": ("{% if 'Ax' in 'A' + m.content %}A{% endif %}{{ m.content }}", False),
    "trimmed by its own": ("{{ m.content.strip(messages[0].content) }}", False),
    "the day": ("{{ strftime_now('%d') }}{{ m.content }}", False),
    "by chance": ("{{ [1, 1] | random }}{{ m.content }}", False),
    "only when it is refused": ("{% if m.content == '7' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}", True),
}


def conversations(seed, count=40):
    draw = random.Random(seed)
    for _ in range(count):
        turns = [{"role": "system", "content": draw.choice(SAID)}] if draw.random() < 0.3 else []
        for _ in range(draw.randrange(1, 4)):
            turns += [{"role": role, "content": draw.choice(SAID)} for role in ("user", "assistant")]
        yield turns


def both(template, replay, messages, variables=NAMES):
    """The result, or the error, of either way."""
    found = []
    for work in (lambda: render_with_spans(template, messages, variables), lambda: replay.render(messages)):
        try:
            found.append(work())
        except UserError as error:
            found.append(str(error))
    assert found[0] == found[1], messages


def replayed(replay):
    return any(plan for plans in replay._plans.values() for plan in plans)


@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_template_does(way):
    body, able = WAYS[way]
    template = ONE.replace("%s", body)
    replay = Replay(template, NAMES)
    for messages in conversations(way):
        both(template, replay, messages)
    assert replayed(replay) == able


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_templates_are_replayed(name):
    replay = Replay(BUILTIN[name], NAMES)
    for messages in conversations(name):
        both(BUILTIN[name], replay, messages)
    assert replayed(replay)


REAL = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("chat_templates/*/*.jinja"))


@pytest.mark.parametrize("path", ["demo", *REAL])
def test_real_templates(path):
    file = hub.resolve("ftlib:demo/model") / "chat_template.jinja" if path == "demo" else ROOT / path
    template = file.read_text(encoding="utf-8")
    replay = Replay(template, NAMES)
    for messages in conversations(path):
        both(template, replay, messages)
    assert replayed(replay) or ("training" not in path and path != "demo")


def test_messages_with_more_than_words_are_rendered():
    replay = Replay(BUILTIN["chatml"], NAMES)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for more in ({"tool_calls": [call]}, {"name": "Max"}, {"content": None}):
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", **more}]
        both(BUILTIN["chatml"], replay, messages)
    assert not replayed(replay)


def test_shapes_are_bounded_and_what_changes_the_text_begins_anew(monkeypatch):
    monkeypatch.setattr("ftlib.tokenizers.replay.SHAPES", 3)
    tokenizer = from_pretrained(hub.resolve("ftlib:demo/model"))
    for turns in range(1, 20):
        tokenizer.render_with_spans([{"role": ("user", "assistant")[i % 2], "content": "x"} for i in range(turns)])
        assert len(tokenizer._replay._plans) <= 4
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    before = tokenizer.render_with_spans(talk).text
    tokenizer.chat_template = BUILTIN["vicuna"]
    assert tokenizer.render_with_spans(talk).text != before
    assert tokenizer.render_with_spans(talk, roles=("user",)).spans[0].message_index == 0
