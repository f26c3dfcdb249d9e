"""Prompts of any file for reinforcement learning: their columns, their order, what does not fit."""

import json

import pytest
from tiny_model import ROOT

from ftlib import cli, tokenizers
from ftlib.data.prompts import Asked, PromptLoader, load
from ftlib.errors import UserError
from ftlib.models import hub
from ftlib.sections import Source
from ftlib.sections.rl import Prompts


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.from_pretrained(hub.resolve("ftlib:demo/model"))


def write(folder, *rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


SHAPES = {
    "prompt as messages": ({"prompt": [{"role": "user", "content": "5 + 5"}], "answer": "10"}, {"answer": "10"}),
    "prompt as text": ({"prompt": "5 + 5", "answer": "10"}, {"answer": "10"}),
    "gsm8k": ({"question": "5 + 5", "answer": "#### 10"}, {"answer": "#### 10"}),
    "capitals": ({"Question": "5 + 5", "Answer": "10"}, {"Answer": "10"}),
    "math": ({"problem": "5 + 5", "solution": "10", "level": 1}, {"solution": "10", "level": 1}),
    "judged": ({"messages": [{"role": "user", "content": "5 + 5"}], "ground_truth": "10"}, {"ground_truth": "10"}),
    "a conversation with its answer": (
        {"messages": [{"role": "user", "content": "5 + 5"}, {"role": "assistant", "content": "10"}]}, {"answer": "10"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, tmp_path, tokenizer):
    row, columns = SHAPES[name]
    cfg = Prompts(sources=(Source(path=write(tmp_path, row, row)),), eval=1, seq_len=64)
    sets = load(cfg, tokenizer, 10, seed=0)
    (prompt,) = sets.eval
    assert prompt.columns == columns and sets.columns == set(columns)
    messages = [{"role": "user", "content": "5 + 5"}]
    assert prompt.messages == messages
    assert prompt.ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def test_columns_are_renamed_for_rewards_wherever_they_lie(tmp_path, tokenizer):
    verl = {"prompt": [{"role": "user", "content": "5 + 5"}], "data_source": "math", "reward_model": {
        "style": "rule", "ground_truth": "10"}, "extra_info": {"index": 1, "asked": "6 + 6"}}  # fmt: skip
    columns = {"answer": "reward_model.ground_truth", "source": "data_source"}
    source = Source(path=write(tmp_path, verl), columns=columns)
    (prompt,) = load(Prompts(sources=(source,), seq_len=64), tokenizer, 10, seed=0).train.sources[0]
    assert prompt.messages == verl["prompt"]
    rest = {key: verl[key] for key in ("reward_model", "extra_info")}
    assert prompt.columns == {"answer": "10", "source": "math", **rest}
    source = Source(path=source.path, columns={"prompt": "extra_info.asked", "answer": "reward_model.ground_truth"})
    (prompt,) = load(Prompts(sources=(source,), seq_len=64), tokenizer, 10, seed=0).train.sources[0]
    assert (prompt.text, prompt.columns["answer"]) == ("6 + 6", "10")
    wrong = Prompts(sources=(Source(path=source.path, columns={"answer": "reward_model.truth"}),))
    with pytest.raises(UserError, match=r"column 'reward_model\.truth' not found"):
        load(wrong, tokenizer, 1, seed=0)


@pytest.mark.parametrize("name", SHAPES)
def test_the_text_of_a_prompt_that_is_text(name, tmp_path, tokenizer):
    row, _ = SHAPES[name]
    cfg = Prompts(sources=(Source(path=write(tmp_path, row)),), seq_len=64, system="Be brief.")
    found = [load(cfg, tokenizer, 10, seed=0, several=several).train.sources[0][0] for several in (False, True)]
    text = None if any(isinstance(value, list) for value in row.values()) else "5 + 5"
    assert [prompt.text for prompt in found] == [text, None]  # with tools or an environment a completion is no text


def test_arguments_of_the_template_are_in_what_is_asked(tmp_path):
    reader = tokenizers.from_pretrained(hub.resolve("ftlib:demo/model"))
    reader.chat_template = "{{ 'Briefly. ' if brief }}" + reader.chat_template
    cfg = Prompts(sources=(Source(path=write(tmp_path, {"prompt": "5 + 5"})),), template_args={"brief": True})
    plain = load(cfg, reader, 10, seed=0).train
    reader.set_template_args(cfg.template_args)
    brief = load(cfg, reader, 10, seed=0).train
    assert brief.sources[0][0].ids == [*reader.encode("Briefly. "), *plain.sources[0][0].ids]
    assert brief.fingerprint != plain.fingerprint


def test_system_message_and_what_does_not_fit(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "5"}, {"prompt": "5 " * 60})
    sets = load(Prompts(sources=(Source(path=path),), seq_len=64, system="Be brief."), tokenizer, 10, seed=0)
    assert [p.messages[0]["content"] for p in sets.train.sources[0]] == ["Be brief."]
    assert "1 dropped" in sets.report[1]
    with pytest.raises(UserError, match=r"leaves 63 of data\.seq_len=64"):
        load(Prompts(sources=(Source(path=path),), seq_len=64), tokenizer, 63, seed=0)
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        load(Prompts(sources=(Source(path=write(tmp_path, {"prompt": "a"}, {"prompt": None})),)), tokenizer, 1, seed=0)


def test_order_and_position():
    sources = [[f"a{i}" for i in range(7)], [f"b{i}" for i in range(4)]]
    whole = PromptLoader(Asked(sources, [1.0, 2.0]), 5, seed=3)
    steps = [next(whole) for _ in range(6)]
    epoch = [prompt for step in steps[:3] for prompt in step]  # 7 + 2 x 4 prompts
    assert sorted(epoch)[:7] == sources[0] and epoch.count("b0") == 2
    half = PromptLoader(Asked(sources, [1.0, 2.0]), 5, seed=3)
    for _ in range(4):
        next(half)
    again = PromptLoader(Asked(sources, [1.0, 2.0]), 5, seed=3)
    again.load_state_dict(half.state_dict())
    assert next(again) == steps[4] and steps[0] != steps[3]
    with pytest.raises(UserError, match="no position"):
        again.load_state_dict({"epoch": -1, "next": 0})


def test_preview_shows_prompts_and_their_columns(capsys):
    words = ["recipes/grpo.py", "--config", str(ROOT / "configs/demo_grpo.yaml")]
    assert cli.main(["preview", *words, "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert "none trained; for rewards: {'answer':" in said and "<|im_start|>assistant" in said
    assert cli.main(["prepare", *words]) == 2
    assert "nothing to prepare" in capsys.readouterr().err


def test_reasoning_that_the_template_leaves_out_is_told(tmp_path, tokenizer):
    """Of the turns that are shown: what an answer behind them thinks is no part of the prompt."""
    thought = {"role": "assistant", "content": "10", "reasoning_content": "five twice"}
    asked, more = ({"role": "user", "content": text} for text in ("5 + 5", "6 + 6"))
    path = write(tmp_path, {"messages": [asked, thought, more]}, {"messages": [asked, thought]}, {"messages": [asked]})
    sets = load(Prompts(sources=(Source(path=path),), seq_len=64), tokenizer, 10, seed=0)
    (told,) = (line for line in sets.report if "the reasoning of" in line)
    assert "the reasoning of 1 message is not in what the template renders" in told and "data.template" in told
