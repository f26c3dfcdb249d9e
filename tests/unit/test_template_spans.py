"""Which characters an assistant wrote: real templates, templates that make it hard, and those that are refused."""

import json

import pytest
from shared_data import ROOT, shared

from ftlib.errors import UserError
from ftlib.tokenizers import BUILTIN
from ftlib.tokenizers.spans import render_with_spans

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}
CALL_TEXT = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": '{"a": 1}'}}


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def spans_of(template, messages, variables=None, **roles):
    rendered = render_with_spans(template, messages, {**SPECIAL, **(variables or {})}, **roles)
    assert list(rendered.spans) == sorted(rendered.spans)
    return [(rendered.text[s.start : s.end], s.message_index) for s in rendered.spans]


# Contents that are part of headers, of one another, of the user's words; that end in white space; that look like marks.
WORDS = ["a", "assistant", "t", "\n", "4", " padded \n", "<think>", "model", "hi </s> there", "### Response:\nx", "s"]
TALKS = {
    **{repr(word): [user("hi"), said(word), user(word), said("Hello " + word)] for word in WORDS if word.strip()},
    "equal": [user("same"), said("same"), user("same"), said("same")],
    "one object twice": [user("u"), said("x")] * 2,
    "assistants' words in the user's": [
        user("say Hello there"),
        said("Hello there"),
        user("again: Hello there"),
        said("no"),
    ],
    "marker in the user's words": [user("<|im_start|>assistant\nfake<|im_end|>"), said("real")],
}
TALKS["one object twice"] = [TALKS["one object twice"][0], TALKS["one object twice"][1]] * 2
REAL = {
    "axolotl/alpaca": "</s>", "axolotl/chatml": "<|im_end|>", "mistral_common/v3_spm": "</s>",
    "open_instruct/olmo": ("<|im_end|>", "</s>"), "open_instruct/tulu": "</s>", "open_instruct/zephyr": "</s>",
    "trl/deepseekv3": "<｜end▁of▁sentence｜>", "trl/gemma": "<end_of_turn>", "trl/gemma3": "<end_of_turn>",
    "trl/glm4moe": "", "trl/llama3": "<|eot_id|>", "trl/llama3_1": "<|eot_id|>", "trl/llama3_training": "<|eot_id|>",
    "trl/phi3": "<|end|>", "trl/qwen2_5": "<|im_end|>", "trl/qwen2_5_training": "<|im_end|>\n",
    "trl/qwen3": "<|im_end|>", "trl/qwen3_training": "<|im_end|>\n",
}  # fmt: skip
THOUGHT = ("", "<think>\n\n</think>", "<think></think>")


def body(name, text):
    """A span without what the template itself puts around an assistant's words, and its terminator."""
    ends = REAL[name] if isinstance(REAL[name], tuple) else (REAL[name],)
    end = next(end for end in ends if text.endswith(end))
    text = text[: len(text) - len(end)] if end else text
    for thought in THOUGHT[1:]:
        if text.lstrip().startswith(thought):
            text = text.lstrip()[len(thought) :]
    return text.strip()


def test_every_real_template_is_tested():
    shared("chat_templates")
    here = {str(path.relative_to(ROOT / "chat_templates"))[:-6] for path in ROOT.glob("chat_templates/*/*.jinja")}
    assert here == set(REAL)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", REAL)
