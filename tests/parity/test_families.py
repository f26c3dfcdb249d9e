"""Every family against transformers: logits, loss, gradients, round trip, packed documents."""

import json

import pytest
import torch
import torch.nn.functional as F
from parity.shrink import reference, relative, shrunk
from safetensors.torch import load_file, save_file

from ftlib import models, optim
from ftlib.checkpoint import Saver, State
from ftlib.layers.batch import from_documents
from ftlib.losses.language_modelling import next_token_loss
from ftlib.models import keys
from ftlib.models.load import base_state
from ftlib.parallel import run as processes
from ftlib.sections import Checkpoint, Optim, Parallel

CASES = {
    "llama-2-7b": {}, "llama-3.1-8b": {}, "mistral-7b-v0.1": {}, "mistral-nemo-12b": {}, "qwen2.5-0.5b": {},
    "qwen3-8b": {}, "mixtral-8x7b": {}, "qwen3-30b-a3b": {}, "gemma-2-2b": {}, "gemma-3-1b": {}, "phi-4-mini": {},
    "olmo-2-1b": {}, "olmo-3-7b": {}, "glm-4-9b": {}, "smollm3-3b": {}, "granite-3.3-8b": {}, "gpt-oss-20b": {},
    "seed-oss-36b": {}, "ernie-4.5-0.3b": {}, "hunyuan-1.8b": {}, "exaone-4.0-32b": {}, "afm-4.5b": {},
    "ministral-3-3b": {}, "qwen3-8b sliding": {"use_sliding_window": True, "sliding_window": 8},
    "glm-4.5-air": {}, "qwen1.5-moe-a2.7b": {}, "olmoe-1b-7b": {},
    "glm-4.5-air groups": {
        "n_group": 6, "topk_group": 3, "routed_scaling_factor": 2.5, "use_qk_norm": True, "n_shared_experts": 2,
        "attention_bias": False,
    },
}
# Other sizes and options of the same families.
MORE = {
    "llama-3.2-1b": {}, "mistral-7b-v0.3": {}, "mistral-large-123b": {}, "qwen2.5-7b": {}, "qwen3-0.6b": {},
    "gemma-3-4b": {}, "gemma-3-27b": {}, "phi-4": {}, "phi-3-mini-4k": {}, "olmo-3-32b": {}, "glm-4-32b": {},
    "ministral-3-8b": {},
    "qwen2.5-7b sliding": {"use_sliding_window": True, "sliding_window": 8},
    "llama-3.1-8b biases": {"attention_bias": True, "mlp_bias": True},
    "llama-2-7b linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen3-30b-a3b mixed": {"mlp_only_layers": [1], "norm_topk_prob": False},
    "mixtral-8x7b sliding": {"sliding_window": 8},
    "qwen1.5-moe-a2.7b mixed": {"mlp_only_layers": [0], "norm_topk_prob": True, "qkv_bias": False},
    "qwen1.5-moe-a2.7b sparse": {"decoder_sparse_step": 2},
    "olmoe-1b-7b biases": {"attention_bias": True, "norm_topk_prob": True, "num_key_value_heads": 2},
    "smollm3-3b sliding": {"use_sliding_window": True, "sliding_window": 8, "layer_types": None},
    "exaone-4.0-1.2b": {}, "exaone-4.0-32b pattern": {"layer_types": None, "sliding_window_pattern": 2},
    "afm-4.5b biases": {"attention_bias": True, "mlp_bias": True, "rope_scaling": None},
    "hunyuan-1.8b plain": {"rope_scaling": None, "attention_bias": True, "tie_word_embeddings": False},
    "seed-oss-36b biases": {"attention_out_bias": True, "mlp_bias": True}, "ernie-4.5-0.3b biases": {"use_bias": True},
}
LENGTH = 40


