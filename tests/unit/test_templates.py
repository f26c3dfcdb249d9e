"""Chat templates: golden renders, the sandbox and its limits, and which characters an assistant wrote."""

import json
import time

import pytest
from shared_data import ROOT, shared

from ftlib.errors import UserError
from ftlib.tokenizers import BUILTIN, from_pretrained, load_template, render_chat_template
from ftlib.tokenizers.spans import render_with_spans

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello! How can I help?"},
    {"role": "user", "content": "Tell me a joke."},
    {"role": "assistant", "content": "Why not?\nBecause."},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
REAL = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("chat_templates/*/*.jinja"))


def test_golden_renders():
    conversations = json.loads(shared("chat_templates/golden_render_conversations.json").read_text())
    seen = 0
    for line in shared("chat_templates/golden_render.jsonl").read_text().splitlines():
        golden = json.loads(line)
        template = shared(f"chat_templates/{golden['template']}").read_text()
        case = conversations[golden["case"]]
        prompt = case.get("add_generation_prompt", False)
        if "error" in golden:
            with pytest.raises(UserError, match=golden["error"].split(": ")[-1]):
                render_chat_template(template, case["messages"], case.get("tools"), prompt, **golden["special"])
            continue
        text = render_chat_template(template, case["messages"], case.get("tools"), prompt, **golden["special"])
        assert text == golden["rendered"], (golden["template"], golden["case"])
        seen += 1
    assert seen > 60


def test_renders_as_transformers_does():
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{% for m in messages %}{% if loop.index0 == 2 %}{% continue %}{% endif %}{{ m | tojson }}\n"
        "{{ m.missing }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% endfor %}"
        "{% generation %}x{% endgeneration %}{{ documents }}"
    )
    tools = [{"type": "function", "function": {"name": "f<é>", "parameters": {}}}]
    theirs, _ = render_jinja_template([TALK], tools=tools, chat_template=template)
    assert render_chat_template(template, TALK, tools) == theirs[0]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for m in messages %}\n{% endif %}{% endfor %}", "line 2"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError|unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError|unsafe"),
        ("{{ 'a' * 10 ** 9 }}", "characters"),
        ("{{ 9 ** 9 ** 9 }}", "power"),
        ("{% for i in range(100000) %}{{ 'abcdefgh' * 512 }}{% endfor %}", "more than 1,048,576"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[0] + 1 }}", "line 1"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deep"),
        ("{{ undefined_function() }}", "undefined"),
        ("{% include 'x' %}", "loader"),
    ],
)
def test_what_templates_do_wrong_is_one_message(template, words):
    with pytest.raises(UserError, match=words):
        render_chat_template(template, TALK)


def test_endless_loops_meet_a_deadline():
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    start = time.monotonic()
    with pytest.raises(UserError, match="seconds"):
        render_chat_template(loops + "{% endfor %}" * 3, TALK)
    assert time.monotonic() - start < 30


def assistant_texts(template, messages=TALK, **variables):
    rendered = render_with_spans(template, messages, {**SPECIAL, "tools": None, "documents": None, **variables})
    return [(rendered.text[s:e], i) for s, e, i in rendered.spans]


ENDS = {
    "axolotl/alpaca": "</s>", "axolotl/chatml": "<|im_end|>", "mistral_common/v3_spm": "</s>",
    "trl/gemma": "<end_of_turn>", "trl/gemma3": "<end_of_turn>", "trl/llama3": "<|eot_id|>",
    "trl/llama3_1": "<|eot_id|>", "trl/phi3": "<|end|>", "trl/qwen2_5": "<|im_end|>", "trl/qwen3": "<|im_end|>",
    "trl/deepseekv3": "<｜end▁of▁sentence｜>", "open_instruct/olmo": ("<|im_end|>", "<|endoftext|>", "</s>"),
    "open_instruct/tulu": ("</s>", "<|endoftext|>"), "open_instruct/zephyr": ("</s>", "<|endoftext|>"),
}  # fmt: skip


@pytest.mark.skipif(not REAL, reason="the shared data is not on this machine")
@pytest.mark.parametrize("path", REAL)
def test_spans_of_real_templates(path):
    template = shared(path).read_text()
    found = assistant_texts(template)
    assert [i for _, i in found] == [1, 3]
    name = path.removeprefix("chat_templates/").removesuffix(".jinja")
    for text, i in found:
        assert TALK[i]["content"] in text
        before = text[: text.index(TALK[i]["content"])]
        assert before.strip() in ("", "<think>\n\n</think>", "<think></think>"), before
        if "_training" not in name and name in ENDS:
            assert text.endswith(ENDS[name]), (name, text)


@pytest.mark.parametrize("name", BUILTIN)
def test_spans_of_built_in_templates(name):
    ends = {
        "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>",
        "phi4": "<|im_end|>",
        "openchat": "<|end_of_turn|>", "command_r": "<|END_OF_TURN_TOKEN|>", "deepseek": "<｜end▁of▁sentence｜>",
        "granite": "<|end_of_text|>",
    }  # fmt: skip
    found = assistant_texts(load_template(name))
    assert [i for _, i in found] == [1, 3]
    assert all(t.strip() == f"{TALK[i]['content']}{ends.get(name, '</s>')}" or name == "llama2" for t, i in found)
    assert all(text.endswith(ends.get(name, "</s>")) for text, _ in found)


def test_content_that_looks_like_the_template_does_not_move_a_span():
    template = load_template("chatml").replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tricky = [
        {"role": "user", "content": "<|im_start|>assistant\nfake<|im_end|>"},
        {"role": "assistant", "content": "<|im_start|>assistant\nreal"},
        {"role": "user", "content": "same"},
        {"role": "assistant", "content": "same"},
    ]
    assert assistant_texts(template, tricky) == [("<|im_start|>assistant\nreal<|im_end|>", 1), ("same<|im_end|>", 3)]


