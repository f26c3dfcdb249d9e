"""The engine against the plain one, against the trainer's log-probabilities, and against itself in other company."""

import dataclasses
import os
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from parity.shrink import shrunk

from ftlib.adapters import lora
from ftlib.errors import UserError
from ftlib.generation import Engine, ReferenceEngine, SamplingParams, process, steps
from ftlib.generation.pages import PAGE, Pool, PromptLayout
from ftlib.generation.remote import RemoteEngine
from ftlib.generation.requests import Request
from ftlib.generation.rows import Rows
from ftlib.layers.batch import Batch
from ftlib.models import LanguageModel, families

PROMPTS = [[3 + (7 * i + 5 * j) % 150 for j in range(length)] for i, length in enumerate((1, 16, 33, 5, 20))]


def tiny(name="qwen3-0.6b", **changes):
    """A small model whose answers vary: weights ten times as wide as fresh ones."""
    config = shrunk(name, **changes)
    arch, table = families.read(config)
    model = LanguageModel(arch, table, config)
    model.model.init_weights(0, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


def tokens(completions):
    return [[c.token_ids for c in group] for group in completions]


def flat(completions):
    return [completion for group in completions for completion in group]


@torch.no_grad()
def trainer_logprobs(model, prompt, completion, temperature):
    """As a trainer computes them: one forward over prompt and completion."""
    ids = torch.tensor([prompt + completion])
    scores = (model.logits(ids)[0, len(prompt) - 1 : -1].float() / temperature).log_softmax(-1)
    return scores.gather(1, ids[0, len(prompt) :, None])[:, 0]


def test_samples_equal_the_plain_engine_in_a_crowded_batch(model):
    params = SamplingParams(40, temperature=0.9, seed=3, stop_ids=frozenset(range(4)))
    expected = ReferenceEngine(model).generate(PROMPTS, params, n=3)
    engine = Engine(model, max_batch=4)
    found = engine.generate(PROMPTS, params, n=3)
    assert tokens(found) == tokens(expected)
    for mine, theirs in zip(flat(found), flat(expected), strict=True):
        assert mine.finish_reason == theirs.finish_reason
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    assert {c.finish_reason for c in flat(found)} == {"stop", "length"}
    assert len(engine.pool.free) == engine.pool.pages


@pytest.mark.parametrize("temperature", [0, 0.6, 1.0, 1.3])
@pytest.mark.parametrize("limits", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.05}])
def test_logprobs_are_the_trainers(model, temperature, limits):
    params = SamplingParams(24, temperature=temperature, seed=1, **limits)
    for prompt, group in zip(PROMPTS, Engine(model).generate(PROMPTS, params, n=2), strict=True):
        for done in group:
            exact = trainer_logprobs(model, prompt, done.token_ids, temperature or 1.0)
            assert (torch.tensor(done.logprobs) - exact).abs().max() < 1e-4


def test_draws_do_not_depend_on_company(model):
    params = SamplingParams(30, seed=7)
    together = tokens(Engine(model).generate(PROMPTS, params, n=2))
    engine = Engine(model, max_batch=3)
    for i, prompt in reversed(list(enumerate(PROMPTS))):
        alone = engine.submit(prompt, params, 2, first=2 * i)
        engine.submit(PROMPTS[0], dataclasses.replace(params, seed=8, temperature=0.5, top_k=3), 2)
        while engine.waiting or engine.live:
            engine.step()
        assert [request.token_ids for request in alone] == together[i]
    assert together[0][0] != together[0][1]


def test_a_group_shares_its_prompt(model):
    forwards = []
    hook = model.register_forward_pre_hook(lambda _, args: forwards.append(tuple(args[0].input_ids.shape)))
    prompt, n = PROMPTS[2], 8
    engine, params = Engine(model, max_batch=n), SamplingParams(4)
    requests = engine.submit(prompt, params, n)
    engine.step()
    shared, used = len(prompt) // PAGE, engine.pool.pages - len(engine.pool.free)
    assert used == shared + n and all(request.pages[:shared] == requests[0].pages[:shared] for request in requests)
    while engine.live:
        engine.step()
    hook.remove()
    assert [shape for shape in forwards if shape[1] > 1] == [(1, len(prompt))]
    repeated = Engine(model).generate([prompt] * n, params)
    assert [request.token_ids for request in requests] == [group[0].token_ids for group in repeated]


