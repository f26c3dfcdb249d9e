"""What a mesh needs is known before anything is loaded, and a large model starts sharded."""

import json
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from parallel import memory
from parity.shrink import shrunk
from safetensors.torch import save_file
from tiny_model import ROOT, environment
from torch.distributed.tensor import DTensor

from ftlib.adapters import lora
from ftlib.errors import UserError
from ftlib.models import families, keys, load, shards
from ftlib.models.language_model import LanguageModel
from ftlib.optim.pieces import piece
from ftlib.parallel import check
from ftlib.parallel import run as processes
from ftlib.parallel.apply import apply
from ftlib.sections import Memory, Parallel


def on_meta(config):
    arch, table = families.read(config, where="config.json")
    with torch.device("meta"):
        return LanguageModel(arch, table, config).to(torch.bfloat16)


def settings(seq_len=64, exact_match=0, **parallel):
    data, evaluation = SimpleNamespace(seq_len=seq_len), SimpleNamespace(exact_match=exact_match)
    return SimpleNamespace(parallel=Parallel(**parallel), data=data, eval=evaluation, memory=Memory())


@pytest.mark.parametrize(
    "changes,sections,words",
    [
        ({}, {"tp": 3}, ("num_attention_heads 4", "parallel.tp 3", "vocab_size 160")),
        ({"num_key_value_heads": 4}, {"tp": 3}, ("fix: set parallel.tp=2, the largest below 3 that divides",)),
        ({"num_key_value_heads": 1}, {"tp": 2}, ("num_key_value_heads 1", "parallel.tp 2")),
        ({"moe_intermediate_size": 42}, {"tp": 4}, ("moe_intermediate_size 42", "parallel.tp 4")),
        ({"shared_expert_intermediate_size": 42}, {"tp": 4}, ("shared_expert_intermediate_size 42", "parallel.tp 4")),
        ({}, {"tp": 2, "seq_len": 63}, ("data.seq_len 63", "data.seq_len=64")),
        ({}, {"cp": 4, "cp_style": "allgather", "seq_len": 60}, ("multiple of 8", "early and a late")),
        ({}, {"cp": 4, "cp_style": "ring", "seq_len": 60}, ("multiple of 8", "ring gives each process an early")),
        ({}, {"cp": 8}, ("num_attention_heads 4", "parallel.cp 8", "allgather")),
        ({}, {"tp": 2, "exact_match": 5}, ("eval.exact_match",)),
    ],
)
def test_what_does_not_fit_is_named_by_its_keys(changes, sections, words):
    mixtures = {"moe_intermediate_size": "qwen3-30b-a3b", "shared_expert_intermediate_size": "qwen1.5-moe-a2.7b"}
    model = on_meta(shrunk(mixtures.get(next(iter(changes), ""), "llama-3.2-1b"), **changes))
    cfg = settings(**sections)
    with pytest.raises(UserError) as caught:
        check.check(model, cfg, cfg.parallel.cp, cfg.parallel.tp)
    assert all(word in str(caught.value) for word in words), caught.value
    assert ("seq_len" in str(caught.value)) == any("seq_len" in word for word in (*sections, *words))


@pytest.mark.parametrize("name", ["mistral-7b-v0.1", "gpt-oss-20b", "gemma-2-2b"])
def test_a_ring_is_for_plain_attention(name):
    cfg = settings(cp=2, cp_style="ring")
    with pytest.raises(UserError, match=r"has a window[\s\S]*parallel.cp_style=allgather"):
        check.check(on_meta(shrunk(name)), cfg, 2, 1)


def test_what_a_run_says_of_its_processes():
    assert processes.note(Parallel(tp=2), 8) == ["processes: 8 (dp_shard 4 x tp 2)"]
    assert processes.note(Parallel(), 1) == []


def test_a_product_that_is_not_the_number_of_processes():
    with pytest.raises(UserError, match=r"tp 4 = 4, but there are 6 processes"):
        processes.sizes(Parallel(dp_shard=1, tp=4), 6)


def test_what_has_no_tensor_parallel_plan_is_named():
    model = on_meta(shrunk("qwen3-30b-a3b"))
    model.model.layers[1].mlp.critic = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.critic \(Linear\) has no tensor-parallel plan"):
        check.tensor.check(model, 2)


