"""What lies beside a vocabulary, and what a file remembers of how it was used: obeyed or ignored as it should be."""

import gzip
import json
import shutil

import pytest
from shared_data import shared
from tiny_model import write_tokenizer

from ftlib.data.examples import Example
from ftlib.data.masks import tokenize
from ftlib.errors import UserError
from ftlib.tokenizers import from_pretrained, load_template

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


@pytest.fixture
def folder(tmp_path):
    """A byte-level tokenizer.json with <|pad|>, <|im_start|> and <|im_end|>."""
    write_tokenizer(tmp_path)
    return tmp_path


def change(file, **entries):
    """Entries of a JSON file, made if it is not there."""
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **entries}))


def conversation(messages, **rest):
    return Example("file:1", messages=messages, trained=[m["role"] == "assistant" for m in messages], **rest)


def test_a_file_that_was_used_to_cut_and_fill_texts_does_neither(folder):
    plain = from_pretrained(folder).encode("hello world")
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [257], "tokens": ["<|im_start|>"]}}
    change(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "!"},
        post_processor={"type": "TemplateProcessing", "special_tokens": special,
                        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                                   {"Sequence": {"id": "A", "type_id": 0}}],
                        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]},
    )  # fmt: skip
    ours = from_pretrained(folder)
    assert ours.encode("hello world") == plain == ours.encode("hello world", special=False)
    assert ours.encode("<|im_start|>hello", bos=False).count(257) == 1


def test_tokens_that_only_the_config_declares_are_matched(folder):
    from transformers import AutoTokenizer

    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    declared = {"259": {"content": "<call>", "special": True, **flags}, "260": {"content": "<note>", "special": False}}
    change(folder / "tokenizer_config.json", added_tokens_decoder=declared)
    ours, theirs = from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "a <call>b<note>c<|im_end|>"
    ids = ours.encode(text)
    assert {259, 260} < set(ids) and ids == theirs.encode(text, add_special_tokens=False) and ours.vocab_size == 261
    assert ours.decode(ids, skip_special=True) == "a b<note>c" == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids) == text and 259 not in ours.encode(text, special=False)
    ours.save(folder / "copy")
    assert from_pretrained(folder / "copy").encode(text) == ids


def test_tokens_of_added_tokens_json(tmp_path):
    shutil.copy(shared("tiny_models/stories260K/hf/tokenizer.model"), tmp_path / "tokenizer.model")
    change(tmp_path / "added_tokens.json", **{"<call>": 512, "<|im_end|>": 513})
    change(tmp_path / "tokenizer_config.json", additional_special_tokens=["<call>"])
    ours = from_pretrained(tmp_path)
    ids = ours.encode("a<call>b<|im_end|>")
    assert {512, 513} < set(ids) and ours.vocab_size == 514 and 513 in ours.stop_ids
    assert ours.decode(ids, skip_special=True).replace(" ", "") == "ab"


@pytest.mark.parametrize("place", ["list", "folder"])
def test_conversations_with_tools_take_the_template_made_for_them(folder, place, tmp_path_factory):
    from transformers import AutoTokenizer

    plain = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tools = "{{ tools | length }}{% for m in messages %}({{ m.content }}){% endfor %}"
    if place == "list":
        templates = [{"name": "default", "template": plain}, {"name": "tool_use", "template": tools}]
        change(folder / "tokenizer_config.json", chat_template=templates)
    else:
        (folder / "chat_template.jinja").write_text(plain)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(tools)
    ours, theirs = from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for given, wanted in ((None, "[hi][yo]"), (TOOLS, "1(hi)(yo)")):
        text = ours.apply_chat_template(TALK, tools=given, tokenize=False)
        assert text == wanted == theirs.apply_chat_template(TALK, tools=given, tokenize=False)
    copy = tmp_path_factory.mktemp("copy")
    ours.save(copy)
    assert from_pretrained(copy).apply_chat_template(TALK, tools=TOOLS, tokenize=False) == "1(hi)(yo)"
    ours.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # what a user names is for all of them
    assert ours.apply_chat_template(TALK, tools=TOOLS, tokenize=False) == "hiyo"
    copy = tmp_path_factory.mktemp("own")
    ours.save(copy)
    again = AutoTokenizer.from_pretrained(copy).apply_chat_template(TALK, tools=TOOLS, tokenize=False)
    assert again == "hiyo" == from_pretrained(copy).apply_chat_template(TALK, tools=TOOLS, tokenize=False)


