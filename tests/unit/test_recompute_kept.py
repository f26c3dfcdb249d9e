"""What a compiled block keeps for backward where its matrices train."""

import json
from functools import partial

import torch
from tiny_model import ROOT

from ftlib.layers.batch import Batch, Layout
from ftlib.models import initial, load
from ftlib.parallel import recompute
from ftlib.sections import Memory

ROWS, LENGTH, HEADS, WIDTH = 2, 64, 4, 16


def test_except_attention_keeps_one_output_more_than_full(tmp_path, monkeypatch):
    cut = partial(torch.compile, backend="aot_eager_decomp_partition")  # decides what is kept, and writes no code
    monkeypatch.setattr(torch, "compile", cut)
    config = json.loads((ROOT / "tests/parity/configs/qwen3-0.6b.json").read_text())
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": WIDTH}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    ends = torch.arange(0, (ROWS + 1) * LENGTH, LENGTH, dtype=torch.int32)
    ids, positions = torch.randint(0, 64, (ROWS, LENGTH)), torch.arange(LENGTH).expand(ROWS, LENGTH)
    kept, gradients = {}, {}
    for mode in ("full", "except_attention"):
        torch._dynamo.reset()
        model = load.build(tmp_path, torch.float32).to_empty(device="cpu")
        model.tie()
        initial.init_weights(model, 0, None, True)
        model.model.use_attention("sdpa")
        recompute.use(model, Memory(recompute=mode, compile=True), torch.device("cpu"))
        batch = Batch(ids, ids, positions, Layout.packed(ends, LENGTH, (ROWS, LENGTH)), target_tokens=ids.numel())
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (numbers.append(x.numel()), x)[1], lambda x: x):  # noqa: B023
            hidden = model(batch)
        hidden.square().sum().backward()
        kept[mode] = sum(numbers)
        gradients[mode] = [p.grad for p in model.parameters() if p.grad is not None]
    attended = ROWS * LENGTH * HEADS * (WIDTH + 1)  # and the sums of its softmax
    assert kept["except_attention"] - kept["full"] == attended
    torch.testing.assert_close(gradients["except_attention"], gradients["full"])
