"""recipes/grpo.py from its first line to its last: it learns, it resumes to the bit, alone and on two processes."""

import copy
import json

import pytest
import rl_toys
import torch
from shared_data import shared
from tiny_model import ROOT, losses, train, tune

from ftlib import config, plugins
from ftlib.errors import UserError
from ftlib.generation import Engine
from ftlib.generation.remote import RemoteEngine
from ftlib.rl import presets, setup

PRESETS = [name for name in presets.PRESETS if name != "distill"]


@pytest.fixture(scope="module", autouse=True)
def no_denormals():
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return rl_toys.write_toy(tmp_path_factory.mktemp("toy") / "model")


def test_a_run_learns_and_says_so(toy, tmp_path, capsys):
    out = tmp_path / "out"
    values = rl_toys.settings(toy, "length", out, steps=30, optim={"lr": 5e-3}, rollout={"show_every": 10})
    rows = rl_toys.learn(values)
    first, last = rl_toys.rewards(rows)
    assert first < 0.2 and last >= 0.75
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 31))
    needed = "reward reward_std rewards/length/mean rewards/length/std frac_zero_std entropy tokens tokens_per_s "
    needed += "lr clip_ratio/low clip_ratio/high clip_ratio/region length/mean length/min length/max "
    needed += "length/terminated_mean truncated mismatch/mean mismatch/k3 ratio/mean is_ratio/min is_ratio/mean "
    needed += "is_ratio/max reward_timeouts reward_errors unscorable tool_calls tool_failures staleness "
    needed += "seconds/generate seconds/reward seconds/logprobs seconds/train seconds/sync"
    assert all(key in row for row in steps for key in needed.split())
    assert max(row["mismatch/max"] for row in steps) < 1e-4
    said = capsys.readouterr().out
    assert "clip(rho, 0.8, 1.28)" in said and "completions of step 10:" in said and "prompt -> completion" in said
    table = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert len(table) == 4 * 30 and table[0]["completion"][0]["role"] == "assistant"


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_resume_is_exact(toy, tmp_path, name):
    more = {"minibatches": 2, "prompts": 6, "show": 99} if name == "plain" else {"prompts": 4}
    sections = {"rollout": {"group": 4, "show_every": 0, **more}, "checkpoint": {"every": 2}, "algorithm": {}}
    if name == "lora":
        sections |= {"lora": {"rank": 4}, "algorithm": {"preset": "grpo_paper"}}
    else:
        sections["algorithm"] = {"preset": "dapo"}
    whole = rl_toys.learn(rl_toys.settings(toy, "copy", tmp_path / "whole", steps=4, **sections))
    parts = rl_toys.settings(toy, "copy", tmp_path / "parts", steps=2, **sections)
    rl_toys.learn(parts)
    rows = rl_toys.learn({**parts, "steps": 4})
    assert losses(rows) == losses(whole)
    exact = ("reward", "grad_norm", "length/mean", "entropy", "tokens")
    assert [[row[k] for k in exact] for row in rows] == [[row[k] for k in exact] for row in whole]
    file = "model.safetensors" if name == "plain" else "adapter_model.safetensors"
    assert (tmp_path / "parts/final" / file).read_bytes() == (tmp_path / "whole/final" / file).read_bytes()
    if name == "lora":
        assert whole[0]["kl"] == 0 and whole[-1]["kl"] > 0
    else:  # a group that dynamic sampling left out has no advantage
        shown = [json.loads(line) for line in (tmp_path / "whole/rollouts.jsonl").read_text().splitlines()]
        groups = [shown[i : i + 4] for i in range(0, len(shown), 4)]
        still = [len({row["reward"] for row in group}) == 1 for group in groups]
        left_out = [all(row["advantage"] is None for row in group) for group in groups]
        assert any(still) and all(out for out, alike in zip(left_out, still, strict=True) if alike)
        assert sum(not out for out in left_out) == 4 * 6, "of those that differ each step learns from six"


