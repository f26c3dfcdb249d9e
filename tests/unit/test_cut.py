"""Which tokens overlap some characters: from bytes, as from the characters that the library itself reports."""

import json
import random

import pytest
from shared_data import ROOT

from ftlib.data import Example
from ftlib.data.masks import tokenize_all
from ftlib.models import hub
from ftlib.tokenizers import from_pretrained
from ftlib.tokenizers.backends import JsonBackend
from ftlib.tokenizers.cut import ByteCut, SpanCut, is_bytewise

LETTERS = [
    "a",
    "b",
    " ",
    "  ",
    "\n",
    "ü",
    "e\u0301",
    "東京",
    "👩‍👩‍👧",
    "<|im_end|>",
    "<|im_start|>",
    "12345",
    "'ll",
    "\u200b",
    "ﬁ",
]
FILES = sorted(str(path.parent) for path in ROOT.glob("tokenizers/*/tokenizer.json"))


@pytest.mark.parametrize("folder", ["ftlib:demo/model", *FILES])
def test_both_ways_agree_on_every_range(folder):
    tokenizer = from_pretrained(hub.resolve(folder) if folder.startswith("ftlib:") else folder)
    draw = random.Random(1)
    texts = ["", *("".join(draw.choices(LETTERS, k=draw.randrange(1, 12))) for _ in range(60))]
    bytewise = 0
    for text, cut in zip(texts, tokenizer.encode_batch(texts), strict=True):
        spans = SpanCut(*tokenizer.encode_with_offsets(text))
        assert list(cut.ids) == list(spans.ids)
        bytewise += isinstance(cut, ByteCut)
        for start in range(len(text) + 1):
            for end in range(start, len(text) + 1):
                assert cut.between(start, end) == spans.between(start, end), (text, start, end)
    if folder.startswith("ftlib:") or "gpt2" in folder:
        assert bytewise > 50  # the fast way was taken


BYTEWISE = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "ByteLevel"}]}},
        {"model": {"type": "Unigram"}},
        {"model": {"type": "BPE", "unk_token": "<unk>"}},
        {"model": {"type": "BPE", "end_of_word_suffix": "</w>"}},
        {"added_tokens": [{"content": "<m>", "id": 1, "lstrip": True}]},
    ],
    ids=json.dumps,
)
def test_other_kinds_are_cut_by_characters(change):
    assert is_bytewise(BYTEWISE) and is_bytewise(BYTEWISE | {"normalizer": {"type": "NFC"}})
    assert not is_bytewise(BYTEWISE | change)


def test_texts_that_normalisation_changes_are_cut_by_characters():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    built = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    built.normalizer, built.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = JsonBackend(built.to_str(), "x")
    for text, bytewise in (("ü ab", True), ("e\u0301", False), ("x\u0315\u0323", False)):  # the last: only reordered
        cut = backend.encode_batch([text])[0]
        assert isinstance(cut, ByteCut) == bytewise
        spans = SpanCut(*backend.encode(text))
        assert list(cut.ids) == list(spans.ids) and cut.between(0, 1) == spans.between(0, 1)


def test_a_token_that_is_added_later_has_its_length():
    tokenizer = from_pretrained(hub.resolve("ftlib:demo/model"))
    before = tokenizer.encode_batch(["ü <new> ü"])[0]
    tokenizer.add_tokens(["<new>"])
    after = tokenizer.encode_batch(["ü <new> ü"])[0]
    assert isinstance(after, ByteCut) and len(after.ids) < len(before.ids)
    assert after.between(2, 7) == SpanCut(*tokenizer.encode_with_offsets("ü <new> ü")).between(2, 7)


def test_garbage_collection_goes_on_afterwards():
    import gc

    found = tokenize_all(
        [Example("a", text="hello"), Example("b", text="\ud800")], from_pretrained(hub.resolve("ftlib:demo/model"))
    )
    assert gc.isenabled() and len(found[0][0]) and "surrogate" in str(found[1])
