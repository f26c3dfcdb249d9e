"""recipes/grpo.py piece by piece: what is trained is what was drawn, however it is packed, and planted faults show."""

import json

import pytest
import rl_toys
import torch
from rl_lab import Lab

from ftlib import cli
from ftlib.losses.policy import Objective, policy_loss
from ftlib.rl import presets, scoring, setup
from ftlib.rl import samples as laid
from ftlib.rl.environments import Dialogues, schemas
from ftlib.rl.rewards.run import Rewards
from ftlib.sections.rl import Algorithm, Dialogue, Reward, Rollout


@pytest.fixture(scope="module", autouse=True)
def no_denormals():
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return rl_toys.write_toy(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def lab(toy, tmp_path_factory):
    return Lab(toy, tmp_path_factory.mktemp("lab") / "out")


def close(a, b, tolerance=1e-5):
    return float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("how", ["token", "seq", "const", "group"])
def test_packing_and_splits_change_nothing(lab, how):
    samples = lab.samples()
    assert len({len(sample.ids) for sample in samples}) > 2
    loss, one, micros = lab.gradient(samples, seq_len=256, micro_rows=1, aggregation=how)
    assert len(micros) == 1
    for seq_len, micro_rows, order in ((16, 1, 1), (16, 5, -1), (40, 2, 1)):
        other, several, micros = lab.gradient(samples[::order], seq_len, micro_rows, aggregation=how)
        assert len(micros) > 1 and other == pytest.approx(loss, abs=1e-6) and close(several, one)


def test_sequence_ratios_survive_packing(lab):
    samples = lab.samples()
    for sample in samples:
        sample.old = sample.engine - 0.1 * torch.arange(sample.length)
    objective = Objective(ratio="sequence", clip_low=0.5, clip_high=2.0)
    one = lab.gradient(samples, 256, 1, objective=objective)
    several = lab.gradient(samples, 16, 1, objective=objective)
    assert one[0] == pytest.approx(several[0], abs=1e-6) and close(several[1], one[1])


def check_tokens(lab):
    """What has a gradient is what was drawn, each completion's end included, at the engine's own log-probability."""
    samples = lab.samples()
    assert any(sample.finish == "stop" and sample.ids[-1] == 13 for sample in samples)
    drawn = sum(sample.length for sample in samples)
    trained, tokens = scoring.give_weights(samples, presets.Resolved(), 12, lab.run)
    (micro,) = laid.pack(trained, 512, 1, 12)
    new = setup.score_tokens(lab.model, micro, 1.0).detach().requires_grad_()
    assert float((new.detach() - micro.tokens.engine).abs().max()) < 1e-5
    loss, _ = policy_loss(new, micro.tokens, Objective())
    loss.backward()
    assert tokens == drawn == len(new.grad) == micro.batch.target_tokens and (new.grad != 0).all()
    ids = [token for sample in micro.samples for token in sample.ids]
    assert micro.batch.labels.flatten()[micro.at].tolist() == ids


def check_padding(lab):
    """What fills a row up has no say, to the bit."""
    samples = lab.samples()
    one, other = (lab.gradient(samples, 40, 2, pad_id=pad_id) for pad_id in (12, 3))
    assert one[0] == other[0] and torch.equal(one[1], other[1])


def check_advantages(lab):
    """Better than the mean of one's own prompt is above 0, worse below, and a group adds up to nothing."""
    samples = lab.samples(5, 4)
    for number, sample in enumerate(samples):
        sample.rewards = [float((number * 7) % 5)]
        sample.reward = sample.rewards[0]
    everyone = scoring.gather(samples, Rewards([Reward(fn="exact")]), lab.run)
    scoring.give_advantages(samples, everyone, presets.Resolved(), lab.run)
    for group in range(5):
        own = [sample for sample in samples if sample.group == group]
        mean = sum(sample.reward for sample in own) / 4
        assert len(own) == 4 and abs(sum(float(sample.advantages[0]) for sample in own)) < 1e-5
        assert all((s.reward > mean) == (float(s.advantages[0]) > 0) for s in own if s.reward != mean)


CHECKS = {"tokens": check_tokens, "padding": check_padding, "advantages": check_advantages}


@pytest.mark.parametrize("name", CHECKS)
def test_exact(lab, name):
    CHECKS[name](lab)


def test_log_probabilities_are_those_of_whole_rows_at_the_temperature(lab):
    samples = lab.samples(2, 2)
    for temperature in (0.6, 1.0, 1.3):
        (micro,) = laid.pack(samples, 256, 1, 12)
        found = setup.score_tokens(lab.model, micro, temperature).split([s.length for s in micro.samples])
        for sample, values in zip(micro.samples, found, strict=True):
            ids = torch.tensor([[*sample.prompt.ids, *sample.ids]])
            logp = (lab.model.logits(ids)[0] / temperature).log_softmax(-1)[len(sample.prompt.ids) - 1 : -1]
            wanted = logp.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
            assert torch.allclose(values, wanted, atol=1e-5)


def test_the_loss_is_that_of_a_loop_over_completions(lab):
    samples = lab.samples()
    loss, grad, _ = lab.gradient(samples, aggregation="seq")
    lab.model.zero_grad()
    total = 0.0
    for sample in samples:
        ids = torch.tensor([[*sample.prompt.ids, *sample.ids]])
        logp = lab.model.logits(ids)[0].log_softmax(-1)[len(sample.prompt.ids) - 1 : -1]
        own = logp.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
        total = total - (own - own.detach()).exp().mul(float(sample.advantages[0])).mean() / len(samples)
    total.backward()
    assert close(grad, torch.cat([p.grad.flatten() for p in lab.model.parameters() if p.grad is not None]))
    assert loss == pytest.approx(total.item(), abs=1e-6)


def test_groups_that_earn_the_same_are_skipped_but_counted(lab):
    samples = lab.samples()
    for sample in samples[:4]:
        sample.advantages = torch.zeros(sample.length)
    trained, tokens = scoring.give_weights(samples, presets.Resolved(), 16, lab.run)
    assert trained == samples[4:] and tokens == sum(s.length for s in trained)
    assert samples[5].weight == pytest.approx(1 / sum(s.length for s in samples))
    for sample in samples:
        sample.advantages = torch.zeros(sample.length)
    assert scoring.give_weights(samples, presets.Resolved(), 16, lab.run) == ([], 0)
    masked = presets.Resolved(overlong="mask")
    samples = lab.samples()
    samples[1].finish = "length"
    trained, _ = scoring.give_weights(samples, masked, 16, lab.run)
    assert samples[1] not in trained and samples[1].weight == 0


class Given:
    """Rewards by a table."""

    weights, names = (1.0, 0.5), ("first", "second")

    def __init__(self, *columns):
        self.columns = columns

    def __call__(self, prompts, completions, completion_ids, columns, texts):
        assert len(prompts) == len(completions) == len(completion_ids) == len(columns["answer"]) == len(texts)
        return [list(column) for column in self.columns]


def test_rewards_are_weighed_summed_and_penalised(lab):
    samples = lab.samples(1, 4)
    rewards = Given([1, 0, None, None], [1, None, 4, None])
    scoring.give_rewards(samples, rewards, presets.Resolved(), 12)
    assert [sample.reward for sample in samples[:3]] == [1.5, 0, 2] and samples[3].reward != samples[3].reward
    scoring.give_rewards(samples, rewards, presets.Resolved(overlong="soft", overlong_margin=1.0), 12)
    assert [s.rewards[2] for s in samples] == [max(-1, min(0, -len(s.ids) / 12)) for s in samples]
    everyone = scoring.gather(samples, rewards, lab.run)
    assert everyone.scores.weights.tolist() == [1, 0.5, 1]
    assert everyone.finished.tolist() == [sample.finish != "length" for sample in samples]


def test_dynamic_sampling_keeps_groups_that_differ(lab):
    samples = lab.samples(3, 2)
    rewards = Given([1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1])
    scoring.give_rewards(samples, rewards, presets.Resolved(), 12)
    assert scoring.differing(samples, rewards, "group") == samples[2:]
    for sample in samples:
        sample.rewards[1] = 0.0
    assert scoring.differing(samples, rewards, "group") == samples[2:4]
    assert scoring.differing([], rewards, "group") == []
    assert scoring.enough(samples, 6, lab.run) and not scoring.enough(samples, 7, lab.run)


def test_minibatches_keep_groups_together(lab):
    samples = lab.samples(5, 2)
    parts = scoring.split(samples, 3)
    assert [len(part) for part in parts] == [4, 4, 2] and [s for part in parts for s in part] == samples
    assert scoring.split(samples[:2], 3) == [samples[:2], [], []]


def test_seeds_differ_by_step_round_and_process_and_nothing_else(lab):
    places = [(0, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1), (1, 1, 0, 0)]
    drawn = [[s.ids for s in lab.rollouts(lab.prompts[:2], 4, place)] for place in places]
    assert len({str(ids) for ids in drawn}) == len(places)
    assert [s.ids for s in lab.rollouts(lab.prompts[:2], 4, places[0])] == drawn[0]
    assert len({str(ids) for ids in drawn[0][:4]}) > 1  # completions of one prompt are not copies


def plant(monkeypatch, name):
    """A fault that real trainers have shipped."""
    advantages, table, pack, document = scoring.advantages, scoring._table, laid._micro, laid.Sample.document

    def transposed(values, columns):
        found = table(values, columns)
        return found.reshape(5, 4, columns).transpose(0, 1).reshape(found.shape)

    def shifted(*args):
        micro = pack(*args)
        micro.at = (micro.at - 1).clamp(min=0)
        return micro

    def endless(sample):
        ids, labels = document(sample)
        labels[labels == 13] = -100
        return ids, labels

    def padded(*args):
        micro = pack(*args)
        labels = micro.batch.labels.flatten()
        labels[-8:] = micro.batch.input_ids.flatten()[-8:]
        micro.at = (labels != -100).nonzero()[:, 0]
        for key in ("sequence", "weights", "advantages", "engine"):
            value = getattr(micro.tokens, key)
            setattr(micro.tokens, key, torch.cat([value, value[-1:].expand(len(micro.at) - len(value))]))
        micro.batch.target_tokens = len(micro.at)
        return micro

    faults = {
        "advantage sign": (scoring, "advantages", lambda *args: -advantages(*args)),
        "groups misordered": (scoring, "_table", transposed),
        "no baseline": (scoring, "advantages", lambda scores, kind: scores.total),
        "log-probabilities off by one": (laid, "_micro", shifted),
        "end not trained": (laid.Sample, "document", endless),
        "padding trained": (laid, "_micro", padded),
    }
    monkeypatch.setattr(*faults[name])


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("advantage sign", "advantages"), ("groups misordered", "advantages"), ("no baseline", "advantages"),
        ("log-probabilities off by one", "tokens"), ("end not trained", "tokens"), ("padding trained", "padding"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_noticed(lab, monkeypatch, fault, check):
    plant(monkeypatch, fault)
    with pytest.raises((AssertionError, RuntimeError)):
        CHECKS[check](lab)


ENVIRONMENT = '''
def add(a: int, b: int) -> int:
    """Sum of two numbers."""
    return a + b

def echo(messages, row):
    turns = sum(m["role"] == "assistant" for m in messages)
    return [{"role": "user", "content": "+7="}] if turns < 3 else None
'''


def test_turns_of_others_are_never_trained(toy, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(ENVIRONMENT)
    lab = Lab(
        toy, tmp_path / "out", rollout={"max_new_tokens": 20}, data={"seq_len": 64},
        dialogue={"environment": f"{file}:echo", "max_turns": 3},
    )  # fmt: skip
    samples = lab.samples(4, 4)
    lab.dialogues.close()
    assert max(len(sample.messages) for sample in samples) == 5
    for sample in samples:
        others = [token for token, drawn in zip(sample.ids, sample.drawn, strict=True) if not drawn]
        assert others == lab.tokenizer.encode("+7=") * sum(m["role"] == "user" for m in sample.messages)
        assert len(sample.ids) <= 20 and sample.length + len(others) == len(sample.ids)
        text = lab.tokenizer.decode([*sample.prompt.ids, *sample.ids])
        whole = [*sample.prompt.messages, *sample.messages]
        again = lab.tokenizer.apply_chat_template(whole, tokenize=False)
        assert text == again or sample.finish == "length"
    (micro,) = laid.pack(samples, 1024, 1, 12)
    assert micro.batch.target_tokens == sum(sample.length for sample in samples)
    assert (setup.score_tokens(lab.model, micro, 1.0) - micro.tokens.engine).abs().max().item() < 1e-5


def test_tools(toy, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(ENVIRONMENT)
    cfg = Dialogue(tools=(f"{file}:add",))
    wanted = {"type": "object", "properties": {n: {"type": "integer"} for n in "ab"}, "required": ["a", "b"]}
    assert schemas(cfg)[0]["function"] == {"name": "add", "description": "Sum of two numbers.", "parameters": wanted}
    with Dialogues(cfg) as dialogues:
        call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
        assert dialogues._run_tools({"content": call}) == ([{"role": "tool", "content": "5"}], 0)
        said, failed = dialogues._run_tools({"content": '<tool_call>{"name": "sub"}</tool_call>' + call})
        assert "no tool 'sub'" in said[0]["content"] and said[1]["content"] == "5" and failed == 1
        assert dialogues._run_tools({"content": "5"}) == (None, 0)


def test_checked_before_a_run(toy, tmp_path, capsys):
    wrong = {
        "rewards": ({"rewards": []}, "nothing says how good"),
        "weight": ({"rewards": [{"fn": "exact", "weight": 0}]}, "rewards[0].weight"),
        "environment": ({"dialogue": {"environment": "./nothere.py:f"}}, "dialogue.environment"),
        "mismatch": ({"rollout": {"mismatch_warn": -1}}, "must not be negative"),
        "score": ({"eval": {"metric": "rewards"}}, "fix: one of eval_reward, eval_length"),
        "theirs": ({"rollout": {"num_generations": 4}}, "did you mean 'rollout.group'"),
        "alone": ({"rollout": {"group": 1}}, "none"),
        "gdpo": ({"algorithm": {"preset": "gdpo"}}, "several rewards"),
        "distill": ({"algorithm": {"preset": "distill"}}, "teacher.path"),
        "dropout": ({"lora": {"dropout": 0.1}}, "lora.dropout"),
        "room": ({"rollout": {"max_new_tokens": 32}}, "leaves no room"),
        "temperature": ({"rollout": {"temperature": 0}}, "temperature: must be above 0"),
        "column": ({"rewards": [{"fn": "code_tests", "args": {"allow": True, "unsafe_local": True}}]}, "needs tests"),
        "preset": ({"algorithm": {"preset": "grop"}}, "did you mean 'grpo'"),
        "mesh": ({"parallel": {"tp": 2}}, "whole model"),
        "mesh of the judge": ({"rewards": [{"model": str(toy)}]}, "would have to score together"),
        "mesh ahead": ({"rollout": {"staleness": 1}}, "starts the one that draws"),
        "ahead": ({"rollout": {"staleness": 1}, "algorithm": {"preset": "dapo"}}, "replace others"),
        "8 bits ahead": (
            {"rollout": {"staleness": 1}, "model": {"fp8": "rowwise", "fp8_smallest": 64}, "lora": {"rank": 2}},
            "8 bits, which are not handed over",
        ),
        "code ahead": (
            {"rollout": {"staleness": 1}, "model": {"code": "./own.py:Decoder"}}, "the library's own model"
        ),
        "whole ahead": (
            {"rollout": {"staleness": 1}, "lora": {"modules_to_save": ["lm_head"]}}, "modules that are trained whole"
        ),
        "mesh of 8 bits": ({"model": {"fp8": "rowwise"}, "lora": {"rank": 2}}, "8 bits, which are not gathered"),
        "mesh of prompts": ({"rollout": {"prompts": 3}}, "no multiple of the 2 processes"),
    }
    for name, (sections, message) in wrong.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(rl_toys.settings(toy, "copy", tmp_path / "out", steps=1, **sections)))
        world = ["--world", "2"] if "mesh" in name else []
        assert cli.main(["validate", "recipes/grpo.py", "--config", str(file), *world]) == 2
        assert message in capsys.readouterr().err, name
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1=", "answer": "1"}\n{"prompt": "2=", "answer": ["2"]}\n')
    lists = rl_toys.settings(toy, "copy", tmp_path / "out", data={"sources": [{"path": str(tmp_path / "rows.jsonl")}]})
    (tmp_path / "lists.yaml").write_text(json.dumps(lists | {"rewards": [{"fn": "exact"}]}))
    assert cli.main(["validate", "recipes/grpo.py", "--config", str(tmp_path / "lists.yaml")]) == 2
    said = capsys.readouterr().err
    assert "'answer' must be text or a number, here it is [\"2\"]" in said and "rows.jsonl:2, 1 of 2 prompts" in said
    good = rl_toys.settings(toy, "copy", tmp_path / "out", steps=1)
    (tmp_path / "good.yaml").write_text(json.dumps(good))
    words = ["validate", "recipes/grpo.py", "--config", str(tmp_path / "good.yaml")]
    assert cli.main([*words, "rollout.prompts=9999"]) == 0
    assert "rollout.prompts is 9999, and an epoch has" in capsys.readouterr().out
    assert cli.main([*words, "data.seq_len=128", "rollout.max_new_tokens=64"]) == 0
    assert "tokens, and the model's range is 64 (max_position_embeddings)" in capsys.readouterr().out
    assert cli.main(words) == 0 and "the model's range" not in capsys.readouterr().out


def test_every_preset_says_what_it_is():
    wanted = {
        "grpo": "clip(rho, 0.8, 1.28)", "grpo_paper": "0.04 KL(pi || ref)", "dr_grpo": "1/(S max_new_tokens)",
        "dapo": "replaced by other prompts", "gspo": "clip(rho, 0.9997, 1.0004)", "cispo": "min(rho, 5) A log pi",
        "rloo": "r - mean of the others", "reinforce++": "over tokens", "gdpo": "sum_k w_k", "distill": "log teacher",
    }  # fmt: skip
    assert wanted.keys() == presets.PRESETS.keys()
    for name, words in wanted.items():
        text = "\n".join(presets.formula(Algorithm(preset=name), Rollout()))
        assert words in text and f"algorithm: {name}" in text
    changed = presets.resolve(Algorithm(preset="dapo", clip_high=0.5, dynamic_sampling=False, kl_coef=0.1))
    assert changed.objective.clip_high == 0.5 and not changed.dynamic_sampling and changed.needs_reference


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_setting_that_the_algorithm_does_not_look_at_is_told(name):
    found = presets.resolve(Algorithm(preset=name))
    more = {"clip_low": 0.1, "dual_clip": 3.0, "ratio_cap": 2.0, "correction_cap": 3.0, "overlong_margin": 0.3}
    wrong = presets.unread(Algorithm(preset=name, kl_in=found.kl_in, **more))
    clipped, soft, held = found.objective.loss == "clip", found.overlong == "soft", found.kl_coef > 0
    read = {"clip_low": clipped, "dual_clip": clipped, "ratio_cap": name == "cispo", "overlong_margin": soft}
    ignored = [key for key, by_it in (read | {"kl_in": held}).items() if not by_it]
    assert [key for _, key, _ in wrong] == [f"algorithm.{key}" for key in ignored]
    assert not presets.unread(Algorithm(preset=name)), "what a preset brings is no mistake"
    off = presets.unread(Algorithm(preset=name, correction="none", correction_cap=3.0))
    assert [key for _, key, _ in off] == ["algorithm.correction_cap"]


def test_a_new_pad_token_beside_an_adapter_needs_no_row_that_trains(tmp_path):
    values = rl_toys.settings(rl_toys.write_toy(tmp_path / "toy"), "copy", tmp_path / "out", lora={"rank": 4})
    values |= {"tokenizer": {"pad_token": "<filler>"}, "steps": 1}
    values["rollout"] |= {"prompts": 1, "group": 2}
    assert rl_toys.learn(values)[-1]["step"] == 1
