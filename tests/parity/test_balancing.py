"""The load-balancing loss of experts: transformers' loss and gradients; one meaning on any split; refusals."""

import json
from types import SimpleNamespace

import pytest
import torch
from parity.shrink import reference, relative, shrunk
from tiny_model import ROOT, losses, steps, train, tune, write_config, write_model, write_rows

from ftlib import config, models, plugins
from ftlib.cli import main as cli
from ftlib.errors import UserError
from ftlib.layers.batch import from_documents
from ftlib.losses.balancing import Balance, check, load_balancing_loss, note, with_targets
from ftlib.losses.language_modelling import next_token_loss
from ftlib.models import keys, load
from ftlib.parallel import recompute
from ftlib.sections import Loss, Memory, Parallel

NAMES = {"mixtral": "mixtral-8x7b", "qwen3_moe": "qwen3-30b-a3b", "gpt_oss": "gpt-oss-20b"}
NAMES |= {"qwen2_moe": "qwen1.5-moe-a2.7b", "olmoe": "olmoe-1b-7b"}
MIXED = {"mlp_only_layers": [1], "norm_topk_prob": False}  # a dense layer between
LENGTHS, ROOM = (24, 15), 24  # the second row is padded
RULE = Loss(router_aux=0.5)


def folder_of(name: str, where, **changes) -> tuple:
    """transformers' model with skewed routers, and a folder of its weights."""
    settings = shrunk(NAMES[name], output_router_logits=True, router_aux_loss_coef=0.5, **changes)
    theirs = reference(settings)
    theirs.save_pretrained(where)
    (where / "config.json").write_text(json.dumps(settings))
    return theirs, where


def ids() -> torch.Tensor:
    return torch.randint(3, 160, (2, ROOM), generator=torch.Generator().manual_seed(1))


def rows(of: slice = slice(None)):
    """The rows as one batch; only targets are what transformers shifts to."""
    documents = []
    for row, n in list(zip(ids(), LENGTHS, strict=True))[of]:
        documents.append([(row[:n].numpy(), torch.cat((row[1:n], torch.tensor([-100]))).numpy())])
    return from_documents(documents, ROOM, pad_id=0, max_documents=1)


def learn(model, batches, rule=RULE) -> tuple[float, float]:
    """One step over micro-batches, as a recipe makes it: its loss, and the column."""
    balance, targets, total = Balance(model, rule), sum(batch.target_tokens for batch in batches), 0.0
    model.zero_grad()
    for batch in batches:
        part = next_token_loss(model(batch), model.lm_head.weight, batch.labels, **model.logit_terms)
        part = (part + balance(batch)) / targets
        part.backward()
        total += part.item()
    one = SimpleNamespace(total=lambda x: x)
    return total, balance.column(one, SimpleNamespace(target_weight=targets)).get("router_aux")


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name,changes", [*((name, {}) for name in NAMES), ("qwen3_moe", MIXED), ("qwen2_moe", MIXED)])
def test_loss_and_gradients_are_transformers(name, changes, dtype, tmp_path):
    theirs, folder = folder_of(name, tmp_path, **changes)
    theirs = theirs.to(dtype)
    mask = torch.arange(ROOM) < torch.tensor(LENGTHS)[:, None]
    out = theirs(ids(), attention_mask=mask.long(), labels=ids().masked_fill(~mask, -100))
    out.loss.backward()
    ours = models.from_pretrained(folder, dtype=dtype).train()
    total, aux = learn(ours, [rows()])
    assert aux == pytest.approx(out.aux_loss.item(), rel=1e-6) and total == pytest.approx(out.loss.item(), rel=1e-6)
    plain = gradients(ours)
    as_hf = keys.to_hf(plain, ours.table)
    as_hf |= plain | {name.removesuffix(".weight"): g for name, g in plain.items() if ".experts." in name}
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    assert max(relative(as_hf[name].view_as(g), g) for name, g in wanted.items()) <= 1e-5
    learn(ours, [rows()], Loss())
    router = next(name for name in plain if name.endswith(("mlp.gate.weight", "mlp.router.weight")))
    assert relative(gradients(ours)[router], plain[router]) > 1e-2, "the loss is what made the difference"


