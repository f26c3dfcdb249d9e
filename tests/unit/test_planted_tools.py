"""What the tools for tokenizers and for Spectrum write down, fact by fact."""

import json

import pytest
import torch
from tiny_model import ROOT

from ftlib import plugins

trainer = plugins.load_file(ROOT / "tools" / "train_tokenizer.py")
spectrum = plugins.load_file(ROOT / "tools" / "spectrum.py")
TALK = [{"role": "user", "content": "the quick fox?"}, {"role": "assistant", "content": "again and again"}]
TOOLS = "{% if tools %}{{ tools[0].function.name }}: {% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"


def test_nothing_is_merged_across_a_visible_token_or_between_digits():
    """Though both are more frequent than the one pair that is left."""
    made = trainer.train(["<call><call>ab 1234 1234" * 500] * 9, 259, ["<x>"], ["<call>"])
    assert [token for token in made.get_vocab() if len(token) > 1 and token not in ("<x>", "<call>")] == ["ab"]
    assert made.encode("1234").tokens == ["1", "2", "3", "4"]


def test_who_generates_is_told_where_to_stop_and_how_long_texts_are(tmp_path):
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": TALK}) + "\n") * 20)
    words = [str(tmp_path / "out"), str(tmp_path / "a.jsonl"), "--template", "chatml", "--vocab-size", "270"]
    assert trainer.main([*words, "--max-length", "4096"]) == 0
    read = lambda name: json.loads((tmp_path / "out" / name).read_text())  # noqa: E731
    ids = {token["content"]: token["id"] for token in read("tokenizer.json")["added_tokens"]}
    generation = read("generation_config.json")
    assert generation["eos_token_id"] == [ids["<|endoftext|>"], ids["<|im_end|>"]]
    assert generation["pad_token_id"] == ids["<|pad|>"]
    assert read("tokenizer_config.json")["model_max_length"] == 4096


def test_tools_of_a_conversation_are_text_to_learn_from(tmp_path):
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK, "tools": tools}) + "\n")
    assert list(trainer.documents([tmp_path / "a.jsonl"], TOOLS)) == ["look_up: the quick fox?again and again"]


@pytest.mark.parametrize("rows,columns", [(40, 10), (10, 40), (16, 16), (200, 8)])
def test_the_bound_of_noise_is_that_of_the_matrix_s_shape(rows, columns):
    """Marchenko and Pastur: sigma (1 + sqrt(beta)), beta the shorter side over the longer one."""
    values = torch.linspace(0.1, 4.0, 60, dtype=torch.float64) ** 2
    low, high = (values.quantile(q).item() for q in (0.25, 0.75))
    bound = (high - low) / 1.349 * (1 + (min(rows, columns) / max(rows, columns)) ** 0.5)
    signal = sum(v for v in values.tolist() if v > bound)
    noise = sum(v for v in values.tolist() if v <= bound)
    assert spectrum.signal_to_noise(values, rows, columns) == pytest.approx(signal / noise / 16.0, rel=1e-9)


def test_a_share_of_the_layers_is_rounded_to_the_nearest_number():
    found = {"mlp.up_proj": {layer: float(layer) for layer in range(7)}}
    for share, layers in {0.01: "6", 0.25: "5|6", 0.4: "4|5|6", 1.0: "0|1|2|3|4|5|6"}.items():
        assert spectrum.patterns(found, share) == [rf"layers\.({layers})\.mlp\.up_proj\."]