def test_the_first_step_notices_a_trainer_at_another_temperature(toy, tmp_path, monkeypatch):
    real = setup.score_tokens
    monkeypatch.setattr(setup, "score_tokens", lambda m, b, t, entropy=False: real(m, b, 1.0, entropy))
    values = rl_toys.settings(toy, "copy", tmp_path / "out", steps=1, rollout={"temperature": 0.6, "prompts": 2})
    with pytest.raises(UserError, match="what is trained is not what drew"):
        rl_toys.learn(values)


def test_a_stale_engine_is_noticed(toy, tmp_path, monkeypatch):
    module = plugins.load_file(ROOT / "recipes" / "grpo.py")
    monkeypatch.setattr(module, "Engine", lambda model, **options: Engine(copy.deepcopy(model), **options))
    found = rl_toys.learn(rl_toys.settings(toy, "length", tmp_path / "out", steps=3), module)
    steps = [row["mismatch/mean"] for row in found if "loss" in row]
    assert steps[0] < 1e-5 and steps[2] > 1e-2


def test_everything_unscorable_or_empty_moves_nothing(toy, tmp_path, capsys):
    """The first evaluation is scored but for one prompt, nothing after it is."""
    once = "calls = []\ndef once(completions, **k):\n    calls.append(1)\n"
    once += "    return [1.0 if i and len(calls) == 1 else None for i in range(len(completions))]\n"
    (tmp_path / "once.py").write_text(once)
    sections = {"rewards": [{"fn": f"{tmp_path / 'once.py'}:once"}], "steps": 3, "rollout": {"prompts": 2, "group": 2}}
    sections["data"] = {"eval": 5}
    rows = rl_toys.learn(rl_toys.settings(toy, "copy", tmp_path / "out", **sections))
    before, *steps, after = rows
    assert all(row["loss"] == 0 and row["grad_norm"] == 0 and row["unscorable"] == 4 for row in steps)
    assert all(row["reward"] is None for row in steps)
    assert before["eval_reward"] == 1 and before["eval_unscorable"] == 1
    assert after["eval_unscorable"] == 5 and "eval_reward" not in after
    said = capsys.readouterr().out
    assert "eval unscorable 1\n" in said and "eval unscorable: 1 before, 5 after" in said
    assert "nothing to learn from in 3 steps: no completion was scored" in said


@pytest.mark.parametrize("preset", ["grpo", "grpo_paper", "reinforce++"])
def test_rewards_that_tell_nothing_apart_are_told_once(preset, toy, tmp_path, capsys):
    (tmp_path / "same.py").write_text("def same(completions, **k): return [0.3] * len(completions)\n")
    sections = {"rewards": [{"fn": f"{tmp_path / 'same.py'}:same"}], "steps": 7, "algorithm": {"preset": preset}}
    sections["rollout"] = {"prompts": 2, "group": 2, "minibatches": 2}
    rl_toys.learn(rl_toys.settings(toy, "length", tmp_path / "out", **sections))
    said = capsys.readouterr().out
    assert said.count("nothing to learn from in 3 steps: all completions of ") == 1
    assert ("only the divergence moves weights" in said) == (preset == "grpo_paper")
    assert "a finer reward (rewards)" in said and "every completion is cut off" not in said
    rl_toys.learn(rl_toys.settings(toy, "length", tmp_path / "learns", steps=5))
    assert "nothing to learn" not in capsys.readouterr().out


def demo(out, *settings):
    """Rows of the shipped demo, shortened: 12 steps, 60 held-out prompts."""
    module = plugins.load_file(ROOT / "recipes" / "grpo.py")
    held_out = "data.eval=[{path: 'ftlib:demo/data/rl_eval.jsonl', split: '[:60]'}]"
    words = ["--config", str(ROOT / "configs/demo_grpo.yaml"), "steps=12", "rollout.prompts=16", held_out]
    return module.main(config.load(module.Config, [*words, f"output_dir={out}", *settings]))


