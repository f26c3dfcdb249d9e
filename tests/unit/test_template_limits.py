"""Hostile chat templates: each ends soon, in any thread, with one message, and takes little memory on the way."""

import resource
import threading
import time

import pytest

from ftlib.errors import UserError
from ftlib.tokenizers import render_chat_template

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}"
DOUBLE = "{% set ns = namespace(x=START) %}{% for i in range(64) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x USE }}"


def double(start, step, use=""):
    return DOUBLE.replace("START", start).replace("STEP", step).replace("USE", use)


HOSTILE = {
    "nested loops": LOOP + "{% endfor %}{% endfor %}",
    "a loop whose condition is never true": "{% for a in range(99999) if range(99999) | list | length < 0 %}{% endfor %}",  # noqa: E501
    "a loop in a loop's condition": LOOP.replace(" %}", " if 1 > 2 %}") * 2 + "{% endfor %}" * 4
    + "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "macros that call themselves twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"  # noqa: E501
    "{{ f(99) }}",
    "macros without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a text doubled": double("'aaaa'", "ns.x + ns.x"),
    "a text doubled by ~": double("'aaaa'", "ns.x ~ ns.x"),
    "a text doubled by join": double("'aaaa'", "[ns.x, ns.x] | join"),
    "a text doubled by format": double("'aaaa'", "'%s%s' % (ns.x, ns.x)"),
    "a text doubled by a set block": "{% set x = 'aaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40 + "{{ x }}",
    "a list doubled": double("[1]", "ns.x + ns.x", "| length"),
    "a list in a list": double("[1]", "[ns.x, ns.x]"),
    "a mapping in a mapping": double("{'a': 1}", "{'a': ns.x, 'b': ns.x}", "| tojson"),
    "a tuple in a tuple": double("(1,)", "(ns.x, ns.x)", "| string"),
    "a dict() in a dict()": double("dict(a=1)", "dict(a=ns.x, b=ns.x)", "| string"),
    "nested lists compared": double("[1]", "[ns.x, ns.x]", "== ns.x"),
    "a huge product": "{{ 'a' * 10 ** 10 }}",
    "a huge list": "{{ ([1] * 10 ** 10) | length }}",
    "a product of products": double("'aaaa'", "ns.x * 100"),
    "a huge power": "{% set n = 9999999 %}{{ 9 ** n }}",
    "a growing power": double("9", "ns.x ** 9"),
    "a growing product": double("9", "ns.x * ns.x"),
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "zfill": "{% set f = 'a'.zfill %}{{ f(10 ** 10) }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "center by map": "{{ ['a'] | map('center', 10 ** 10) | join }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10 ** 8) }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "indent": "{{ ('\n' * 100000) | indent(100000) }}",
    "an indent of JSON": "{{ [[[[[1]]]]] | tojson(indent=10 ** 10) }}",
    "a width": "{{ '%9999999999d' % 1 }}",
    "a width given": "{{ '%*d' % (9999999999, 1) }}",
    "a width of a format": "{{ '{:9999999999}'.format('a') }}",
    "a width given to a format": "{{ '{:{}}'.format('a', 9999999999) }}",
    "the filter format": "{{ '%9999999999d' | format(1) }}",
    "a long separator": "{% set x = 'a' * 10 ** 6 %}{{ x.join(range(9999) | map('string') | list) }}",
    "a long separator in a filter": "{% set x = 'a' * 10 ** 6 %}{{ range(9999) | list | join(x) }}",
    "a long replacement": "{% set x = 'a' * 10 ** 6 %}{{ x.replace('a', x) }}",
    "a long replacement in a filter": "{% set x = 'a' * 10 ** 6 %}{{ x | replace('a', x) }}",
    "a long translation": "{% set x = 'a' * 10 ** 6 %}{{ x.translate({97: x}) }}",
    "many long texts": "{% set x = 'ab' * 10 ** 6 %}{{ range(99999) | map('replace', '1', x) | list | length }}",
    "a batch": "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "slices": "{{ [1] | slice(10 ** 10) | list }}",
    "a sum of lists": "{{ ([[1] * 1000] * 4000) | sum(start=[]) | length }}",
    "a macro's output": "{% set x = 'a' * 10 ** 6 %}{% macro f() %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endmacro %}"  # noqa: E501
    "{% set y = f() %}",
    "a block's output": "{% set x %}{% for i in range(99999) %}" + "a" * 10000 + "{% endfor %}{% endset %}",
    "output": "{% for i in range(99999) %}{{ 'abcdefghijklmnop' }}{% endfor %}",
    "a long range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "many words of nonsense": "{{ lipsum(n=10 ** 9) }}",
    "namespaces in each other": double("namespace(a=1)", "namespace(a=ns.x, b=ns.x)") + LOOP + "{% endfor %}{% endfor %}",  # noqa: E501
    "many brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long template": "a" * (1 << 21),
}  # fmt: skip


