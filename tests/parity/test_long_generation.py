"""Greedy answers that go on for 2,100 tokens, far past every window, equal transformers' token for token."""

import json

import pytest
import torch
from parity.shrink import reference, shrunk

from ftlib import models
from ftlib.generation import Engine, SamplingParams

LENGTH = 2100
NAMES = (
    "mistral-7b-v0.1", "gemma-2-2b", "gemma-3-1b", "gpt-oss-20b", "olmo-3-7b", "qwen3-30b-a3b", "mixtral-8x7b",
    "exaone-4.0-32b",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers_far_past_the_window(name, tmp_path):
    config = shrunk(name)
    theirs = reference(config)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompt = list(range(20, 45))
    params = SamplingParams(LENGTH, temperature=0)
    [[completion]] = Engine(models.from_pretrained(tmp_path)).generate([prompt], params)
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert completion.token_ids == expected[0, len(prompt) :].tolist()