def test_arguments_of_a_template_are_for_every_rendering_and_saved_for_every_reader(folder):
    """`enable_thinking` and `reasoning_effort` as Qwen3's and gpt-oss's templates read them."""
    from transformers import AutoTokenizer

    text = (
        "\n{%- if effort is not defined %}{%- set effort = 'medium' %}{%- endif %}"
        "{%- macro level() %}{{ effort }}{% endmacro %}{{ level() }}"
        "{% for m in messages %}[{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<think>' if think is defined and think is false }}{{ m.content }}]{% endgeneration %}{% else %}"
        "{{ m.content }}]{% endif %}{% endfor %}"
    )
    tools = "{{ tools | length }}{{ effort }}{% for m in messages %}({{ m.content }}){% endfor %}"
    templates = [{"name": "default", "template": text}, {"name": "tool_use", "template": tools}]
    change(folder / "tokenizer_config.json", chat_template=templates)
    plain, ours = from_pretrained(folder), from_pretrained(folder)
    values = {"effort": 'hö"h\\%}', "think": False}
    ours.set_template_args(values)
    assert ours.fingerprint != plain.fingerprint and ours.chat_template != plain.chat_template
    ours.save(folder / "copy")
    again = from_pretrained(folder / "copy")
    assert again.fingerprint == ours.fingerprint and again.chat_template == ours.chat_template
    for given in (None, TOOLS):
        wanted = plain.apply_chat_template(TALK, tools=given, tokenize=False, **values)
        assert wanted != plain.apply_chat_template(TALK, tools=given, tokenize=False) and 'hö"h\\%}' in wanted
        theirs = AutoTokenizer.from_pretrained(folder / "copy")
        for reader in (ours, again, theirs):
            assert reader.apply_chat_template(TALK, tools=given, tokenize=False) == wanted
            asked = reader.apply_chat_template(TALK, tools=given, tokenize=False, effort="low", think=None)
            assert asked == plain.apply_chat_template(TALK, tools=given, tokenize=False, effort="low", think=None)
    for _ in range(3):  # rendered, and replayed
        assert ours.render_with_spans(TALK) == plain.render_with_spans(TALK, **values)


def test_arguments_that_no_template_reads(folder):
    template = "{{ think }}{% for m in messages %}{{ m.content }}{% endfor %}"
    change(folder / "tokenizer_config.json", chat_template=template)
    ours = from_pretrained(folder)
    for name in ("thinks", "messages", "eos_token"):
        with pytest.raises(UserError, match=f"never reads '{name}'.*") as error:
            ours.set_template_args({"think": True, name: 1}, "--template-arg")
        assert error.value.where == f"--template-arg.{name}" and error.value.fix == "it reads think"
    with pytest.raises(UserError, match="did you mean 'think'"):
        ours.set_template_args({"thinks": 1})
    ours.chat_template = None
    with pytest.raises(UserError, match="no chat template that could read them"):
        ours.set_template_args({"think": True})
    ours.set_template_args({})


def test_what_is_no_text_and_no_id(folder):
    ours = from_pretrained(folder)
    for special in (True, False):
        with pytest.raises(UserError, match="half a character"):
            ours.encode("a \ud800", special=special)
    with pytest.raises(UserError, match="-100 is no token id"):
        ours.decode([65, -100])
    assert ours.decode([33, 10**6, 1 << 40]) == ours.decode([33])
    with pytest.raises(UserError, match=r"file:1.*\n.*|half"):
        tokenize(conversation([TALK[0], {"role": "assistant", "content": "\udc00"}]), ours)
    change(folder / "tokenizer_config.json", added_tokens_decoder={"many": {"content": "<x>"}})
    with pytest.raises(UserError, match="no number"):
        from_pretrained(folder)


def test_a_gzip_file_that_is_cut_off(tmp_path):
    lines = "".join(f"{word} {i}\n" for i, word in enumerate(("aGk=", "aG8=") * 200))
    (tmp_path / "a.tiktoken.gz").write_bytes(gzip.compress(lines.encode())[:-12])
    with pytest.raises(UserError, match="gzip file is damaged"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("listed", [151643, [151643, 151645], []])
def test_ids_of_a_published_config_are_not_those_of_a_tokenizer_of_ones_own(folder, listed):
    inside = from_pretrained(folder).special_tokens["<|im_end|>"]
    (folder / "tokenizer_config.json").write_text("{}")
    change(folder / "config.json", bos_token_id=listed, eos_token_id=inside)
    found = from_pretrained(folder)
    assert found.bos_id is None and found.eos_id == inside


def test_a_tokenizer_that_says_it_has_no_first_token_has_none(folder):
    """Qwen's: its config.json has a number for it, and transformers puts nothing in front of a text."""
    (folder / "tokenizer_config.json").write_text("{}")
    change(folder / "config.json", bos_token_id=5)
    with_one = from_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"bos_token": null}')
    without = from_pretrained(folder)
    assert (with_one.bos_id, without.bos_id) == (5, None) and with_one.fingerprint != without.fingerprint