@contextmanager
def one_of_eight(rank, monkeypatch, **parallel):
    """The run of one of eight processes, without the others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", str(rank))
    dist.destroy_process_group() if dist.is_initialized() else None
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
    try:
        yield processes.start(Parallel(**parallel), 0)
    finally:
        dist.destroy_process_group()


def test_processes_with_other_tokens_have_other_dropout(monkeypatch):
    drawn = []
    for rank in range(8):
        with one_of_eight(rank, monkeypatch, cp=2, tp=2):
            drawn.append(torch.rand(()).item())
    assert drawn[::2] == drawn[1::2], "the two processes that share matrices must drop the same"
    assert len(set(drawn)) == 4
    torch.manual_seed(0)
    assert drawn[0] == torch.rand(()).item(), "the first draws as a process alone"


@pytest.mark.parametrize("parallel", [{}, {"tp": 4}, {"cp": 2, "tp": 2}])
def test_a_70b_shape_starts_on_eight_processes(parallel, monkeypatch):
    shape = {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    model = on_meta(shrunk("llama-3.1-8b", **shape) | {"head_dim": 128})
    with one_of_eight(3, monkeypatch, **parallel) as run:
        check.check(model, settings(8192, **parallel), run.data["cp"].size(), run.data["tp"].size())
        apply(model, run, Memory(compile=False), torch.bfloat16)
        parameters = dict(model.named_parameters())
        assert all(isinstance(p, DTensor) and p.is_meta for p in parameters.values())
        local = sum(p.to_local().numel() for p in parameters.values())
        whole = sum(p.numel() for p in parameters.values())
        assert 69e9 < whole < 71e9
        assert local < whole / 8 * 1.01, "each process holds its eighth"


def test_a_matrix_whose_rows_are_shared_twice_is_summed_over_both_axes(monkeypatch):
    model = on_meta(shrunk("llama-3.1-8b"))
    with one_of_eight(3, monkeypatch, tp=2) as run:
        apply(model, run, Memory(compile=False), torch.bfloat16)
        for part in ("q_proj", "o_proj"):
            groups = piece(model.get_parameter(f"model.layers.0.self_attn.{part}.weight")).groups
            assert sorted(group.size() for group in groups) == [2, 4], part


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-20b"])
@pytest.mark.parametrize("parallel", [{"tp": 8}, {"tp": 2}, {}])
def test_a_process_reads_its_slice_of_each_expert(name, parallel, monkeypatch):
    """The last of eight, which without tp has none of twelve experts."""
    width = {"intermediate_size": 96} | ({"moe_intermediate_size": 48} if name.startswith("qwen3") else {})
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, **width}
    model = on_meta(shrunk(name, **sizes)).float()
    wanted = {key: torch.rand(p.shape) for key, p in model.named_parameters()}
    weights = Counting(keys.to_hf(wanted, model.table))
    with one_of_eight(7, monkeypatch, **parallel) as run:
        apply(model, run, Memory(compile=False), torch.float32)
        model.to_empty(device="cpu")
        load.load_weights(model, weights)
        for key, part in model.named_parameters():
            assert torch.equal(part.to_local(), wanted[key][shards.local_index(part)]), key
    held = sum(part.to_local().numel() for part in model.parameters())
    assert weights.read_numbers == held < sum(part.numel() for part in model.parameters()) / 4


def test_an_adapter_on_experts_is_merged_where_its_rows_are_no_whole_experts(monkeypatch):
    """Twelve experts over eight processes."""
    model = on_meta(shrunk("qwen3-30b-a3b")).float()
    lora.attach(model, ("gate_up_proj",), rank=2)
    with one_of_eight(5, monkeypatch) as run:
        apply(model, run, Memory(compile=False), torch.float32)
        stack = model.model.layers[0].mlp.experts.gate_up_proj
        with torch.no_grad():
            merged = stack.adapters["policy"].merged(stack.weight)
        assert merged.shape == stack.weight.shape and merged.placements == stack.weight.placements


class Counting:
    """A checkpoint in memory that counts the numbers it is asked for."""

    def __init__(self, tensors):
        self.tensors, self.read_numbers = tensors, 0

    def read(self, key, index):
        found = self.tensors[key][index]
        self.read_numbers += found.numel()
        return found


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_process_needs_memory_for_its_part_only(quantize, tmp_path):
    """The model has 300 MiB; what a process touches while it loads stays near its half of them, or, where the matrices
    are quantized, near the half of what they are then and the one that is."""
    config = shrunk(
        "llama-3.1-8b", hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=8192, tie_word_embeddings=False,
    )  # fmt: skip
    config["head_dim"] = 128
    arch, table = families.read(config, where="config.json")
    with torch.device("meta"):
        model = LanguageModel(arch, table, config)
    names = {"attn_pre": "input_layernorm", "mlp_pre": "post_attention_layernorm"}
    tensors = {}
    for name, parameter in model.named_parameters():
        parts = [names.get(part, part) for part in name.split(".")]
        tensors[".".join(parts)] = torch.full(parameter.shape, 0.01)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    del tensors
    env = environment(ROOT / "tests") | {"CUDA_VISIBLE_DEVICES": ""}
    command, words = [sys.executable, memory.__file__], [str(tmp_path), *([quantize] if quantize else [])]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), *words], env=env, stdout=-1, stderr=-1)
        for rank in range(2)
    ]
    for rank in ranks:
        said, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()[-3000:]
        used, held, whole = map(float, said.split())
        assert whole == 320 and abs(held - (64 + 256 * (4.127 / 32 if quantize else 1)) / 2) < 2
        # One matrix of 16 and what rounds it: 80 to 100, 124 once beside other work; its plain half would be 128 more.
        assert used < held + (140 if quantize else 50), (used, held, whole)
