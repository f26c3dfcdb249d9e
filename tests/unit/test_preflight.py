"""The estimate of a run's memory beside what GPUs showed."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from tiny_model import ROOT, write_config, write_model, write_rows

from ftlib import cli, preflight, quant
from ftlib.adapters import lora
from ftlib.models import load
from ftlib.sections import Batch, Data, Memory, Optim, Parallel, Source

KEPT = {name: Memory(recompute=name) for name in ("none", "selective", "full")}
PARKED = Memory(recompute="except_attention", offload=True)
# What ran, on an H100 or H200 (tools/bench/LOG.md) or two (tools/bench/results/h200x2_meshes.json), its peak in GiB.
MEASURED = {
    "8b": ("llama-3.1-8b", 2, KEPT["none"], 1, {}, 54.4),
    "8b selective": ("llama-3.1-8b", 2, KEPT["selective"], 1, {}, 43.5),
    "8b full": ("llama-3.1-8b", 2, KEPT["full"], 1, {}, 19.3),
    "8b offloaded": ("llama-3.1-8b", 2, PARKED, 1, {}, 16.48),
    "8b sharded": ("llama-3.1-8b", 2, KEPT["none"], 2, {}, 44.36),
    "8b tp": ("llama-3.1-8b", 2, KEPT["none"], 2, {"dp_shard": 1, "tp": 2}, 28.56),
    "70b sharded": ("llama-3.3-70b", 2, KEPT["full"], 2, {}, 86.25),
    "0.6b": ("qwen3-0.6b", 4, KEPT["none"], 1, {}, 22.9),
    "0.6b offloaded": ("qwen3-0.6b", 4, Memory(recompute="full", offload=True), 1, {}, 2.30),
    "0.6b every weight": ("qwen3-0.6b", 4, KEPT["none"], 1, {"full": True}, 25.57),
    "1.7b every weight": ("qwen3-1.7b", 4, KEPT["full"], 1, {"full": True}, 14.5),
    "1.7b in backward": ("qwen3-1.7b", 4, PARKED, 1, {"full": True, "in_backward": True}, 13.32),
}


@cache
def built(shape, full):
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text((ROOT / f"tests/parity/configs/{shape}.json").read_text())
        model = load.build(Path(folder), torch.bfloat16)
    if not full:
        lora.attach(model, "all-linear", rank=16)
    return model


def planned(shape, micro_rows, memory, gpus, more, rows=None, **optim):
    mesh = {key: size for key, size in more.items() if key in ("dp_shard", "cp", "tp")}
    cfg = SimpleNamespace(
        dtype="bf16",
        data=Data(sources=(Source(path="x"),), seq_len=4096),
        batch=Batch(rows=rows or micro_rows * gpus // mesh.get("tp", 1), micro_rows=micro_rows),
        memory=memory,
        optim=Optim(in_backward=more.get("in_backward", False), **optim),
        parallel=Parallel(**mesh),
    )
    return preflight.need(built(shape, more.get("full", False)), cfg, gpus)


@pytest.mark.parametrize("name", MEASURED)
def test_the_estimate_is_near_what_was_measured(name):
    *case, measured = MEASURED[name]
    found = planned(*case).about / 2**30
    assert found == pytest.approx(measured, rel={"8b sharded": 0.09, "1.7b in backward": 0.05}.get(name, 0.035))


def test_a_quantized_base_is_shared_and_gathered_in_its_few_bits():
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text((ROOT / "tests/parity/configs/llama-3.1-8b.json").read_text())
        model = load.build(Path(folder), torch.bfloat16)
    quant.hold(model, "nf4")
    lora.attach(model, "all-linear", rank=16)
    cfg = SimpleNamespace(
        dtype="bf16", data=Data(sources=(Source(path="x"),), seq_len=4096), batch=Batch(rows=2, micro_rows=1),
        memory=KEPT["full"],
    )  # fmt: skip
    one, two = (preflight.need(model, cfg, gpus) for gpus in (1, 2))
    blocks = sum(layer.base.shape.numel() for layer in model.modules() if hasattr(layer, "base"))
    beside = model.lm_head.weight.nbytes * 2 + sum(p.nbytes for p in model.model.layers.parameters())
    assert one.weights == pytest.approx(blocks * 4.127 / 8 + beside, rel=1e-3)
    assert 0.5 * one.weights < two.weights < 0.51 * one.weights
    plain = planned("llama-3.1-8b", 1, KEPT["full"], 2, {})
    assert plain.gathered - two.gathered == pytest.approx(2 * blocks / 32 * (2 - 0.5), rel=1e-3)


def test_several_micro_batches_hold_gradients_while_there_are_activations():
    case = ("qwen3-0.6b", 4, KEPT["none"], 1, {"full": True})
    once, several = planned(*case), planned(*case, rows=8)
    assert several.about - once.about == once.gradients
    early = {"full": True, "in_backward": True}
    assert planned(*case[:-1], early).about == once.about  # the head's gradient is there when backward begins


def test_state_in_host_memory_is_not_counted_on_the_device(monkeypatch):
    case = ("qwen3-0.6b", 4, KEPT["full"], 1, {"full": True})
    here, there = planned(*case), planned(*case, offload=True)
    assert there.host == here.optimizer == there.checkpoint - there.final and here.host == 0
    largest = 151_936 * 1024 * 2 * 2  # the embedding's two moments
    assert there.optimizer == min(preflight.STEPPED * largest, here.optimizer)
    assert here.about - there.about == here.optimizer - there.optimizer
    monkeypatch.setattr(preflight, "available", lambda: ("the GPU", 1 << 50, 1))
    monkeypatch.setattr(preflight, "_machine", lambda: (there.host - 1, 1))
    assert "of host memory for each of 1 processes (optim.offload)" in preflight._memory(there)
    monkeypatch.setattr(preflight, "_machine", lambda: (there.host, 1))
    assert preflight._memory(there) is None and preflight._memory(here) is None
    monkeypatch.setattr(preflight, "available", lambda: ("this machine", there.memory, 1))  # where it is no other place
    assert preflight._memory(there) is not None


def test_processes_share_all_but_what_they_gather():
    case = ("llama-3.1-8b", 2, KEPT["full"])
    one, eight = planned(*case, 1, {"full": True}), planned(*case, 8, {"full": True})
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(eight, part) == getattr(one, part) // 8
    assert eight.activations == one.activations and one.gathered == 0
    block, head = 218_112_000, 525_336_576  # numbers; what trains has gradients, and wide ones to sum
    assert eight.gathered == pytest.approx(block * (2 * 2 + 2 + 4) + head * (2 + 4), rel=1e-3)
    both = planned(*case, 8, {"full": True, "cp": 2})
    for part in ("activations", "kept", "working"):
        assert getattr(both, part) == getattr(eight, part) // 2


def test_capped_scores_are_kept_only_where_they_are_formed(monkeypatch):
    model = built("gemma-2-2b", True)
    plain = planned("gemma-2-2b", 1, KEPT["none"], 1, {"full": True})
    monkeypatch.setattr(model.model, "backend", "flex")
    found = planned("gemma-2-2b", 1, KEPT["none"], 1, {"full": True})
    heads = sum(layer.mixer.heads for layer in model.arch.layers)
    assert plain.kept - found.kept == 5 * heads * 4096 * 4096 * 2


def test_processes_of_this_machine_are_counted_before_they_start(tmp_path, monkeypatch):
    file = write_config(tmp_path / "c.yaml", write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 20))
    sharing = []
    monkeypatch.setattr(preflight, "_memory", lambda least: sharing.append(preflight.available()[2]))
    for words in (["--nproc-per-node", "2"], []):
        assert cli.main(["validate", *words, "recipes/lora_sft.py", "--config", str(file), "batch.micro_rows=2"]) == 0
    assert sharing == [2, 1]
