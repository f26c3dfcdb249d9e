"""What ships for the demos: made by our own tools, the same every time, and fit for the tasks that use it."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import transformers

from ftlib import build, config, plugins, tokenizers
from ftlib.tokenizers import render_chat_template

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "ftlib" / "assets" / "demo"
HELD_OUT = range(50, 90)  # sums of two of these are for reinforcement learning only
SAMPLES = (
    "Order: Mia, 3 pens and 14 cups",
    '{"name": "Mia", "total": 17}',
    "  two  spaces,\ttabs\r\n\r\nand lines  \n",
    "Grüße, 東京! 🙂 don't",
    "<|im_start|>user\n12345<|im_end|>\n",
    "<tool_call>{}</tool_call><|pad|>",
    "x<|im_",
)
CALL = {"type": "function", "function": {"name": "calculator", "arguments": {"sum": "3 + 4"}}}
TALK = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Use the calculator: 3 + 4"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "It is 7."},
]
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object", "properties": {}}}}


def rows(name: str) -> list[dict]:
    path = DEMO / "data" / name
    text = gzip.decompress(path.read_bytes()).decode() if name.endswith(".gz") else path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def prompts(name: str) -> list[str]:
    return [(row.get("prompt") or row["messages"])[0]["content"] for row in rows(name)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "tools" / "demo" / "make_assets.py"), "--out", str(out)]
    subprocess.run(command, check=True, cwd=out, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return out


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.mark.slow
def test_made_again_it_is_the_same(made):
    """Last result (2026-11-23): passed."""
    for path in sorted(made.rglob("*")):
        shipped = DEMO / path.relative_to(made)
        if path.suffix == ".gz":  # a zlib of another make may pack the same text into other bytes
            assert gzip.decompress(path.read_bytes()) == gzip.decompress(shipped.read_bytes()), path.name
        elif path.name == "tokenizer.json":  # another release of `tokenizers` may add a key
            new, old = (json.loads(file.read_text(encoding="utf-8")) for file in (path, shipped))
            assert new["model"]["vocab"] == old["model"]["vocab"] and new["model"]["merges"] == old["model"]["merges"]
            assert [token["content"] for token in new["added_tokens"]] == [t["content"] for t in old["added_tokens"]]
        elif path.is_file():
            assert path.read_bytes() == shipped.read_bytes(), path.name
    assert {path.name for path in (made / "data").iterdir()} == {path.name for path in (DEMO / "data").iterdir()}


@pytest.mark.slow
def test_weights_trained_twice_are_the_same(tmp_path):
    """Three steps of the run that made the shipped ones. Last result (2026-11-22): passed."""
    tool = plugins.load_file(ROOT / "tools" / "demo" / "make_assets.py")
    made = []
    for name in ("one", "two"):
        out = shutil.copytree(DEMO, tmp_path / name)
        shipped = (out / "model" / "model.safetensors").read_bytes()
        tool.train_model(out, tmp_path / f"work_{name}", 3)
        made.append((out / "model" / "model.safetensors").read_bytes())
    assert made[0] == made[1] != shipped and len(made[0]) == len(shipped)


def test_it_is_small():
    sizes = {path: path.stat().st_size for path in DEMO.rglob("*") if path.is_file()}
    assert sum(size for path, size in sizes.items() if path.parent.name == "data") <= 2_000_000
    assert sum(size for path, size in sizes.items() if path.parent.name == "model") <= 8_000_000


def test_text_never_has_a_held_out_sum():
    sums = 0
    for row in rows("pretrain_chat.jsonl.gz"):
        for question, answer in zip(row["messages"], row["messages"][1:], strict=False):
            if question["role"] != "user":
                continue
            numbers = [int(number) for number in re.findall(r"\d+", question["content"])]
            said = re.findall(r"\d+", str(answer.get("tool_calls") or answer["content"]))
            if len(numbers) == 2 and (str(sum(numbers)) in said or "+" in question["content"]):
                sums += 1
                assert not (numbers[0] in HELD_OUT and numbers[1] in HELD_OUT), question
    assert sums > 20_000


def test_lora_task_is_new_and_cannot_be_guessed():
    train, held_out = prompts("lora_train.jsonl"), prompts("lora_eval.jsonl")
    text = {m["content"] for row in rows("pretrain_chat.jsonl.gz") for m in row["messages"] if m["role"] == "user"}
    assert len(held_out) == 200 == len(set(held_out))
    assert not set(held_out) & (set(train) | text) and not set(train) & text
    answers = Counter(row["messages"][-1]["content"] for row in rows("lora_train.jsonl"))
    assert answers.most_common(1)[0][1] <= 0.01 * len(train)  # what a model that ignores the prompt can get
    for row in rows("lora_train.jsonl") + rows("lora_eval.jsonl"):
        question, answer = row["messages"][0]["content"], json.loads(row["messages"][1]["content"])
        assert answer["name"] in question
        assert answer["total"] == sum(int(number) for number in re.findall(r"\d+", question))


def test_preference_pairs_differ_and_are_held_out():
    assert not set(prompts("dpo_train.jsonl")) & set(prompts("dpo_eval.jsonl"))
    for row in rows("dpo_train.jsonl") + rows("dpo_eval.jsonl"):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen != rejected and len(chosen) < len(rejected)
        assert [turn["role"] for turn in row["prompt"] + row["chosen"]] == ["user", "assistant"]


def test_reinforcement_prompts_lie_in_the_held_out_range():
    assert {int(n) for text in prompts("rl_train.jsonl") for n in text.split(" + ")} == {*range(50, 60), *range(70, 90)}
    assert all(any(60 <= int(n) < 70 for n in text.split(" + ")) for text in prompts("rl_eval.jsonl"))
    for row in rows("rl_train.jsonl") + rows("rl_eval.jsonl"):
        a, b = map(int, row["prompt"][0]["content"].split(" + "))
        assert a in HELD_OUT and b in HELD_OUT and row["answer"] == str(a + b)


@pytest.mark.parametrize("text", SAMPLES)
def test_tokenizer_equals_transformers_and_loses_nothing(tokenizer, theirs, text):
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert max(ids) < 512


def test_tokenizer_is_what_the_model_and_the_tasks_need(tokenizer, theirs):
    assert tokenizer.vocab_size == 512 == len(theirs)
    assert len(tokenizer.encode("0123456789")) == 10
    special = tokenizer.special_tokens
    assert tokenizer.eos_id == special["<|im_end|>"] == theirs.eos_token_id
    assert tokenizer.pad_id == special["<|pad|>"] == theirs.pad_token_id
    assert {special["<|im_end|>"], special["<|endoftext|>"]} <= tokenizer.stop_ids
    assert all(len(tokenizer.encode(role)) == 1 for role in ("system", "user", "assistant", "<tool_call>"))


@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("prompt", [False, True])
def test_template_renders_as_transformers_does(tokenizer, theirs, tools, prompt):
    talk = TALK[:2] if prompt else TALK
    want = theirs.apply_chat_template(talk, tools=tools, add_generation_prompt=prompt, tokenize=False)
    assert tokenizer.apply_chat_template(talk, tools=tools, add_generation_prompt=prompt, tokenize=False) == want
    assert want.startswith("<|im_start|>system\nYou are a helpful assistant.")


def test_template_trains_answers_with_their_terminator(tokenizer):
    rendered = tokenizer.render_with_spans(TALK, tools=[TOOL])
    assert [rendered.text[span.start : span.end] for span in rendered.spans] == [
        '<tool_call>{"name": "calculator", "arguments": {"sum": "3 + 4"}}</tool_call><|im_end|>',
        "It is 7.<|im_end|>",
    ]


def test_template_takes_parts_and_refuses_unknown_roles(tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]}]
    assert render_chat_template(tokenizer.chat_template, parts) == "<|im_start|>user\nab<|im_end|>\n"
    with pytest.raises(Exception, match="unknown role: robot"):
        render_chat_template(tokenizer.chat_template, [{"role": "robot", "content": ""}])


def test_config_is_a_small_llama():
    config = transformers.AutoConfig.from_pretrained(DEMO / "model")
    assert config.model_type == "llama" and config.vocab_size == 512 and config.tie_word_embeddings
    assert all(n % 256 == 0 for n in (config.vocab_size, config.hidden_size, config.intermediate_size))
    assert config.num_key_value_heads >= 4
    assert transformers.LlamaForCausalLM(config).num_parameters() < 3_000_000


@pytest.mark.parametrize("name", ["lora", "full", "pretrain", "dpo", "reward", "quantize"])
def test_nothing_that_a_demo_holds_out_is_trained_on(name):
    recipe = {"lora": "lora_sft", "full": "full_sft"}.get(name, name)
    words = ["--config", str(ROOT / "configs" / f"demo_{name}.yaml")]
    cfg = config.load(plugins.load_file(ROOT / "recipes" / f"{recipe}.py").Config, words)
    rows = build.datasets(cfg, build.tokenizer(cfg))
    train, held_out = (getattr(x, "documents", x) for x in (rows.train, next(iter(rows.eval.values()))))
    assert not set(train.hashes.tolist()) & set(held_out.hashes.tolist())
    assert not any("repeats: data.deduplicate" in line for line in rows.report.lines())
