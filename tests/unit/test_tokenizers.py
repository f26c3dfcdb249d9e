"""Token ids, offsets and special tokens: against goldens, transformers and the libraries themselves."""

import gzip
import json
import random

import pytest
from shared_data import shared

from ftlib.errors import UserError
from ftlib.tokenizers import from_pretrained

TEXTS = [
    "", "a", " a", "Hello, world!", "  two  spaces ", "tabs\tand\nnewlines\r\n\r\n", "naïve café — 東京 👩‍👩‍👧 \u200b",
    "don't I'll 12345 x=1_000;", "<|im_start|>user\nhi<|im_end|>", "e\u0301 A\u030a decomposed",
    "Ωmega ﬁ ½", "\x00\x7f",
]  # fmt: skip


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    """A small byte-level BPE folder as transformers writes it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True) for t in ("<|pad|>", "<|im_start|>", "<|im_end|>")],
    )  # fmt: skip
    built.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20, "hello world " * 30], trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    built.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|pad|>",
              "bos_token": "<|im_start|>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    return folder


def check_offsets(tokenizer, text):
    ids, spans = tokenizer.encode_with_offsets(text)
    assert len(ids) == len(spans)
    covered = set()
    for (start, end), before in zip(spans, [(0, 0), *spans], strict=False):
        assert 0 <= start <= end <= len(text) and start >= before[0], (text, spans)
        covered |= set(range(start, end))
    assert {i for i, c in enumerate(text) if not c.isspace()} <= covered, (text, spans)


def test_tokenizer_json_equals_transformers(byte_level):
    from transformers import AutoTokenizer

    ours, theirs = from_pretrained(byte_level), AutoTokenizer.from_pretrained(byte_level)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        check_offsets(ours, text)
    assert (ours.eos_id, ours.pad_id, ours.bos_id) == (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id)
    assert ours.vocab_size == len(theirs) and ours.stop_ids == {2, 5}


def test_special_tokens_are_matched_or_text(byte_level):
    ours = from_pretrained(byte_level)
    im_end = ours.special_tokens["<|im_end|>"]
    assert ours.encode("x<|im_end|>")[-1] == im_end
    plain = ours.encode("x<|im_end|>", special=False)
    assert im_end not in plain and ours.decode(plain) == "x<|im_end|>"
    assert ours.decode(ours.encode("x<|im_end|>"), skip_special=True) == "x"


def test_bos_is_never_doubled(byte_level):
    ours = from_pretrained(byte_level)
    once = ours.encode("hello", bos=True, eos=True)
    assert once.count(ours.bos_id) == 1 and once[-1] == ours.eos_id
    assert ours.encode("<|im_start|>hello", bos=True).count(ours.bos_id) == 1


def test_offsets_keep_tokens_that_are_only_space(byte_level):
    ours = from_pretrained(byte_level)
    ids, spans = ours.encode_with_offsets("a   b\n\nc")
    assert all(end > start for start, end in spans), (ids, spans)


def test_save_gives_the_same_tokenizer_here_and_in_transformers(byte_level, tmp_path):
    from transformers import AutoTokenizer

    ours = from_pretrained(byte_level)
    ours.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    ours.save(tmp_path)
    again, theirs = from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hello world"}]
    expected = theirs.apply_chat_template(messages, return_dict=False)
    assert again.encode(TEXTS[3]) == ours.encode(TEXTS[3]) and again.apply_chat_template(messages) == expected
    assert again.fingerprint == ours.fingerprint != from_pretrained(byte_level).fingerprint


GOLDEN_FILES = {
    "qwen2(NFC)": "qwen/qwen.tiktoken", "cl100k_base": "openai/cl100k_base.tiktoken.gz",
    "tiktoken_small": "torchtune_small/tiktoken_small.model", "llama2": "llama2/tokenizer.model",
    "mistral_v3": "mistral/mistral_instruct_tokenizer_240323.model.v3", "m.model": "torchtune_small/m.model",
    "gpt2": "gpt2", "tok512": "../tiny_models/stories260K/hf/tokenizer.model",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*split pattern")
@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_golden_ids(name):
    golden = json.loads(shared("tokenizers/golden_tokenize_sample.json").read_text())
    tokenizer = from_pretrained(shared(f"tokenizers/{GOLDEN_FILES[name]}"))
    for text, ids in zip(golden["strings"], golden["ids"][name], strict=True):
        assert tokenizer.encode(text) == ids, text
        if name not in ("llama2", "mistral_v3", "m.model", "tok512"):
            check_offsets(tokenizer, text)


@pytest.mark.parametrize(
    ("stem", "file"),
    [("gpt-2", "gpt2"), ("qwen2", "qwen/qwen.tiktoken"), ("llama-spm", "llama2/tokenizer.model")],
)
def test_golden_ids_of_llama_cpp(stem, file):
    tokenizer = from_pretrained(shared(f"tokenizers/{file}"))
    folder = "tokenizers/golden_llamacpp/ggml-vocab-"
    texts = shared(f"{folder}{stem}.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = shared(f"{folder}{stem}.gguf.out").read_text().split("\n")
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer.encode(text) == [int(i) for i in line.split()], repr(text)


def test_offsets_of_text_that_is_composed_first():
    tokenizer = from_pretrained(shared("tokenizers/qwen/qwen.tiktoken"))
    text = "e\u0301t\u00e9 A\u030a x"
    ids, spans = tokenizer.encode_with_offsets(text)
    assert tokenizer.decode(ids) == "\u00e9t\u00e9 \u00c5 x"
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    check_offsets(tokenizer, text)


def test_sentencepiece_offsets_and_byte_fallback():
    tokenizer = from_pretrained(shared("tokenizers/llama2/tokenizer.model"))
    text = "hi 👩 there"
    ids, spans = tokenizer.encode_with_offsets(text)
    emoji = [span for span in spans if span[0] <= 3 < span[1]]
    assert len(emoji) >= 4 and all(text[s:e].strip() == "👩" for s, e in emoji)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_random_text_survives_the_round_trip(byte_level):
    tokenizer, draw = from_pretrained(byte_level), random.Random(0)
    for _ in range(50):
        text = "".join(chr(draw.choice([*range(32, 127), 10, 0xE9, 0x4E2D, 0x1F600])) for _ in range(40))
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
        check_offsets(tokenizer, text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b"{\"broken\": ", "cannot be read"),
        (b"aGk= 0\nnot a line\n", "no line of a rank file"),
        (b"\x0a\x05garbage that is no model", "cannot be read"),
        (b"plain words", "no known kind"),
        (gzip.compress(b"aGk= 0\nx y z\n", mtime=0), "no line of a rank file"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, content, words):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        from_pretrained(file)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        from_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no tokenizer"):
        from_pretrained(tmp_path)