def test_even_and_collapsed_routing_have_the_values_of_the_paper():
    kept = torch.ones(8, dtype=torch.bool)
    even = 9.0 * torch.eye(4).repeat(2, 1)
    assert load_balancing_loss([even, even], 1, kept).item() == pytest.approx(1.0)
    assert load_balancing_loss([even[:1].repeat(8, 1)], 1, kept).item() == pytest.approx(4.0, rel=1e-3)
    assert load_balancing_loss([even], 1, torch.zeros_like(kept)).item() == 0, "no token, no loss"


def test_packed_documents_count_and_padding_does_not():
    ids = torch.arange(3, 9).numpy()
    batch = from_documents([[(ids, ids), (ids[:2], ids[:2])], [(ids, ids)]], 10, pad_id=0, max_documents=2)
    assert with_targets(batch).tolist() == [True] * 8 + [False] * 2 + [True] * 6 + [False] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of("mixtral", tmp_path_factory.mktemp("model"))[1]


def test_micro_batches_are_averaged_by_their_targets(folder):
    model = models.from_pretrained(folder, dtype=torch.float64).train()
    first, second = rows(slice(0, 1)), rows(slice(1, 2))
    targets = [batch.target_tokens for batch in (first, second)]
    alone, grads = [], []
    for batch in (first, second):
        alone.append(learn(model, [batch]))
        grads.append(gradients(model))
    loss, aux = learn(model, [first, second])
    mean = [sum(n * pair[i] for n, pair in zip(targets, alone, strict=True)) / sum(targets) for i in (0, 1)]
    assert (loss, aux) == pytest.approx(tuple(mean), rel=1e-6)
    for name, grad in gradients(model).items():
        expected = sum(n * each[name] for n, each in zip(targets, grads, strict=True)) / sum(targets)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("memory", [
    Memory(recompute="full", compile=False), Memory(recompute="selective", compile=False),
    Memory(recompute="none", compile=True), Memory(recompute="full", compile=True),
    Memory(recompute="selective", compile=True),
], ids=lambda m: f"{m.recompute} {'compiled' if m.compile else 'eager'}")  # fmt: skip
def test_recomputed_and_compiled_blocks_give_the_same(folder, memory, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="aot_eager", **options))
    wanted = models.from_pretrained(folder).train()
    model = models.from_pretrained(folder).train()
    recompute.use(model, memory, torch.device("cpu"))
    for _ in range(2):
        assert learn(model, [rows()]) == pytest.approx(learn(wanted, [rows()]), rel=1e-6)
    expected = gradients(wanted)
    assert max(relative(grad, expected[name]) for name, grad in gradients(model).items()) <= 1e-5
    assert not model.model.routed, "nothing of the graph is held"
    with torch.no_grad():
        torch.testing.assert_close(model(rows()), wanted(rows()))
    assert not model.model.routed


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return write_model(folder / "model", "qwen3-30b-a3b"), write_rows(folder / "rows.jsonl", 24)


@pytest.mark.parametrize("recipe", ["full_sft", "lora_sft", "pretrain"])
def test_recipes_log_it_and_learn_it(recipe, experts, tmp_path):
    model, data = experts
    more = {"from_scratch": False} if recipe == "pretrain" else {}
    file = write_config(tmp_path / "c.yaml", model, data, steps=3, batch={"rows": 4, "micro_rows": 2}, **more)
    off = train(recipe, "--config", file, f"output_dir={tmp_path / 'off'}")
    on = train(recipe, "--config", file, f"output_dir={tmp_path / 'on'}", "loss.router_aux=0.1")
    assert all("router_aux" not in row for row in off) and all(row["router_aux"] > 0 for row in on if "loss" in row)
    assert steps(on)[0] == pytest.approx(steps(off)[0] + 0.1 * on[0]["router_aux"], rel=1e-6)
    assert steps(on)[2] != pytest.approx(steps(off)[2], rel=1e-6)


