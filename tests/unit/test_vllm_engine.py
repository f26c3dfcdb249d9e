"""Rollouts by vLLM without its package: a stand-in with the names, signatures and rules of version 0.32.0 shows that
what it is handed and what is made of its answers is right, in a process of its own too; and what is refused before."""

import json
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parity.shrink import reference, shrunk
from tiny_model import ROOT

from ftlib import config, plugins
from ftlib.adapters import lora
from ftlib.errors import UserError
from ftlib.generation import Engine, SamplingParams, vllm
from ftlib.models import from_pretrained
from ftlib.rl import by_vllm
from ftlib.sections.rl import Rollout
from recipes import rl_toys

STAND_IN = Path(__file__).parent / "vllm_stand_in"
PROMPTS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6]]
KEY = SamplingParams.key


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return rl_toys.write_toy(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """The stand-in as an installed package; what it was called with."""
    info = tmp_path / "site/vllm-0.32.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    monkeypatch.syspath_prepend(info.parent)
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls.jsonl"))
    monkeypatch.setenv("STAND_IN_FP32", "adapters too, which vLLM has no kernels for: the same draws can be compared")
    # vLLM's seeds have 63 bits: the same draws for both engines.
    monkeypatch.setattr(SamplingParams, "key", lambda self, n: (KEY(self, n)[0] & 0x7FFFFFFF, KEY(self, n)[1]))
    yield lambda: [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture
def here(installed, monkeypatch):
    """The other end in this process."""

    @dataclass
    class Here:
        module: str
        options: dict
        env: dict

        def __post_init__(self):
            self.handlers = vllm.start(self.options)

        def call(self, name, *given):
            return self.handlers[name](*given)

        def close(self):
            pass

    monkeypatch.setattr(vllm, "Worker", Here)
    return installed


def adapted(toy, **options):
    """A toy with an adapter that does something."""
    model = from_pretrained(toy)
    lora.attach(model, "all-linear", **{"rank": 2, **options})
    lora.reset(model, 0)
    changed(model)
    return model


def changed(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, _, factors in lora.adapted(model):
            factors.lora_B.normal_(0, 0.3, generator=generator)


def engine(model, dtype="fp32", **rollout):
    return vllm.VllmEngine(model, Rollout(engine="vllm", **rollout), 32, dtype)


def flat(groups):
    return [completion for group in groups for completion in group]


def alike(found, expected):
    """The same tokens and ends, log-probabilities as near as sums in another order are."""
    pairs = list(zip(flat(found), flat(expected), strict=True))
    assert all(one.token_ids == other.token_ids and one.finish_reason == other.finish_reason for one, other in pairs)
    for one, other in pairs:
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    return bool(pairs)


def test_draws_and_logprobs_are_those_of_our_engine(here, toy):
    model = adapted(toy, rank=9, alpha=5)
    drawn_by = engine(model, max_batch=7)
    (made, *_), params = here(), SamplingParams(12, temperature=0.7, stop_ids=frozenset({13}), seed=3)
    assert made["model"] == str(toy) and made["dtype"] == "float32"
    assert made["enable_lora"] and made["max_lora_rank"] == 16, "the smallest that vLLM has for 9"
    assert made["max_model_len"] == 32 and made["max_num_seqs"] == 7 and made["gpu_memory_utilization"] == 0.4
    assert made["generation_config"] == "vllm" and not made["enable_sleep_mode"]
    found = drawn_by.generate(PROMPTS, params, n=4)
    assert alike(found, Engine(model).generate(PROMPTS, params, n=4))
    assert {one.finish_reason for one in flat(found)} == {"stop", "length"}
    cuts = ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3})
    for other in (replace(params, temperature=0.0), *(replace(params, logprobs=False, **cut) for cut in cuts)):
        again = drawn_by.generate(PROMPTS, other, n=4)
        assert alike(again, Engine(model).generate(PROMPTS, other, n=4))
        assert [one.token_ids for one in flat(again)] != [one.token_ids for one in flat(found)]
    for cut in cuts:
        with pytest.raises(UserError, match="would be of the tokens that"):
            drawn_by.generate(PROMPTS, replace(params, **cut))
    with pytest.raises(UserError, match="an empty prompt"):
        drawn_by.generate([[]], params)


def test_a_completion_is_cut_where_the_run_ends(here, toy):
    """The longest of several turns asks for more than another has room for."""
    model, params = adapted(toy), SamplingParams(20, seed=1)
    (found,), (whole,) = (e.generate([[1] * 25], params) for e in (engine(model), Engine(model)))
    assert found[0].finish_reason == "length" and found[0].token_ids == whole[0].token_ids[:7]


def test_an_adapter_that_learned_is_drawn_with_from_the_next_refresh_or_release_on(here, toy):
    model, params = adapted(toy), SamplingParams(12, seed=3)
    drawn_by = engine(model)
    first = drawn_by.generate(PROMPTS, params)
    changed(model, 2)
    assert alike(drawn_by.generate(PROMPTS, params), first), "as it was handed over"
    drawn_by.refresh()
    second = drawn_by.generate(PROMPTS, params)
    assert alike(second, Engine(model).generate(PROMPTS, params)) and flat(second) != flat(first)
    assert alike(drawn_by.generate(PROMPTS, params), second)
    changed(model, 4)  # weights for an evaluation went away
    drawn_by.release()
    assert alike(drawn_by.generate(PROMPTS, params), Engine(model).generate(PROMPTS, params))
    loads = [(row["call"], row["id"]) for row in here() if "id" in row]
    assert loads == [("add_lora", 1), ("remove_lora", 1), ("add_lora", 2), ("remove_lora", 2), ("add_lora", 3)]


def test_a_start_inside_of_the_weights_is_handed_over_as_what_it_equals(here, toy):
    model, params = adapted(toy, rank=5, init="pissa"), SamplingParams(12, seed=3)
    assert alike(engine(model).generate(PROMPTS, params), Engine(model).generate(PROMPTS, params))
    assert here()[0]["max_lora_rank"] == 16, "twice five"
    with pytest.raises(UserError, match=r"(?s)up to rank 512.*rollout\.engine=native"):
        engine(adapted(toy, rank=520))


@pytest.mark.parametrize("how", ["adapter", "all weights"])
def test_memory_is_given_back_while_the_model_learns(here, toy, how):
    model, params = adapted(toy) if how == "adapter" else from_pretrained(toy), SamplingParams(12, seed=3)
    drawn_by = engine(model, vllm_sleep=True)
    before = drawn_by.generate(PROMPTS, params)
    drawn_by.release()
    drawn_by.release()
    if how == "adapter":
        changed(model, 2)
    else:
        model.model.init_weights(5, std=0.3)
    drawn_by.refresh()
    after = drawn_by.generate(PROMPTS, params)
    assert alike(after, Engine(model).generate(PROMPTS, params)) and flat(after) != flat(before)
    calls = [row["call"] for row in here()]
    handed = ["remove_lora", "add_lora"] if how == "adapter" else ["reload_weights"]
    assert calls == ["LLM", handed[-1], "generate", "sleep", "wake_up", *handed, "generate"]
    assert here()[0]["enable_sleep_mode"]


def test_what_ends_in_another_way_is_no_completion(here, toy):
    output = SimpleNamespace(finish_reason="abort", token_ids=[1], logprobs=None)
    with pytest.raises(RuntimeError, match="ended a completion with 'abort'"):
        vllm._completion(output, SamplingParams(1))


def both(toy, folder, **sections):
    """Rows of a run with our engine and by vLLM, which must learn the same: in each step and for an evaluation."""

    def rows(name, **rollout):
        rollout |= {"prompts": 4, "group": 6, "temperature": 0.8, "mismatch_abort": 1e-4}
        values = rl_toys.settings(toy, "length", folder / name, steps=3, **sections, rollout=rollout)
        values["data"]["eval"] = 5
        return rl_toys.learn(values)

    native, drawn = rows("native"), rows("vllm", engine="vllm", vllm_sleep=True)
    assert len(native) == len(drawn)
    for one, other in zip(native, drawn, strict=True):
        for key in ("loss", "reward", "grad_norm", "tokens", "entropy", "length/mean", "eval_reward"):
            assert (key in one) == (key in other)
            assert one.get(key) is None or other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key
    assert max(row["mismatch/max"] for row in drawn if "loss" in row) < 1e-4, "each step draws with what was learned"


def test_a_run_learns_the_same_as_with_our_engine(installed, toy, tmp_path, monkeypatch):
    """vLLM in its own process, which ends with the run. In float32, else refused: in bf16 some draws differ."""
    monkeypatch.setattr(by_vllm, "problems", lambda cfg, world: [])
    made, real = [], vllm.Worker
    monkeypatch.setattr(vllm, "Worker", lambda *given, **options: made.append(real(*given, **options)) or made[0])
    both(toy, tmp_path, lora={"rank": 4})
    assert made[0].process.returncode is not None and len(made) == 1
    calls = [row["call"] for row in installed()]
    assert calls.count("LLM") == 1 and calls.count("generate") == 3 + 2
    assert "vllm" not in sys.modules, "the process that learns never imports it"


def test_a_full_fine_tune_hands_all_weights_over(here, toy, tmp_path):
    both(toy, tmp_path)
    calls = [row["call"] for row in here()]
    assert calls.count("LLM") == 1 and calls.count("reload_weights") == calls.count("generate") == 3 + 2


def test_a_run_that_never_hands_over_what_it_learned_is_noticed(here, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(by_vllm, "problems", lambda cfg, world: [])
    for name in ("refresh", "release"):
        monkeypatch.setattr(vllm.VllmEngine, name, lambda engine: None)
    sections = {"lora": {"rank": 4}, "steps": 3, "rollout": {"prompts": 4, "group": 6, "engine": "vllm"}}
    rows = rl_toys.learn(rl_toys.settings(toy, "length", tmp_path / "out", **sections))
    differs = [row["mismatch/max"] for row in rows if "loss" in row]
    assert differs[0] < 1e-4 < differs[2]


def test_a_process_that_cannot_start_says_why(installed, toy, tmp_path, monkeypatch):
    broken = tmp_path / "broken/vllm"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.13: no such file')\n")
    monkeypatch.syspath_prepend(broken.parent)
    with pytest.raises(UserError, match=r"(?s)libcudart\.so\.13: no such file.*where: rollout\.engine") as found:
        engine(adapted(toy))
    assert found.value.exit_code == 2


def refused(toy, folder, world=1, **sections):
    """What is wrong with a config that draws by vLLM, as `tune validate` finds it."""
    values = rl_toys.settings(toy, "copy", folder / "out", **{"dtype": "bf16", **sections})
    values["rollout"] |= {"engine": "vllm"}
    (folder / "config.yaml").write_text(json.dumps(values))
    module = plugins.load_file(ROOT / "recipes" / "grpo.py")
    return by_vllm.problems(config.load(module.Config, ["--config", str(folder / "config.yaml")]), world)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"rollout": {"staleness": 1}}, "rollout.staleness"),
        ({"rollout": {"temperature": 2.5}}, "rollout.temperature"),
        ({"rollout": {"temperature": 0.005}}, "rollout.temperature"),
        ({"deterministic": True}, "deterministic"),
        ({"model": {"quantize": "nf4"}, "lora": {}}, "model.quantize"),
        ({"model": {"fp8": "rowwise"}, "lora": {}}, "model.fp8"),
        ({"model": {"code": f"{STAND_IN}/none.py:Decoder"}}, "model.code"),
        ({"lora": {}, "dtype": "fp32"}, "dtype, lora"),
        ({"lora": {"dora": True}}, "lora.dora"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "lora.modules_to_save"),
        ({"tokenizer": {"add_tokens": ["<new>"]}}, "tokenizer"),
        ({"world": 2}, "parallel"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(installed, toy, tmp_path, sections, key):
    (problem,) = refused(toy, tmp_path, **sections)
    assert f"where: rollout.engine, {key}" in problem and problem.endswith("or set rollout.engine=native")


def test_nothing_is_refused_without_a_reason(installed, toy, tmp_path):
    assert refused(toy, tmp_path, lora={"rank": 4, "init": "pissa"}) == refused(toy, tmp_path, dtype="fp32") == []


def test_packed_folders_and_adapters_on_experts_are_refused(installed, toy, tmp_path):
    packed = shutil.copytree(toy, tmp_path / "packed")
    settings = json.loads((toy / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (packed / "config.json").write_text(json.dumps(settings))
    (problem,) = refused(toy, tmp_path, model={"path": str(packed)})
    assert "packed weights" in problem and "rollout.engine, model.path" in problem
    experts = shutil.copytree(toy, tmp_path / "experts")
    reference(shrunk("qwen3-30b-a3b", vocab_size=14)).save_pretrained(experts)
    sections = {"model": {"path": str(experts)}, "lora": {"rank": 2}}
    (problem,) = refused(toy, tmp_path, **sections)
    assert "adapters on experts" in problem and "rollout.engine, lora.targets" in problem
    assert not refused(toy, tmp_path, **{**sections, "lora": {"targets": ["q_proj"]}})


def test_the_package_is_missing_or_another(toy, tmp_path, monkeypatch):
    (problem,) = refused(toy, tmp_path)
    assert "vllm, which is not installed" in problem and 'pip install "ftlib[vllm]", or set' in problem
    monkeypatch.setattr(by_vllm.metadata, "version", lambda name: "0.33.0")
    (problem,) = refused(toy, tmp_path)
    assert "made for vllm 0.32.*; here is 0.33.0" in problem and "where: rollout.engine\n" in problem
    wanted = re.search(r'"vllm>=0\.(\d+),<0\.(\d+);', (ROOT / "pyproject.toml").read_text())
    assert f"0.{wanted[1]}." == vllm.VERSION and int(wanted[2]) == int(wanted[1]) + 1


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("rollout.engine=sglang", "engine.*native.*vllm"),
        ("rollout.vllm_memory=1.5", "vllm_memory: a share above 0 and below 1"),
        ("rollout.vllm_sleep=true", "only with engine: vllm"),
    ],
)
def test_a_setting_that_means_nothing_is_an_error(toy, tmp_path, setting, words):
    (tmp_path / "config.yaml").write_text(json.dumps(rl_toys.settings(toy, "copy", tmp_path / "out")))
    module = plugins.load_file(ROOT / "recipes" / "grpo.py")
    with pytest.raises(UserError, match=f"(?s){words}"):
        config.load(module.Config, ["--config", str(tmp_path / "config.yaml"), setting])