@pytest.fixture(scope="module", params=[*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)])
def pair(request, tmp_path_factory):
    """(our model, transformers' model, folder) of one published config."""
    folder = tmp_path_factory.mktemp("model")
    config = shrunk(request.param.split()[0], **(CASES | MORE)[request.param])
    theirs = reference(config)
    theirs.save_pretrained(folder)
    # Read the published dialect of config.json, not the one transformers writes.
    (folder / "config.json").write_text(json.dumps(config))
    return models.from_pretrained(folder), theirs, folder


def ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 160, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def test_logits(pair):
    ours, theirs, _ = pair
    with torch.no_grad():
        assert relative(ours.logits(ids()), theirs(ids()).logits) <= 1e-5


def test_transformers_own_dialect_reads_the_same(pair, tmp_path):
    ours, theirs, _ = pair
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(models.from_pretrained(tmp_path).logits(ids()), ours.logits(ids()))


def test_loss_and_gradients(pair):
    ours, theirs, _ = pair
    x = ids()
    labels = F.pad(x[:, 1:], (0, 1), value=-100)
    loss = F.cross_entropy(theirs(x).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()
    arange = torch.arange(LENGTH)
    rows = [[(row.numpy(), target.numpy())] for row, target in zip(x, labels, strict=True)]
    batch = from_documents(rows, LENGTH, pad_id=0, max_documents=1)
    assert torch.equal(batch.position_ids[0], arange)
    mine = next_token_loss(ours(batch), ours.lm_head.weight, batch.labels, **ours.logit_terms) / batch.target_tokens
    mine.backward()
    assert relative(mine, loss) <= 1e-5
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    as_hf = keys.to_hf(gradients, ours.table)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    # In memory transformers stacks experts, and names them, as we do; only gate and up have a dimension here.
    as_hf |= gradients | {name.removesuffix(".weight"): g for name, g in gradients.items() if ".experts." in name}
    assert expected.keys() <= as_hf.keys()
    assert sum(g.numel() for g in gradients.values()) == sum(g.numel() for g in expected.values())
    worst = max((relative(as_hf[name].view_as(expected[name]), expected[name]), name) for name in expected)
    ours.zero_grad(), theirs.zero_grad()
    assert worst[0] <= 1e-5, worst


def test_round_trip_is_bit_equal(pair, tmp_path):
    ours, _, folder = pair
    stored = load_file(folder / "model.safetensors")
    names = [name for name in base_state(ours) if name != "lm_head.weight" or not ours.arch.tied]
    state = keys.from_hf(stored, names, ours.table)
    back = keys.to_hf(state, ours.table)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[key], stored[key]) for key in stored)
    models.save_pretrained(ours, tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[key], stored[key]) for key in stored)