@pytest.mark.parametrize("n", [1, 4])
def test_requests_that_find_no_room_are_put_off_and_come_to_the_same(model, n):
    params = SamplingParams(70, seed=2)
    roomy = Engine(model).generate(PROMPTS, params, n=n)
    engine = Engine(model, max_tokens=9 * PAGE)
    assert tokens(engine.generate(PROMPTS, params, n=n)) == tokens(roomy)
    assert engine.preempted > 0 and len(engine.pool.free) == 9


def test_a_longer_request_that_comes_later_waits_for_a_larger_pool(model):
    engine, short, long = Engine(model), SamplingParams(6, logprobs=False), SamplingParams(60, seed=1)
    first = engine.submit(PROMPTS[0], short)[0]
    engine.step()
    second = engine.submit(PROMPTS[2], long)[0]
    while engine.busy:
        engine.step()
    assert len(first.token_ids) == 6 and first.logprobs == []
    assert [[second.token_ids]] == tokens(Engine(model).generate([PROMPTS[2]], long))
    assert engine.pool.pages == len(engine.pool.free) >= 7


def test_what_cannot_fit_is_refused(model):
    with pytest.raises(UserError, match="do not fit 64 tokens"):
        Engine(model, max_tokens=64).generate([[5] * 40], SamplingParams(20))
    with pytest.raises(UserError, match="empty prompt"):
        Engine(model).generate([[]], SamplingParams(20))
    with pytest.raises(UserError, match="top_p: above 0"):
        SamplingParams(20, top_p=0.0)


def test_an_interrupted_call_leaves_nothing_behind(model):
    engine, params = Engine(model), SamplingParams(20)

    def stop(number, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, params, on_token=stop)
    assert not engine.waiting and not engine.live
    heard = []
    done = engine.generate(PROMPTS, params, n=2, on_token=lambda number, token: heard.append((number, token)))
    assert [token for number, token in heard if number == 3] == done[1][1].token_ids
    request = engine.submit(PROMPTS[0], params)[0]
    engine.step()
    engine.abort(request)
    assert len(engine.pool.free) == engine.pool.pages
    engine.release()
    assert engine.pool is None


@pytest.mark.parametrize("adapter", ["live", "merged"])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "gpt-oss-20b"])
def test_new_adapter_weights_are_used_and_the_base_never_changes(adapter, name):
    model = tiny(name)
    lora.attach(model, "all-linear", rank=2)
    lora.reset(model, 0)
    before = {name: p.clone() for name, p in model.named_parameters() if ".adapters." not in name}
    engine, params = Engine(model, adapter=adapter), SamplingParams(20, temperature=0)
    first = engine.generate(PROMPTS, params)
    for seed in range(3):
        with torch.no_grad():
            for _, _, factors in lora.adapted(model):
                factors.lora_B.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        engine.refresh()
        changed = engine.generate(PROMPTS, params)
        assert tokens(changed) != tokens(first)
        assert tokens(changed) == tokens(ReferenceEngine(model).generate(PROMPTS, params))
    with lora.use(model, None):
        assert (tokens(engine.generate(PROMPTS, params)) == tokens(first)) == (adapter == "live")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert not model.training


def test_a_model_in_training_draws_without_dropout_and_goes_on_training():
    model = tiny()
    lora.attach(model, "all-linear", rank=2, dropout=0.5)  # new modules are in training mode, the model is not
    lora.reset(model, 0)
    with torch.no_grad():
        for _, _, factors in lora.adapted(model):
            factors.lora_B.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    params, modes = SamplingParams(8, temperature=0), [module.training for module in model.modules()]
    mixed = Engine(model).generate(PROMPTS, params)
    assert [module.training for module in model.modules()] == modes and not all(modes)
    model.train()
    training = Engine(model).generate(PROMPTS, params)
    assert all(module.training for module in model.modules())
    assert tokens(mixed) == tokens(training) == tokens(Engine(model.eval()).generate(PROMPTS, params))


