"""Preferences as only a GPU can show them: bf16, fused adapters, compiled blocks, attention over shared prompts."""

import json
import math

import pytest
import torch
from tiny_model import train, write_config, write_model, write_tokenizer

from ftlib import data, models, tokenizers
from ftlib.data import Preferences, Wanted
from ftlib.layers.attention import choose_backend
from ftlib.preference.answers import answer_logprobs
from ftlib.sections import Data, Source

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def write_pairs(file):
    rows = [{"prompt": "tell me " * (3 * i + 2), "chosen": "yes" * (i + 1), "rejected": "no" * 5} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "gemma-3-1b"])
def test_shared_prompts_in_bf16(name, compiled, tmp_path):
    """Against the same rows in float32 without sharing; the second model has windows."""
    write_tokenizer(tmp_path)
    rows = Data(sources=(Source(path=str(write_pairs(tmp_path / "pairs.jsonl"))),), seq_len=512)
    tokenizer = tokenizers.from_pretrained(tmp_path)
    documents = data.load(rows, tokenizer, seed=0, wanted=Wanted("pairs")).train
    folder = write_model(tmp_path / "model", name, head_dim=64)
    found = []
    for dtype, shared in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = models.from_pretrained(folder, dtype=dtype, device="cuda")
        model.model.use_attention(choose_backend("auto", torch.device("cuda"), dtype))
        if compiled and dtype == torch.bfloat16:
            for block in model.model.layers:
                block.compute = torch.compile(block.compute, fullgraph=True)
        batch = Preferences(documents, shared=shared).batch([[0, 5, 8], [3, 7]], 1024, 256, 4).to("cuda")
        logprobs = answer_logprobs(model(batch), model.lm_head.weight, batch.answers, **model.logit_terms)
        (logprobs * torch.linspace(-1, 1, len(logprobs), device="cuda")).sum().backward()
        weight = model.model.layers[0].self_attn.k_proj.weight.grad.float()
        found.append((logprobs.detach(), weight))
    exact, apart, shared = found
    for i in range(2):
        error = [(other[i] - exact[i]).norm() / exact[i].norm() for other in (apart, shared)]
        assert error[1] <= 1.5 * error[0] + 1e-3, [float(e) for e in error]


@pytest.mark.parametrize("share", [False, True])
def test_the_first_loss_is_ln_2(share, tmp_path):
    """bf16, compiled blocks, fused adapters: the recipe as it runs."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    file = write_config(
        tmp_path / "config.yaml", write_model(tmp_path / "model", head_dim=64), pairs, steps=2, dtype="bf16",
        data={"sources": [{"path": str(pairs)}], "seq_len": 512}, dpo={"share_prompt": share},
    )  # fmt: skip
    rows = train("dpo", "--config", file, "memory.compile=auto")
    assert abs(rows[0]["loss"] - math.log(2)) < 1e-6 and rows[1]["loss"] != rows[0]["loss"]