@pytest.fixture(autouse=True)
def little_memory():
    """What the test itself did not have before is refused, so that a hungry template fails instead of the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon(name):
    start = time.thread_time()
    with pytest.raises(UserError) as caught:
        render_chat_template(HOSTILE[name], TALK)
    assert time.thread_time() - start < 8
    assert "MemoryError" not in str(caught.value) and "too much memory" not in str(caught.value)


def test_the_deadline_works_outside_the_main_thread():
    found = []

    def render():
        try:
            render_chat_template(HOSTILE["nested loops"], TALK)
        except UserError as error:
            found.append(str(error))

    threads = [threading.Thread(target=render) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3 and all("2 seconds" in text for text in found)


def test_a_template_that_waits_for_its_turn_is_not_stopped(monkeypatch):
    """On a crowded machine the wall clock runs while a template stands still."""
    clock = iter(range(0, 10**6, 5))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    template = "{% for m in messages %}{% for i in range(50) %}{{ m.content | trim }}{% endfor %}{% endfor %}"
    assert render_chat_template(template, TALK) == "Hi" * 50 + "Hello" * 50


ALLOWED = {
    "{{ '%5d|%-4s' % (7, 'a') }}": "    7|a   ",
    '{{ \'{{"id": 1234567, "n": {}}}\'.format(3) }}': '{"id": 1234567, "n": 3}',
    "{{ 'at 20240726 {}'.format('x') }}{{ 'a,b'.split(',') | join('; ') }}": "at 20240726 xa; b",
    "{{ 'ab' | center(6) }}{{ 1700000000 | string }}{{ 'a'.ljust(3) }}|": "  ab  1700000000a  |",
    "{{ (messages * 3) | length }}{{ 2 ** 10 }}{{ [1] + [2] }}": "61024[1, 2]",
    "{{ messages | map(attribute='role') | list | tojson(indent=2) }}": '[\n  "user",\n  "assistant"\n]',
    "{% set x %}a{{ 1 }}{% endset %}{{ x ~ 2 }}{{ [1, 2] | sum }}": "a123",
    "{{ 'a-b-c'.replace('-', '+', 1) }}{{ 'x' | replace('x', 'yy') }}": "a+b-cyy",
}


@pytest.mark.parametrize("template", ALLOWED)
def test_what_is_small_is_allowed_and_equals_transformers(template):
    from transformers.utils.chat_template_utils import render_jinja_template

    text = render_chat_template(template, TALK)
    assert text == ALLOWED[template]
    assert text == render_jinja_template([TALK], chat_template=template)[0][0]


def test_long_conversations_pass():
    talk = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(1000)]
    template = (
        "{% set ns = namespace(all=[]) %}{% for m in messages %}{% set ns.all = ns.all + [m] %}{% endfor %}"
        "{% for m in ns.all %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
    )
    assert len(render_chat_template(template, talk)) == 1000 * 999 + 500 * (len("<user>") + len("<assistant>"))


def test_errors_name_the_line_of_the_template():
    for template, line in (("a\nb\n{{ 1 / 0 }}", 3), ("a\n{% if %}", 2), ("\n\n\n{{ x.y.z }}", 4)):
        with pytest.raises(UserError, match=f"line {line}"):
            render_chat_template(template, TALK)
    macro = "{% macro f(m) %}\n{{ m + 1 }}\n{% endmacro %}\n\n{{ f('a') }}"
    with pytest.raises(UserError, match="line 2"):
        render_chat_template(macro, TALK)


def test_a_template_does_not_change_the_messages():
    talk = [dict(message) for message in TALK]
    for attack in (
        "messages[0].update(role='x')",
        "messages.pop()",
        "messages[0].clear()",
        "messages[0].setdefault('a', 1)",
    ):
        with pytest.raises(UserError):
            render_chat_template("{{ " + attack + " }}", talk)
    assert talk == TALK


@pytest.mark.parametrize("messages", ["text", [["role"]], None, [{"role": "user"}, "x"]])
def test_messages_of_another_shape_are_named(messages):
    with pytest.raises(UserError, match="list of dicts"):
        render_chat_template("{{ messages }}", messages)