def test_the_demo_climbs_on_prompts_never_seen(tmp_path):
    rows = [row for row in demo(tmp_path / "out") if "eval_reward" in row]
    assert rows[0]["eval_reward"] <= 0.4 and rows[-1]["eval_reward"] >= rows[0]["eval_reward"] + 0.2


def test_with_rewards_that_mean_nothing_it_stays_where_it_was(toy, tmp_path):
    rewards = f"rewards=[{{fn: '{toy / 'rewards.py'}:dice'}}, {{fn: exact, weight: 0}}]"
    rows = [row for row in demo(tmp_path / "out", rewards) if "eval_reward" in row]
    before, after = (rows[i]["eval_rewards/exact"] for i in (0, -1))
    assert after <= before + 0.1


def test_a_teacher_is_learned_from_its_own_completions(toy, tmp_path):
    other = rl_toys.write_toy(tmp_path / "other", seed=7)
    values = rl_toys.settings(toy, "copy", tmp_path / "out", steps=15)
    values |= {"algorithm": {"preset": "distill"}, "teacher": {"path": str(other)}, "rewards": []}
    rows = rl_toys.learn(values)
    gaps = [row["kl"] for row in rows if "loss" in row]
    assert all(row["reward"] is None for row in rows if "loss" in row)
    assert gaps[-1] < 0.5 * gaps[0]


def test_drawing_ahead_learns_from_weights_one_update_old_and_resumes_to_the_bit(toy, tmp_path, monkeypatch):
    real, loads = RemoteEngine.load, []
    monkeypatch.setattr(RemoteEngine, "load", lambda engine: loads.append(real(engine)))
    sections = {"rollout": {"prompts": 4, "group": 4, "staleness": 1}, "checkpoint": {"every": 2}, "lora": {"rank": 4}}
    sections["rollout"]["mismatch_abort"] = 1e-4  # an update older is no mismatch, in a run that goes on neither
    whole = rl_toys.learn(rl_toys.settings(toy, "length", tmp_path / "whole", steps=4, **sections))
    assert [row["staleness"] for row in whole] == [0, 1, 1, 1] and whole[0]["mismatch/max"] < 1e-4
    assert len(loads) == 5, "weights are handed over for the first step, and in each step for the next"
    assert whole[2]["mismatch/mean"] > 1e-4
    still = {**sections, "rollout": {"prompts": 4, "group": 4}, "optim": {"lr": 1e-12}}
    first = rl_toys.learn(rl_toys.settings(toy, "length", tmp_path / "still", steps=2, **still))
    assert [row["reward"] for row in first] == [row["reward"] for row in whole[:2]], "the first weights drew for two"
    parts = rl_toys.settings(toy, "length", tmp_path / "parts", steps=2, **sections)
    rl_toys.learn(parts)
    rows = rl_toys.learn({**parts, "steps": 4})
    exact = ("loss", "reward", "grad_norm", "length/mean", "entropy", "tokens", "staleness")
    assert [[row[k] for k in exact] for row in rows] == [[row[k] for k in exact] for row in whole]
    assert "drawn_ahead" in (tmp_path / "parts/checkpoints/step_000004/state.json").read_text()


@pytest.mark.slow
def test_what_was_drawn_ahead_is_left_where_it_would_be_drawn_otherwise_now(toy, tmp_path):
    """Last result (2026-11-23): passed."""
    sections = {"rollout": {"prompts": 4, "group": 4, "staleness": 1}, "checkpoint": {"every": 2}, "lora": {"rank": 4}}
    parts = rl_toys.settings(toy, "length", tmp_path / "parts", steps=4, **sections)
    rl_toys.learn(parts)
    state = tmp_path / "parts/checkpoints/step_000004/state.json"
    other = {**parts["rollout"], "temperature": 0.5, "mismatch_abort": 0.05}
    rows = rl_toys.learn({**parts, "steps": 6, "rollout": other})
    assert [row["staleness"] for row in rows[4:]] == [0, 1], "what waited was drawn at another temperature"
    rl_toys.learn({**parts, "steps": 8, "rollout": other | {"staleness": 0}})
    assert "drawn_ahead" not in (state.parents[1] / "step_000008/state.json").read_text()