def test_a_run_says_what_the_checkpoint_asks_for(experts, tmp_path, capsys):
    model, data = experts
    settings = json.loads((model / "config.json").read_text())
    asked = SimpleNamespace(config=settings | {"output_router_logits": True, "router_aux_loss_coef": 0.02})
    assert "loss.router_aux=0.02" in note(asked, SimpleNamespace(loss=Loss()))[0]
    assert "loss.router_aux" not in note(asked, SimpleNamespace())[0], "a recipe without the key"
    assert not note(asked, SimpleNamespace(loss=RULE))
    assert not note(SimpleNamespace(config=settings), SimpleNamespace(loss=Loss()))
    (tmp_path / "model").mkdir()
    for file in model.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model" / "config.json").write_text(json.dumps(asked.config))
    train("full_sft", "--config", write_config(tmp_path / "c.yaml", tmp_path / "model", data, steps=1))
    assert capsys.readouterr().out.count("config.json asks for a loss that balances experts") == 1


def test_what_is_refused(folder, experts, tiny_dense, tmp_path):
    recipe = plugins.load_file(ROOT / "recipes" / "full_sft.py")
    dense = write_config(tmp_path / "dense.yaml", tiny_dense, experts[1])
    with pytest.raises(UserError, match=r"no experts to balance[\s\S]*loss.router_aux"):
        recipe.build.check(config.load(recipe.Config, ["--config", str(dense), "loss.router_aux=0.1"]))
    model = models.from_pretrained(folder)
    for mesh in (Parallel(tp=2), Parallel(cp=2)):
        with pytest.raises(UserError, match="processes share its tokens"):
            check(model, SimpleNamespace(loss=RULE, parallel=mesh, model=SimpleNamespace(code=None)))
    check(model, SimpleNamespace(loss=RULE, parallel=Parallel(dp_shard=2), model=SimpleNamespace(code=None)))
    (tmp_path / "config.json").write_text(json.dumps(shrunk("glm-4.5-air")))
    sigmoid, cfg = load.build(tmp_path, torch.float32), SimpleNamespace(loss=RULE, parallel=Parallel())
    with pytest.raises(UserError, match=r"e_score_correction_bias keeps experts even[\s\S]*loss.router_aux=0"):
        check(sigmoid, cfg)
    with pytest.raises(ValueError, match="must not be negative"):
        Loss(router_aux=-1)


@pytest.fixture(scope="module")
def tiny_dense(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("mesh", ["dp_shard", "dp_replicate"])
def test_two_processes_train_what_one_does(mesh, experts, tmp_path):
    """The same micro-batches, on whichever process. A large eps: gradients that are but rounding move little."""
    model, data = experts
    file = write_config(tmp_path / "c.yaml", model, data, steps=3, batch={"rows": 4, "micro_rows": 1})
    words = [ROOT / "recipes" / "full_sft.py", "--config", file, "loss.router_aux=0.1", "optim.eps=0.01"]
    one = train("full_sft", *map(str, words[1:]), f"output_dir={tmp_path / 'one'}")
    code, _, errors = tune("run", "--nproc-per-node", 2, *words, f"parallel.{mesh}=2", f"output_dir={tmp_path / 'two'}")
    assert code == 0, errors
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "router_aux", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-4), key


def test_a_family_of_one_s_own_is_balanced_as_the_library_s(experts, tmp_path):
    model, data = experts
    assert cli(["cp", "model:qwen3_moe", str(tmp_path / "mine.py")]) == 0
    file = write_config(tmp_path / "c.yaml", model, data, steps=2, loss={"router_aux": 0.1})
    code = f"model.code={tmp_path / 'mine.py'}:Decoder"
    theirs = train("full_sft", "--config", file, f"output_dir={tmp_path / 'a'}")
    mine = train("full_sft", "--config", file, f"output_dir={tmp_path / 'b'}", code)
    assert losses(mine) == losses(theirs)
    assert [row["router_aux"] for row in mine] == [row["router_aux"] for row in theirs]
    (tmp_path / "old.py").write_text((tmp_path / "mine.py").read_text().replace("    routes = False\n", ""))
    with pytest.raises(UserError, match=r"or model\.code hides them"):
        train("full_sft", "--config", file, f"model.code={tmp_path / 'old.py'}:Decoder")