def test_sharded_export_loads_in_transformers(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    ours, theirs, _ = pair
    models.save_pretrained(ours, tmp_path, shard_bytes=60_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    again.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, theirs(ids()).logits)
        assert torch.equal(models.from_pretrained(tmp_path).logits(ids()), ours.logits(ids()))


def test_packed_documents_equal_documents_alone(pair):
    ours, _, _ = pair
    x = ids(4).numpy()
    lengths = (40, 9, 17, 25)
    documents = []
    for row, n in zip(x, lengths, strict=True):
        targets = F.pad(torch.from_numpy(row[:n])[1:], (0, 1), value=-100).numpy()
        documents.append((row[:n], targets))

    def run(rows, seq_len):
        ours.zero_grad()
        batch = from_documents(rows, seq_len, pad_id=0, max_documents=4)
        hidden = ours(batch)
        next_token_loss(hidden, ours.lm_head.weight, batch.labels, **ours.logit_terms).backward()
        return hidden.detach(), {n: p.grad.clone() for n, p in ours.named_parameters()}

    packed, packed_gradients = run([documents[:2], documents[2:]], 64)
    at = [(0, 0), (0, 40), (1, 0), (1, 17)]
    total: dict[str, torch.Tensor] = {}
    for (row, start), document in zip(at, documents, strict=True):
        n = len(document[0])
        alone, gradients = run([[document]], n)
        assert relative(packed[row, start : start + n], alone[0]) <= 1e-5
        total = {name: g + total.get(name, 0) for name, g in gradients.items()}
    assert max(relative(packed_gradients[name], g) for name, g in total.items()) <= 1e-5


def test_reference_and_sdpa_attention_agree(pair):
    ours, _, _ = pair
    documents = [[(row[:n].numpy(), row[:n].numpy()) for row, n in zip(ids(2), (30, 20), strict=True)]]
    out = {}
    for backend in ("sdpa", "reference"):
        ours.model.use_attention(backend)
        with torch.no_grad():
            out[backend] = ours(from_documents(documents, 64, pad_id=0, max_documents=2))[:, :50]
    ours.model.use_attention("sdpa")
    assert relative(out["sdpa"], out["reference"]) <= 1e-5


def test_generation_equals_transformers_greedy(pair):
    from ftlib.generation import Engine, ReferenceEngine, SamplingParams

    ours, theirs, _ = pair
    prompts = [ids(3)[i, : 5 + 7 * i].tolist() for i in range(3)]
    params = SamplingParams(max_new_tokens=30, temperature=0)
    plain, paged = (engine.generate(prompts, params) for engine in (ReferenceEngine(ours), Engine(ours, max_batch=2)))
    for prompt, (completion,), (other,) in zip(prompts, plain, paged, strict=True):
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0,
                # Its Phi-3 drops the cache past original_max_position_embeddings and goes on with one token.
                use_cache=theirs.config.model_type != "phi3",
            )[0, len(prompt) :]
        assert completion.token_ids == other.token_ids == expected.tolist()


class Rows:
    """A loader of random rows: its position is one number."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        x = torch.randint(3, 160, (2, LENGTH), generator=torch.Generator().manual_seed(self.position))
        return from_documents([[(row.numpy(), row.numpy())] for row in x], LENGTH, pad_id=0, max_documents=1)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_resume_equals_never_having_stopped(pair, tmp_path):
    """Every weight trains, then a new process's model goes on from the files: the same bits."""
    run = processes.start(Parallel(), seed=0)

    def fresh():
        model = models.from_pretrained(pair[2]).train()
        state = State(model, optim.build(model, Optim(lr=1e-2)), Rows())
        return state, Saver(Checkpoint(), tmp_path, run, {}, say=lambda text: None)

    def step(state):
        batch, model = next(state.loader), state.model
        loss = next_token_loss(model(batch), model.lm_head.weight, batch.labels, **model.logit_terms)
        (loss / batch.target_tokens).backward()
        optim.step(state.optimizer, 1.0)
        return loss.item()

    through, saver = fresh()
    first = step(through)
    saver.save(1, through)
    expected = step(through)
    again, saver = fresh()
    assert saver.resume(again) == 1 and step(again) == expected != first
    for ours, theirs in zip(again.model.state_dict().values(), through.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_lora_files_and_merge(pair, tmp_path):
    """The cheap part of this runs in test_lora.py and test_lora_fused.py."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from ftlib.adapters import lora, merge, peft_format

    _, _, folder = pair
    ours = models.from_pretrained(folder)
    lora.attach(ours, "all-linear", rank=2, alpha=5.0)
    lora.reset(ours, 0)
    with torch.no_grad():
        for _, _, factors in lora.adapted(ours):
            factors.lora_B.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    peft_format.save(ours, tmp_path, base=str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    base.set_experts_implementation("eager")
    with torch.no_grad():
        adapted = ours.logits(ids())
        assert relative(adapted, PeftModel.from_pretrained(base, tmp_path)(ids()).logits) <= 1e-5
        merge.merge_into(ours)
        assert relative(ours.logits(ids()), adapted) <= 1e-5


def test_unknown_tensors_are_refused(pair, tmp_path):
    from ftlib.errors import UserError

    _, _, folder = pair
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, "model.layers.0.mystery.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="mystery"):
        models.from_pretrained(tmp_path)
