"""Every mode of low precision, layer by layer: how many it converts, that it says so, and that none computes as before.

A layer that a mode leaves out, or that computes with its plain weight, gives the very loss that the plain layer gives.

Faults that were planted and seen: a mode that leaves one layer out, or all stacks; layers of 32 outputs that compute
with their plain weight; rounding that is off, or off below an adapter, or of weights alone; fp8 products with inputs as
they are.
"""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_model import ROOT, write_config, write_model, write_rows

from ftlib import build, config, plugins, quant
from ftlib.adapters import lora
from ftlib.layers.linear import Linear
from ftlib.layers.moe import ExpertLinear
from ftlib.parallel import run as processes

# There siblings share one product, and no layer can be taken out of it.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
NAMES = {"dense": "qwen2.5-7b", "experts": "qwen3-30b-a3b"}  # biases; stacks
SIZES = {"num_hidden_layers": 2, "intermediate_size": 128}
SMALL, STACKS = ("k_proj", "v_proj"), ("gate_up_proj", "down_proj")  # 64 x 32; what is not multiplied in fp8
TENSORWISE, ROWWISE = (("model.fp8=" + mode, "model.fp8_smallest=16") for mode in ("tensorwise", "rowwise"))
# Of 14 linear layers, of 8 and 4 stacks of experts: which the mode leaves out, and what `note` says of the others.
MODES = [
    ("lora", "dense", ("model.quantize=nf4",), (), {"base": 14}),
    ("lora", "dense", ("model.quantize=int8",), (), {"base": 14}),
    ("lora", "dense", ("model.quantize=fp8",), (), {"base": 14}),
    ("lora", "experts", ("model.quantize=nf4",), (), {"base": 12}),
    ("lora", "experts", ("model.quantize=int8",), (), {"base": 12}),
    ("lora", "experts", ("model.quantize=fp8",), (), {"base": 12}),
    ("lora", "dense", TENSORWISE, (), {"base": 14, "fp8": 14}),
    ("lora", "dense", ROWWISE, (), {"base": 14, "fp8": 14}),
    ("lora", "dense", ("model.fp8=rowwise", "model.fp8_smallest=64"), SMALL, {"base": 10, "fp8": 10}),
    ("lora", "experts", TENSORWISE, STACKS, {"base": 8, "fp8": 8}),
    ("full", "dense", TENSORWISE, (), {"fp8": 14}),
    ("full", "dense", ROWWISE, (), {"fp8": 14}),
    ("full", "dense", ("model.fp8=tensorwise", "model.fp8_smallest=64"), SMALL, {"fp8": 10}),
    ("full", "experts", ROWWISE, STACKS, {"fp8": 8}),
    ("lora", "dense", ("model.quantize=fp8", *TENSORWISE), (), {"base": 14, "fp8": 14}),
    ("lora", "dense", ("model.quantize=fp8", "model.fp8=tensorwise", "model.fp8_smallest=64"), (),
     {"base": 14, "fp8": 10}),
    ("lora", "experts", ("model.quantize=fp8", *ROWWISE), (), {"base": 12, "fp8": 8}),
    *(
        (recipe, "dense", (f"qat.scheme={scheme}",), (), {"rounding": 14})
        for recipe in ("lora", "full") for scheme in ("int4", "int8_int4", "fp8")
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A function: recipe, model and words -> the model as that recipe begins its first step, adapters not zero."""
    folder, files, plain = tmp_path_factory.mktemp("models"), {}, {}
    rows = write_rows(folder / "rows.jsonl", 8)

    def make(recipe, name, *words):
        if name not in files:
            more = {"head_dim": 16, "moe_intermediate_size": 64} if name == "experts" else {}
            model = write_model(folder / name, NAMES[name], **SIZES, **more)
            files[name] = write_config(folder / f"{name}.json", model, rows)
        module = plugins.load_file(ROOT / "recipes" / f"{recipe}_sft.py")
        cfg = config.load(module.Config, ["--config", str(files[name]), *words])
        build.check(cfg)
        model = build.model(cfg, processes.start(cfg.parallel, cfg.seed))
        for _, _, factors in lora.adapted(model):
            torch.nn.init.normal_(factors.lora_B, 0, 0.1, torch.Generator().manual_seed(3))
        quant.at(1, model)
        return model

    def found(recipe, name, *words):
        if (recipe, name) not in plain:
            plain[recipe, name] = make(recipe, name)
        return plain[recipe, name], make(recipe, name, *words), folder / name

    return found


@torch.no_grad()
def loss(model):
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))
    return F.cross_entropy(model.logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def put(model, name, layer):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def original(plain, layer):
    """A copy of `plain` with the adapters of the layer in whose place it is put."""
    made = copy.deepcopy(plain)
    if hasattr(layer, "adapters"):
        made.adapters, made.active = layer.adapters, layer.active
    return made


def alike(model, others):
    """Names of those layers in whose place, one at a time, another gives the same loss to the bit."""
    before, found = loss(model), []
    for name, other in others.items():
        layer = model.get_submodule(name)
        put(model, name, other)
        found += [name] * (loss(model) == before)
        put(model, name, layer)
    return found


@pytest.mark.parametrize(
    ("recipe", "name", "words", "left", "says"), MODES, ids=[" ".join((*mode[:2], *mode[2])) for mode in MODES]
)
def test_each_plain_layer_put_back_gives_another_loss(recipe, name, words, left, says, built):
    plain, model, folder = built(recipe, name, *words)
    inside = {n: m for n, m in plain.named_modules() if n.startswith("model.layers.")}
    layers = {n: m for n, m in inside.items() if type(m) in (Linear, ExpertLinear)}
    assert len(layers) == (14 if name == "dense" else 12)
    converted = {n: model.get_submodule(n) for n in layers if n.rpartition(".")[2] not in left}
    assert len(converted) == max(says.values())
    for n in layers:
        assert (type(model.get_submodule(n)) in (Linear, ExpertLinear)) == (n not in converted), n
    told = re.findall(r"^(base|fp8|rounding): (?:products of )?(\d+) ", "\n".join(quant.note(model)), re.M)
    assert {what: int(count) for what, count in told} == says

    stored, before = load_file(folder / "model.safetensors"), loss(model)
    originals = {n: original(layers[n], layer) for n, layer in converted.items()}
    for n, layer in converted.items():
        assert name != "dense" or torch.equal(originals[n].weight, stored[f"{n}.weight"])
        assert recipe != "full" or torch.equal(originals[n].weight, layer.weight), "what trains is not rounded"
    assert not alike(model, originals), "these compute as plain layers do"
    assert loss(model) == before
    for n, layer in originals.items():
        put(model, n, layer)
    assert loss(model) == loss(plain) and not quant.note(model)


@pytest.mark.parametrize(
    ("recipe", "words", "other"),
    [
        ("lora", TENSORWISE, ("model.quantize=fp8",)), ("lora", ROWWISE, ("model.quantize=fp8",)),
        ("lora", ROWWISE, TENSORWISE), ("full", ROWWISE, TENSORWISE),
        ("lora", ("qat.scheme=int8_int4",), ("qat.scheme=int4",)),
        ("lora", ("qat.scheme=fp8",), ("model.quantize=fp8",)),
    ],
    ids=str,
)  # fmt: skip
def test_modes_of_the_same_codes_are_not_one_another(recipe, words, other, built):
    """Products in 8 bits and rounded inputs, in every layer."""
    _, model, _ = built(recipe, "dense", *words)
    _, another, _ = built(recipe, "dense", *other)
    names = [n for n, m in model.named_modules() if n.startswith("model.layers.") and isinstance(m, Linear)]
    assert len(names) == 14
    assert not alike(model, {n: original(another.get_submodule(n), model.get_submodule(n)) for n in names})