def test_adapters_learn_on_a_base_of_four_bits_that_is_drawn_from_as_it_is(toy, tmp_path, monkeypatch):
    """One copy of it, for engine, trainer and reference."""
    module, engines = plugins.load_file(ROOT / "recipes" / "grpo.py"), []

    def kept(model, **options):
        engines.append(Engine(model, **options))
        return engines[0]

    monkeypatch.setattr(module, "Engine", kept)
    sections = {"model": {"quantize": "nf4"}, "lora": {"rank": 4}, "algorithm": {"kl_coef": 0.01}, "steps": 6}
    sections |= {"optim": {"lr": 1e-2}, "rollout": {"prompts": 6, "group": 6}}
    values = rl_toys.settings(toy, "length", tmp_path / "out", **sections)
    rows = [row for row in rl_toys.learn(values, module) if "loss" in row]
    assert max(row["mismatch/max"] for row in rows) < 1e-4 and rows[0]["kl"] == 0 < rows[-1]["kl"]
    (engine,) = engines
    linear = engine.model.model.layers[0].self_attn.q_proj
    assert engine.merged is None and "weight" not in linear._parameters and linear.adapters["policy"].lora_B.any()


def on_two(toy, out, mesh, **sections):
    """Rows of two steps on two processes."""
    values = rl_toys.settings(toy, "length", out, steps=2, **sections)
    values["rollout"] |= {"prompts": 2, "group": 6}
    values["parallel"] = mesh
    values["data"]["eval"] = 5
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(values))
    code, _, errors = tune("run", "--nproc-per-node", "2", "recipes/grpo.py", "--config", file)
    assert code == 0, errors
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lora", "full"])
def test_two_processes_learn_alike_whether_they_share_a_model_or_not(how, toy, tmp_path):
    """Each draws for its own prompts with its own engine; rows of unequal number, and in some step one has nothing to
    learn from: with a shared model it computes idle ones. Last result (2026-11-22): passed."""
    sections = {"batch": {"micro_rows": 2}, "algorithm": {"preset": "grpo_paper"}}
    sections |= {"lora": {"rank": 4}} if how == "lora" else {}
    apart = on_two(toy, tmp_path / "apart", {"dp_replicate": 2, "dp_shard": 1}, **sections)
    shared = on_two(toy, tmp_path / "shared", {"dp_shard": 2}, **sections)
    steps = [[row for row in rows if "loss" in row] for rows in (apart, shared)]
    assert [len(rows) for rows in steps] == [2, 2] and steps[0][0]["grad_norm"] > 0
    for one, other in zip(*steps, strict=True):
        assert other["mismatch/max"] < 1e-4 and one["mismatch/max"] < 1e-4
        assert 0 <= one["idle"] < 1 and 0 <= other["idle"] < 1
        for key in ("loss", "reward", "grad_norm", "kl", "tokens", "entropy", "length/mean"):
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key
    assert shared[-1]["eval_reward"] == pytest.approx(apart[-1]["eval_reward"], abs=1e-6)