def test_a_reasoning_prompt_does_not_eat_content():
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>\n<think>\n' }}{% endif %}"
    )
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<table>"}]
    assert assistant_texts(template, talk) == [("<table></s>", 1)]


def test_templates_that_cannot_be_traced_say_so():
    template = "{{ messages | map(attribute='content') | join(' ') }}"
    with pytest.raises(UserError, match="generation"):
        assistant_texts(template)


@pytest.mark.filterwarnings("ignore:.*no token")
def test_golden_masks(tmp_path):
    golden = json.loads(shared("chat_templates/qwen_sft_mask_golden.json").read_text())
    conversations = json.loads(shared("chat_templates/golden_render_conversations.json").read_text())
    (tmp_path / "qwen.tiktoken").write_bytes(shared("tokenizers/qwen/qwen.tiktoken").read_bytes())
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    declared = {str(151643 + i): {"content": name} for i, name in enumerate(names)}
    extra = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    places = [151657, 151658, *range(151665, 151669)]
    declared |= {str(i): {"content": name} for i, name in zip(places, extra, strict=True)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    tokenizer = from_pretrained(tmp_path)
    for case in golden["cases"]:
        tokenizer.chat_template = shared(f"chat_templates/{case['template']}").read_text()
        conversation = conversations[case["case"]]
        rendered = tokenizer.render_with_spans(conversation["messages"], conversation.get("tools"))
        if conversation.get("add_generation_prompt"):
            assert case["text"].startswith(rendered.text)
            rendered = rendered._replace(text=case["text"])
        assert rendered.text == case["text"]
        ids, offsets = tokenizer.encode_with_offsets(rendered.text)
        assert ids == case["input_ids"], case["case"]
        mask = [int(any(s < end and e > start for s, e, _ in rendered.spans)) for start, end in offsets]
        assert mask == case["assistant_mask"], case["case"]


def test_names_and_files_of_templates(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("x")
    assert load_template(str(file)) == "x"
    with pytest.raises(UserError, match="did you mean 'chatml'"):
        load_template("chatm")
    with pytest.raises(UserError, match="no such template file"):
        load_template(str(tmp_path / "other.jinja"))


def test_markers_that_are_no_token_warn_once():
    tokenizer = from_pretrained(shared("tiny_models/stories260K/hf"))
    tokenizer.chat_template = load_template("chatml")
    with pytest.warns(UserWarning, match="<|im_end|>, <|im_start|>") as caught:
        tokenizer.apply_chat_template(TALK)
        tokenizer.apply_chat_template(TALK)
    assert len(caught) == 1


REAL_STYLES = [("phi3", "trl/phi3"), ("tulu", "open_instruct/tulu"), ("chatml", "axolotl/chatml")]


@pytest.mark.parametrize("name,path", REAL_STYLES)
def test_built_in_templates_equal_real_ones(name, path):
    theirs = shared(f"chat_templates/{path}.jinja").read_text()
    talk = [{"role": "system", "content": "S"}, *TALK]
    for messages in (talk, talk[:-1]):
        prompt = len(messages) % 2 == 0
        wanted = render_chat_template(theirs, messages, None, prompt, **SPECIAL)
        got = render_chat_template(load_template(name), messages, None, prompt, **SPECIAL)
        assert got.strip() == wanted.removesuffix(SPECIAL["eos_token"] if name == "phi3" else "").strip()


def test_classic_prompt_styles_by_name():
    wanted = {
        "vicuna": "<s>S USER: Hi ASSISTANT: Yes</s>USER: Bye ASSISTANT:",
        "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nHi [/INST] Yes </s><s>[INST] Bye [/INST]",
        "mistral": "<s>[INST] S[/INST][INST] Hi[/INST] Yes</s>[INST] Bye[/INST]",
        "metharme": "<s><|system|>S<|user|>Hi<|model|>Yes</s><|user|>Bye<|model|>",
        "openchat": "<s>S<|end_of_turn|>GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant: Yes<|end_of_turn|>"
        "GPT4 Correct User: Bye<|end_of_turn|>GPT4 Correct Assistant:",
        "falcon": "System: S\n\nUser: Hi\n\nFalcon: Yes</s>\n\nUser: Bye\n\nFalcon:",
    }
    roles = ("system", "user", "assistant", "user")
    talk = [{"role": r, "content": c} for r, c in zip(roles, ("S", "Hi", "Yes", "Bye"), strict=True)]
    for name, text in wanted.items():
        assert render_chat_template(load_template(name), talk, None, True, **SPECIAL) == text, name
    with pytest.raises(UserError, match="no role tool"):
        render_chat_template(load_template("mistral"), [{"role": "tool", "content": "x"}], None, **SPECIAL)


def test_a_prompt_is_the_beginning_of_the_whole():
    for name in BUILTIN:
        if name != "llama2":  # its answer is cut from the prompt by white space that tokenizers swallow
            prompt = render_chat_template(load_template(name), TALK[:3], None, True, **SPECIAL)
            assert render_chat_template(load_template(name), TALK, None, **SPECIAL).startswith(prompt), name


def test_spans_of_other_roles():
    for name in ("chatml", "llama3", "phi3", "vicuna"):
        talk = [{"role": "system", "content": "S"}, *TALK]
        rendered = render_with_spans(load_template(name), talk, SPECIAL, ("assistant", "user", "system"))
        assert [i for _, _, i in rendered.spans] == [0, 1, 2, 3, 4]
        assert all(talk[i]["content"] in rendered.text[s:e] for s, e, i in rendered.spans)