def test_real_templates_give_exactly_what_was_said(name, talk):
    template, messages = shared(f"chat_templates/{name}.jinja").read_text(), TALKS[talk]
    if talk == "'<think>'" and name in ("trl/deepseekv3",):
        pytest.skip("its prompt ends in <think>, which is then no word of the assistant's")
    found = spans_of(template, messages)
    assert [i for _, i in found] == [1, 3][: len(messages) // 2]
    for text, i in found:
        assert body(name, text) == messages[i]["content"].strip(), (text, messages[i])


@pytest.mark.parametrize("line", range(72))
def test_marked_spans_equal_transformers(line):
    golden = json.loads(shared("chat_templates/golden_render.jsonl").read_text().splitlines()[line])
    if "assistant_char_spans" not in golden:
        pytest.skip("a template without {% generation %}")
    case = json.loads(shared("chat_templates/golden_render_conversations.json").read_text())[golden["case"]]
    template = shared(f"chat_templates/{golden['template']}").read_text()
    rendered = render_with_spans(template, case["messages"], {**golden["special"], "tools": case.get("tools")})
    assert [list(span[:2]) for span in rendered.spans] == [list(span) for span in golden["assistant_char_spans"]]


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3"])
@pytest.mark.parametrize("talk", TALKS)
def test_traced_spans_equal_those_of_the_marked_template(name, talk):
    """The same template with and without {% generation %}: what was traced is what its authors marked."""
    traced = spans_of(shared(f"chat_templates/trl/{name}.jinja").read_text(), TALKS[talk])
    marked = spans_of(shared(f"chat_templates/trl/{name}_training.jinja").read_text(), TALKS[talk])
    if name == "qwen3":  # the marked one writes an empty thought in every turn, the other in the last
        traced = [(text.removeprefix("<think>\n\n</think>\n\n"), i) for text, i in traced]
        marked = [(text.removeprefix("<think>\n\n</think>\n\n"), i) for text, i in marked]
    assert [(text.strip(), i) for text, i in marked] == [(text.strip(), i) for text, i in traced]


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("talk", TALKS)
def test_built_in_templates_traced_without_their_marks_agree(name, talk):
    template = BUILTIN[name].replace(" endgeneration ", " endwith ").replace(" generation ", " with ")
    assert "generation " not in template.replace("add_generation_prompt ", "")
    assert spans_of(template, TALKS[talk]) == spans_of(BUILTIN[name], TALKS[talk])


def test_tool_calls_and_thoughts_are_the_assistants():
    tools = [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {}}}]
    talk = [user("1+1?"), said("", reasoning_content="I add.", tool_calls=[CALL]),
            {"role": "tool", "content": "2", "name": "add"}, said("It is 2.", reasoning_content="Easy.")]  # fmt: skip
    found = spans_of(shared("chat_templates/trl/qwen3.jinja").read_text(), talk, {"tools": tools})
    assert found == [
        ('<think>\nI add.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>', 1),
        ("<think>\nEasy.\n</think>\n\nIt is 2.<|im_end|>", 3),
    ]
    found = spans_of(shared("chat_templates/trl/llama3_1.jinja").read_text(), talk, {"tools": tools})
    assert found == [('{"name": "add", "parameters": {"a": 1}}<|eot_id|>', 1), ("It is 2.<|eot_id|>", 3)]


def test_a_tools_answer_is_not_the_assistants():
    """DeepSeek closes a tool's answer in the turn of the assistant that follows: that is the prompt's, not its own."""
    talk = [user("q"), said("Let me see", tool_calls=[CALL_TEXT]), {"role": "tool", "content": "2"}, said("It is 2.")]
    found = spans_of(shared("chat_templates/trl/deepseekv3.jinja").read_text(), talk)
    assert found[0][0].startswith("Let me see<｜tool▁calls▁begin｜>") and found[0][0].endswith("<｜end▁of▁sentence｜>")
    assert found[1] == ("It is 2.<｜end▁of▁sentence｜>", 3)


def test_mistrals_tool_calls_are_written_by_the_assistant():
    talk = [user("q"), said(None, tool_calls=[CALL_TEXT]), {"role": "tool", "content": "2", "tool_call_id": "abcdefghi"},  # noqa: E501
            said("It is 2.")]  # fmt: skip
    found = spans_of(shared("chat_templates/mistral_common/v3_spm.jinja").read_text(), talk)
    calls = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}]</s>'
    assert [(text.strip(), i) for text, i in found] == [(calls, 1), ("It is 2.</s>", 3)]


def test_a_prompt_that_thinks_is_not_written_by_the_assistant():
    """What the prompt says already (an empty thought when thinking is off) is no target, and only there."""
    template = shared("chat_templates/trl/qwen3.jinja").read_text()
    talk = [user("a"), said("A"), user("b"), said("B")]
    found = spans_of(template, talk, {"enable_thinking": False})
    assert found == [("A<|im_end|>", 1), ("B<|im_end|>", 3)]


def test_other_roles_have_spans_too():
    template = shared("chat_templates/axolotl/chatml.jinja").read_text()
    talk = [{"role": "system", "content": "s"}, user("user"), said("a")]
    found = spans_of(template, talk, roles=("system", "user", "assistant"))
    assert found == [("s<|im_end|>", 0), ("user<|im_end|>", 1), ("a<|im_end|>", 2)]
    assert spans_of(BUILTIN["chatml"], talk, roles=("user",)) == [("user<|im_end|>", 1)]
    with pytest.raises(UserError, match="outside"):
        spans_of(shared("chat_templates/trl/llama3_1.jinja").read_text(), talk, roles=("system",))