def test_bare_ranks_know_their_ends(tmp_path):
    """The file declares nothing, so its markers are text; a chat template makes them what they are in the model."""
    ours = from_pretrained(shared("tokenizers/qwen/qwen.tiktoken"))
    assert (ours.eos_id, ours.vocab_size) == (151643, 151646) and len(ours.encode("<|im_end|>")) > 1
    ours.chat_template = load_template("chatml")
    assert ours.encode("<|im_end|>") == [151645] and ours.stop_ids == {151643, 151645}
    ids, trained = tokenize(conversation(TALK), ours)
    assert ids[trained].tolist() == [*ours.encode("yo"), 151645]
    assert ours.add_tokens(["<call>"]) == [151646]


@pytest.mark.filterwarnings("ignore:.*no token for")  # of llama2's markers, which its models read as text
def test_bare_sentencepiece_trains_its_end():
    ours = from_pretrained(shared("tokenizers/llama2/tokenizer.model"))
    assert ours.encode("a</s>")[-1] != 2
    ours.chat_template = load_template("llama2")
    ids, trained = tokenize(conversation(TALK), ours)
    assert ids.tolist().count(1) == 1 and ids[-1] == 2 and trained[-1]
    ids, spans = ours.encode_with_offsets("\n👩")
    assert spans[0] == (0, 1) and ours.decode(ids[:1]).strip() == ""  # the space in front belongs to what follows


def test_an_end_that_is_no_token_is_followed_by_eos():
    ours = from_pretrained(shared("tiny_models/stories260K/hf"))
    ours.chat_template = load_template("chatml")
    with pytest.warns(UserWarning, match="no token for"):
        ids, trained = tokenize(conversation(TALK), ours)
    assert ids[-1] == ours.eos_id and trained[-1]
    assert ours.decode(ids[trained].tolist()).replace(" ", "") == "yo<|im_end|></s>"
    ours.add_tokens(["<|im_start|>", "<|im_end|>"])
    ids, trained = tokenize(conversation(TALK), ours)
    assert ids[trained][-1] == ours.special_tokens["<|im_end|>"] and ours.eos_id not in ids[1:]
    ours.chat_template, ours.eos_id = load_template("gemma"), None
    with pytest.raises(UserError, match="ends an answer with no token"):
        tokenize(conversation(TALK), ours)


def test_calls_are_written_or_refused(folder):
    ours = from_pretrained(folder)
    talk = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}]
    ours.chat_template = load_template("chatml")
    text = ours.apply_chat_template(talk, tools=TOOLS, tokenize=False)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    assert text.endswith(f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n")
    assert text.startswith("<|im_start|>system\nYou can call these functions:\n<tools>\n" + json.dumps(TOOLS[0]))
    ids, trained = tokenize(conversation(talk, tools=TOOLS), ours)
    assert ours.decode(ids[trained].tolist()) == f"{call}\n{call}<|im_end|>"
    with_system = ours.apply_chat_template([{"role": "system", "content": "S"}, *talk], tools=TOOLS, tokenize=False)
    assert with_system.startswith("<|im_start|>system\nS\n\nYou can call") and with_system.count("You can call") == 1
    ours.chat_template = load_template("zephyr")
    with pytest.raises(UserError, match="calls 'weather', which the chat template does not write"):
        tokenize(conversation([TALK[0], {"role": "assistant", "content": "x", "tool_calls": [CALL]}]), ours)


def test_padding_that_is_named_is_saved(folder, tmp_path_factory):
    from transformers import AutoTokenizer

    ours = from_pretrained(folder)
    ours.set_pad("<filler>")
    copy = tmp_path_factory.mktemp("copy")
    ours.save(copy)
    assert AutoTokenizer.from_pretrained(copy).pad_token_id == from_pretrained(copy).pad_id == ours.pad_id == 259
    with pytest.raises(UserError, match="ends answers"):
        ours.set_pad("<|im_end|>")
