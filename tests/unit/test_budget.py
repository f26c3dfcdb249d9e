"""The setting that `memory.budget_gib` finds: which, from what was measured, and the same again when a run goes on."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch._functorch.config
from parity.shrink import published, shrunk

from ftlib import budget
from ftlib.adapters import lora
from ftlib.cli import main as tune
from ftlib.errors import UserError
from ftlib.layers.batch import Batch as Rows
from ftlib.layers.batch import Layout
from ftlib.models import load, mtp
from ftlib.models.initial import init_weights
from ftlib.parallel import run as processes
from ftlib.quant import qat
from ftlib.sections import Batch, Data, Loss, Memory, Mtp, Parallel, Qat, Sizes, Source

NAMES = ("none", "selective", "except_attention", "parked", "full", "tiles")


def name(memory):
    parked = memory.offload and memory.recompute == "except_attention"
    return "tiles" if memory.tiled_mlp else "parked" if parked else memory.recompute


@pytest.fixture(scope="module")
def rungs(tmp_path_factory):
    """Llama-3.1-8B with adapters, one row of 32k tokens."""
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(published("llama-3.1-8b")))
    model = load.build(folder, torch.bfloat16)
    lora.attach(model, "all-linear", rank=16)
    data = Data(sources=(Source(path="x"),), seq_len=32_768)
    cfg = SimpleNamespace(dtype="bf16", data=data, batch=Batch(), memory=Memory(budget_gib=24.0))
    return budget.ladder(model, cfg)


def test_the_ladder_goes_from_fast_to_lean(rungs):
    assert tuple(name(rung.memory) for rung in rungs) == NAMES
    estimates = [rung.estimate for rung in rungs]
    assert estimates == sorted(estimates, reverse=True)
    assert all(rung.memory.budget_gib is None for rung in rungs)


TRUE = (100, 80, 50, 40, 30, 20)  # GiB of each rung


@pytest.mark.parametrize(
    ("guess", "allowed", "found", "tried"),
    [
        (TRUE, 45, "parked", "parked"),  # the estimate is right: one measured step
        (TRUE, 200, "none", "none"),
        (TRUE, 20, "tiles", "tiles"),
        ((60, 50, 40, 30, 20, 10), 45, "parked", "except_attention parked"),  # too low: down
        ((60, 50, 40, 30, 20, 10), 35, "full", "parked full"),
        ((200, 180, 150, 140, 130, 120), 85, "selective", "tiles full parked except_attention selective"),  # up
        ((101, 79, 79, 40, 30, 20), 79, "except_attention", "selective except_attention"),  # as estimated, but tight
        ((90, 53, 51, 49, 30, 20), 51, "except_attention", "except_attention"),  # above is hopeless
    ],
)
def test_the_fastest_that_fits(rungs, guess, allowed, found, tried):
    settings = [budget.Rung(rung.memory, size) for rung, size in zip(rungs, guess, strict=True)]
    seen = []

    def measure(memory):
        seen.append(name(memory))
        return TRUE[NAMES.index(name(memory))]

    at, peak = budget.choose(settings, measure, allowed)
    assert (name(rungs[at].memory), peak) == (found, TRUE[at])
    assert seen == tried.split()


def test_out_of_memory_counts_as_too_much_and_the_end_of_the_ladder_is_said(rungs):
    settings = [budget.Rung(rung.memory, 1) for rung in rungs]
    at, _ = budget.choose(settings, lambda m: None if name(m) != "full" else 3, 10)
    assert name(rungs[at].memory) == "full"
    with pytest.raises(UserError, match=r"leanest setting takes more than there is(.|\n)*where: memory\.budget_gib"):
        budget.choose(settings, lambda m: None, 10)
    with pytest.raises(UserError, match=r"leanest setting takes 3\.0 GiB"):
        budget.choose(settings, lambda m: 3 << 30, 1 << 30)


GIB = 1 << 30
OPTIONS = ["eval.exact_match=0", "data.eval=2", "batch.rows=4", "batch.micro_rows=2", "data.seq_len=128",
           "memory.recompute=full", "checkpoint.every=2", "schedule.name=constant"]  # fmt: skip


def test_a_run_that_goes_on_repeats_what_was_found(tmp_path, monkeypatch, capsys):
    def train(folder, steps, *more):
        recipe = ["recipes/lora_sft.py", "--config", "configs/demo_lora.yaml", f"output_dir={tmp_path / folder}"]
        assert tune(["run", *recipe, *OPTIONS, f"steps={steps}", *more]) == 0
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    def fake(model, cfg, device):
        seen.append([block.recompute for block in model.model.layers])
        return 4 * GIB if all(seen[-1]) else 7 * GIB if any(seen[-1]) else 9 * GIB

    def built(model):
        trained.append([block.recompute for block in model.model.layers])
        return noted(model)

    seen, trained, noted = [], [], budget.note
    monkeypatch.setattr(budget, "note", built)
    monkeypatch.setattr(budget, "LEAST", 1.0)  # all blocks alike
    monkeypatch.setattr(budget, "check", lambda cfg, world: None)
    monkeypatch.setattr(budget, "trial", fake)
    monkeypatch.setattr(budget, "states", lambda model, cfg: 2 * GIB)
    monkeypatch.setattr(budget, "room", lambda asked, device: 10 * GIB)
    asked = ["memory.budget_gib=auto"]
    assert train("a", 2, *asked) == train("b", 2)
    said = capsys.readouterr().out
    assert "memory: recompute selective: measured 9.0 GiB of 10.0 GiB" in said
    layers = len(seen[0])
    assert len(seen) == 2, "states of the optimizer count"
    measured = len(seen)
    again = train("a", 4, *asked)
    assert len(seen) == measured, "a run that goes on measures nothing"
    assert "recompute selective: measured 9.0 GiB of 10.0 GiB, as before" in capsys.readouterr().out
    alternating = [i % 2 == 0 for i in range(layers)]
    assert trained == [alternating, [True] * layers, alternating], "b asked for no budget"
    train("a", 6, *asked, "optim.eps=1e-7")
    assert len(seen) == 2 * measured, "another question"
    # From the second up to the first, which does not fit after all, and back.
    sizes = {"none": 41 * GIB // 4, "selective": 19 * GIB // 2}
    rungs = [budget.Rung(Memory(recompute=name), size) for name, size in sizes.items()]
    monkeypatch.setattr(budget, "ladder", lambda model, cfg: rungs)
    assert again == train("c", 4, *asked)
    assert seen[-2:] == [alternating, [False] * layers] and trained[-1] == alternating


def test_a_trial_takes_what_the_run_will(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(shrunk("qwen3-0.6b")))
    model, on = load.build(tmp_path, torch.float32), []
    qat.attach(model, Qat(group=32, after=5), "qat")
    mtp.attach(model, Mtp(depth=2))
    model.to_empty(device="cpu")
    model.tie()
    init_weights(model, 0)
    mtp.fill(model, None, 0)
    model.model.use_attention("reference")
    layer = qat.rounded(model)[0]
    layer.register_forward_hook(lambda *_: on.append(layer.on))
    ids = torch.randint(100, (1, 16))
    layout = Layout.packed(torch.tensor([0, 8, 16], dtype=torch.int32), 16, (1, 16))
    budget.learn(model, Rows(ids, ids, torch.arange(16)[None], layout, 16), Loss())
    assert on == [True] and not layer.on, "rounding begins later, and takes memory then"
    assert all(p.grad is not None for p in model.mtp.parameters())


def test_another_question_and_a_damaged_answer_are_measured(tmp_path):
    cfg = SimpleNamespace(batch=Batch(), data=Data(sources=(Source(path="x"),)), mtp=Mtp(), qat=None, sizes=Sizes())
    asked = budget.question(cfg, torch.device("cpu"))
    for change in ({"mtp": Mtp(depth=1)}, {"qat": Qat()}, {"sizes": Sizes(layers=3)}):
        assert budget.question(SimpleNamespace(**vars(cfg) | change), torch.device("cpu")) != asked
    assert budget._found(tmp_path / "memory.json")["asked"] is None
    (tmp_path / "memory.json").write_text('{"asked": {"model": "a')
    assert budget._found(tmp_path / "memory.json")["asked"] is None


@torch._functorch.config.patch(activation_memory_budget=1.0, aggressive_recomputation=False)  # undone afterwards
def test_a_setting_can_be_put_in_place_of_another(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published("qwen3-0.6b") | {"num_hidden_layers": 2}))
    model, cpu = load.build(tmp_path, torch.float32), torch.device("cpu")
    for memory in (Memory(recompute="none", tiled_mlp=16), Memory(recompute="full"), Memory(recompute="selective")):
        budget.put(model, memory, cpu)
        assert [block.mlp.tile for block in model.model.layers] == [memory.tiled_mlp] * 2
        assert [block.recompute for block in model.model.layers] == {
            "none": [False, False], "full": [True, True], "selective": [True, False],
        }[memory.recompute]  # fmt: skip
        assert "compute" not in vars(model.model.layers[0])
    budget.put(model, Memory(compile=True), cpu)
    assert "compute" in vars(model.model.layers[0])


def test_where_it_cannot_work_it_is_refused():
    cfg = SimpleNamespace(memory=Memory(budget_gib="auto"), loss=Loss())
    with pytest.raises(UserError) as caught:
        budget.check(SimpleNamespace(memory=cfg.memory), 2)
    words = str(caught.value)
    assert "several" in words and "next-token" in words and words.count("memory.budget_gib") >= 2
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="measured on a GPU"):
            budget.check(cfg, 1)
    budget.check(SimpleNamespace(memory=Memory()), 8)
    for wrong in ({"offload": True}, {"tiled_mlp": 64}):
        with pytest.raises(ValueError, match="budget_gib"):
            Memory(budget_gib=8.0, **wrong)
    assert processes.start(Parallel(), 0).world == 1