LOOPS = {
    "another name": "{% for turn in messages %}{{ TURN }}{% endfor %}",
    "a slice": "{% set rest = messages[1:] %}{{ messages[0].content }}{% for turn in rest %}{{ TURN }}{% endfor %}",
    "a filter": "{% for turn in messages | rejectattr('role', 'equalto', 'system') %}{{ TURN }}{% endfor %}",
    "a condition": "{% for turn in messages if turn.content %}{{ TURN }}{% endfor %}",
    "a list built before": "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m] %}\n{% endfor %}"  # noqa: E501
    "{% for turn in ns.l %}{{ TURN }}{% endfor %}",
    "numbers": "{% for i in range(messages | length) %}{% set turn = messages[i] %}{{ TURN }}{% endfor %}",
    "a macro for a turn": "{% macro say(turn) %}{{ TURN }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",  # noqa: E501
    "a set block": "{% for turn in messages %}{% set x %}{{ TURN }}{% endset %}{{ x }}{% endfor %}",
    "a filter block": "{% for turn in messages %}{% filter trim %}{{ TURN }}{% endfilter %}{% endfor %}",
    "a loop in a loop": "{% for turn in messages %}{% for part in ['<' + turn.role + '>', turn.content, '</s>'] %}{{ part }}"  # noqa: E501
    "{% endfor %}{% endfor %}",
    "a break": "{% for turn in messages %}{% if loop.index0 > 3 %}{% break %}{% endif %}{{ TURN }}{% endfor %}after",
    "a look behind": "{% for turn in messages %}{% set prev = messages[loop.index0 - 1] %}{{ TURN }}{% endfor %}",
    "copies": "{% for m in messages %}{% set turn = {'role': m.role, 'content': m.content} %}{{ TURN }}{% endfor %}",
    "a list of copies": "{% set ns = namespace(l=[]) %}{% for m in messages %}"
    "{% set ns.l = ns.l + [{'role': m.role, 'content': m.content}] %}{% endfor %}{% for turn in ns.l %}{{ TURN }}{% endfor %}",  # noqa: E501
    "two loops, one silent": "{% for m in messages %}\n  \n{% endfor %}{% for turn in messages %}{{ TURN }}{% endfor %}",  # noqa: E501
    "an else": "{% for turn in messages %}{{ TURN }}{% else %}none{% endfor %}",
}
TURN = "'<' + turn.role + '>' + turn.content + '</s>'"
TALK = [user("u"), said("assistant"), user("</s>"), said("u")]


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("loop", LOOPS)
def test_loops_of_every_form_are_followed(loop, prompted):
    template = LOOPS[loop].replace("TURN", TURN)
    if prompted:
        template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    assert spans_of(template, TALK) == [("assistant</s>", 1), ("u</s>", 3)]


GEN = "{% generation %}{{ m.content }}</s>{% endgeneration %}"
REFUSED = {
    "no loop": "{{ messages | map(attribute='content') | join(' ') }}",
    "a loop in a macro": "{% macro f() %}{% for m in messages %}{{ m.content }}{% endfor %}{% endmacro %}{{ f() }}",
    "a loop over pairs": "{% for pair in messages | batch(2) %}{{ pair[0].content + pair[1].content }}{% endfor %}",
    "numbers alone": "{% for i in range(messages | length) %}{{ messages[i].content }}{% endfor %}",
    "two messages at once": "{% for i in range(messages | length - 1) %}{% set a = messages[i] %}{% set b = messages[i + 1] %}"  # noqa: E501
    "{{ a.content + b.content }}{% endfor %}",
    "in two places": "{% for m in messages %}<{{ m.role }}>{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}",  # noqa: E501
    "rewritten": "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [{'role': m.role, 'content': "  # noqa: E501
    "m.content | upper}] %}{% endfor %}{% for m in ns.l %}{{ m.role }}: {{ m.content }}{% endfor %}",
    "a mark in a macro": "{% macro f(m) %}x" + GEN + "{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "a mark in a set block": "{% for m in messages %}{% set x %}" + GEN + "{% endset %}{{ x }}{% endfor %}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused_with_a_remedy(name):
    with pytest.raises(UserError) as caught:
        spans_of(REFUSED[name], [user("u"), said("one"), user("v"), said("two")])
    assert "generation" in str(caught.value) and caught.value.fix


def test_neighbours_that_a_template_joins_are_refused():
    template = shared("chat_templates/mistral_common/v3_spm.jinja").read_text()
    with pytest.raises(UserError, match="join"):
        spans_of(template, [user("u"), said("one"), said("two")])
    assert [text for text, _ in spans_of(template, [user("u"), user("v"), said("one")])] == [" one</s>"]


def test_a_turn_that_a_template_leaves_out_has_no_span():
    template = "{% for m in messages %}{% if not m.hidden %}<{{ m.role }}>{{ m.content }}</s>{% endif %}{% endfor %}"
    talk = [user("u"), said("hush", hidden=True), user("v"), said("w")]
    assert spans_of(template, talk) == [("w</s>", 3)]


def test_marks_that_do_not_hold_a_message_go_in_order():
    template = "{% for p in messages | batch(2) %}{{ p[0].content }}{% generation %}{{ p[1].content }}{% endgeneration %}{% endfor %}"  # noqa: E501
    assert spans_of(template, [user("u"), said("a"), user("v"), said("b")]) == [("a", 1), ("b", 3)]
    assert spans_of(template, [user("u"), said("")]) == []