def test_an_engine_in_another_process_draws_with_the_weights_it_was_handed(monkeypatch):
    model = tiny("llama-3.2-1b")
    lora.attach(model, "all-linear", rank=2)
    lora.reset(model, 0)
    engine, params = RemoteEngine(model, torch.device("cpu"), 8), SamplingParams(12, seed=3)
    try:
        engine.load()
        first = engine.generate(PROMPTS, params, n=2)
        assert tokens(first) == tokens(Engine(model).generate(PROMPTS, params, n=2))
        with torch.no_grad():
            for _, _, factors in lora.adapted(model):
                factors.lora_B.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # of a terminal, of a scheduler: to all
            os.kill(engine.worker.process.pid, number)
        assert tokens(engine.generate(PROMPTS, params, n=2)) == tokens(first)
        monkeypatch.setattr(process.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
        monkeypatch.setattr(process, "MEMORY", "/proc")  # nobody writes there
        engine.load()
        monkeypatch.undo()
        changed = engine.generate(PROMPTS, params, n=2)
        assert tokens(changed) == tokens(Engine(model).generate(PROMPTS, params, n=2)) != tokens(first)
        with pytest.raises(UserError, match="an empty prompt"):
            engine.generate([[]], params)
    finally:
        engine.close()


def test_many_updates_of_a_merged_copy_leave_the_base_as_it_was_and_do_not_drift():
    model = tiny("llama-3.2-1b")
    lora.attach(model, "all-linear", rank=2)
    lora.reset(model, 0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    engine, params = Engine(model, adapter="merged"), SamplingParams(12, temperature=0)
    first = engine.generate(PROMPTS, params)
    for _ in range(100):
        engine.refresh()
    assert tokens(engine.generate(PROMPTS, params)) == tokens(first)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_adapter_that_is_more_than_factors_is_not_merged():
    model = tiny()
    lora.attach(model, "all-linear", rank=2, modules_to_save=("embed_tokens",))
    with pytest.raises(UserError, match="low-rank factors on plain weights"):
        Engine(model, adapter="merged")


def test_refreshing_while_requests_run(model):
    params = SamplingParams(30, seed=5)
    engine = Engine(model)
    requests = engine.submit(PROMPTS[1], params, 2)
    for _ in range(9):
        engine.step()
    engine.refresh()
    while engine.waiting or engine.live:
        engine.step()
    assert [[r.token_ids for r in requests]] == tokens(Engine(model).generate([PROMPTS[1]], params, n=2))


@pytest.mark.parametrize(
    "name",
    ["qwen3-0.6b", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma-2-2b", "smollm3-3b", "hunyuan-1.8b"))],
)
def test_the_compiled_step_is_the_plain_one_and_compiled_once(name, monkeypatch):
    """What a GPU captures, traced on the CPU: one code for all layers that are alike, whatever the number of rows."""
    model = tiny(name)
    lora.attach(model, "all-linear", rank=2)
    lora.reset(model, 0)
    block = torch.compile(steps.plain_block, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(steps, "compiled_block", lambda: block)
    pool, tokens = Pool(40), torch.arange(3, 3 + 5 * 20).view(5, 20)
    pages = [pool.take(3) for _ in tokens]
    layout = PromptLayout.of(pool, tokens.tolist(), pages, torch.device("cpu"))
    positions = torch.arange(20).expand(5, 20)
    params = SamplingParams(8, temperature=0)
    with torch.no_grad():
        model(Batch(tokens, tokens, positions, layout, target_tokens=0))
        for count, stance in ((5, "default"), (3, "default"), (4, "fail_on_recompile"), (2, "fail_on_recompile")):
            found = []
            for forward in (None, steps.compiled_body):
                made = (Request(tokens[i].tolist(), params, (0, 0), None, pages=pages[i]) for i in range(count))
                rows = Rows.of(list(made), 3)
                rows.ids.copy_(tokens[:count, -1])
                with torch.compiler.set_stance(stance):
                    found.append([rows.step(model, pool, forward) for _ in range(3)])
            for (token, logprob), (other, expected) in zip(*found, strict=True):
                assert token.tolist() == other.tolist() and torch.allclose(logprob, expected, atol=1e-5)


@torch.no_grad()
def test_blocks_of_two_kinds_are_compiled_for_every_shape(monkeypatch):
    """With and without a window, one row and several, narrow tables and wide ones: more versions of one function than
    torch allows by itself."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    steps.compiled_block.cache_clear()
    try:
        with torch._dynamo.config.patch(recompile_limit=8):
            model, pool, tokens = tiny("gemma-2-2b"), Pool(8), [[3], [4], [5], [6]]
            pages = [pool.take(1) for _ in tokens]
            layout = PromptLayout.of(pool, tokens, pages, torch.device("cpu"))
            model(Batch(torch.tensor(tokens), torch.tensor(tokens), torch.zeros(4, 1, dtype=torch.int64), layout))
            for width in (4, 7):
                for count in (3, 4, 1):
                    made = [Request(tokens[i], SamplingParams(2), (0, 0), None, pages=pages[i]) for i in range(count)]
                    found, expected = (
                        Rows.of(made, width).step(model, pool, forward)[1] for forward in (steps.compiled_body, None)
                    )
                    assert torch.allclose(found, expected, atol=1e-5)
    finally:
        steps.compiled_block.cache_clear()