def like_gsm8k(folder):
    """Rows of its form in words of our own: a calculation in brackets, the number last, some with commas or a minus."""
    rows = []
    for i in range(1, 65):
        each, sold = 37 * i, 40 - i
        question = f"A mill has {i} sacks of {each} grains. It gives {sold} grains away. How many are left?"
        whole = f"{i} * {each} = <<{i}*{each}={i * each}>>{i * each} grains.\nThen {i * each} - {sold} are left."
        rows.append({"question": question, "answer": f"{whole}\n#### {i * each - sold:,}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("rows", ["alike", "published"])
def test_gsm8k_runs_whole(rows, tmp_path):
    """Through the shipped model: nothing to learn for it, but every part is met."""
    file = like_gsm8k(tmp_path) if rows == "alike" else shared("math/gsm8k_test.jsonl")
    words = ["--config", str(ROOT / "configs/demo_grpo.yaml"), f"data.sources=[{{path: '{file}', split: '[:60]'}}]"]
    words += [f"data.eval=[{{path: '{file}', split: '[60:64]'}}]", "data.seq_len=1024", "steps=2"]
    words += ["rewards=[{fn: gsm8k}]"]
    words += ["rollout.prompts=2", "rollout.group=2", "rollout.max_new_tokens=48", "batch.micro_rows=1"]
    module = plugins.load_file(ROOT / "recipes" / "grpo.py")
    rows = module.main(config.load(module.Config, [*words, f"output_dir={tmp_path / 'out'}"]))
    assert [row["unscorable"] for row in rows if "loss" in row] == [0, 0]
    table = [json.loads(line) for line in (tmp_path / "out/rollouts.jsonl").read_text().splitlines()]
    assert "####" in table[0]["columns"]["answer"]
    said = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in said} == {0, 2} and all(row["reward"] == 0 and row["where"] for row in said)
    assert all(isinstance(row[key], str) and row[key] for row in said for key in ("prompt", "answer"))


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_learns(toy, tmp_path, preset):
    """Length in 40 steps. Last run 2026-11-22: all nine."""
    sections = {"steps": 40, "algorithm": {"preset": preset}, "optim": {"lr": 3e-3}}
    values = rl_toys.settings(toy, "length", tmp_path / "out", **sections)
    if preset == "gdpo":
        values["rewards"].append({"fn": "length", "args": {"target": 6}, "weight": 0.1})
    first, last = rl_toys.rewards(rl_toys.learn(values))
    assert last >= first + 0.4, (first, last)


def test_sums_get_right_after_a_little_imitation(toy, tmp_path):
    """60 steps of imitation, then 80 of rewards."""
    rollout = {"prompts": 24, "group": 8, "minibatches": 4}
    values = rl_toys.settings(toy, "sum", tmp_path / "rl", steps=80, optim={"lr": 1e-3}, rollout=rollout)
    imitate = {key: values[key] for key in ("model", "memory", "checkpoint", "dtype")}
    imitate |= {"data": {"sources": [{"path": str(toy / "sum_sft.jsonl")}], "seq_len": 32}, "optim": {"lr": 3e-3}}
    imitate |= {"batch": {"rows": 16, "micro_rows": 16}, "steps": 60, "output_dir": str(tmp_path / "sft")}
    (tmp_path / "sft.yaml").write_text(json.dumps(imitate))
    train("full_sft", "--config", tmp_path / "sft.yaml")
    values["model"] = {"path": str(tmp_path / "sft/final")}
    first, last = rl_toys.rewards(rl_toys.learn(values))
    assert first < 0.75 and last >= 0.85


def test_copying_is_found_from_nothing(toy, tmp_path):
    """Three digits from random weights: their length and some of them soon, all of them after long (the slow test)."""
    values = rl_toys.settings(toy, "copy", tmp_path / "out", steps=60, algorithm={"preset": "dr_grpo"})
    first, last = rl_toys.rewards(rl_toys.learn(values))
    assert first < 0.15 and last >= 0.25


@pytest.mark.slow
def test_copying_is_found_whole(toy, tmp_path):
    """Three digits from random weights in 400 steps: 0.07 -> 0.999 (2026-11-22; 45 s of one core)."""
    sections = {"steps": 400, "algorithm": {"preset": "dr_grpo"}, "optim": {"lr": 1.5e-3}}
    first, last = rl_toys.rewards(rl_toys.learn(rl_toys.settings(toy, "copy", tmp_path / "out", **sections)))
    assert first < 0.15 and last >= 0.95
