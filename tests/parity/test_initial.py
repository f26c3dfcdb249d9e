"""Fresh weights spread as transformers spreads each family's; any family in sizes of one's own."""

import json

import pytest
import torch
from parity.shrink import CONFIGS, published, shrunk
from tiny_model import steps, train

from ftlib.errors import UserError
from ftlib.layers.moe import Moe
from ftlib.models import families, initial, save
from ftlib.models.language_model import LanguageModel
from ftlib.models.sizes import note, resized, write
from ftlib.sections.sizes import Sizes

ONE_OF_EACH = (
    "gemma-2-2b", "gemma-3-1b", "glm-4-9b", "gpt-oss-20b", "granite-3.3-8b", "llama-3.1-8b", "mistral-7b-v0.3",
    "mixtral-8x7b", "olmo-2-1b", "olmo-3-7b", "phi-4-mini", "qwen2.5-0.5b", "qwen3-0.6b", "qwen3-30b-a3b", "smollm3-3b",
    "seed-oss-36b", "ernie-4.5-0.3b", "hunyuan-1.8b", "exaone-4.0-1.2b", "afm-4.5b",
    "glm-4.5-air", "qwen1.5-moe-a2.7b", "olmoe-1b-7b",
)  # fmt: skip


def theirs(config):
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    made = AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(fields)))
    return AutoModelForCausalLM.from_config(made, dtype=torch.float32)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_spread_of_every_parameter_is_the_familys(name):
    config = shrunk(name) | {"initializer_range": 0.03}
    arch, table = families.read(config)
    model = LanguageModel(arch, table, config)
    initial.init_weights(model, 0, scaled=False)
    mine = dict(save.hf_tensors(model))
    wanted = {k: v for k, v in theirs(config).state_dict().items() if k in mine}
    assert len(wanted) > 0.1 * len(mine)
    for key, tensor in wanted.items():
        ours = mine[key].float()
        if tensor.numel() >= 1000:
            assert ours.std() == pytest.approx(tensor.float().std().item(), rel=0.1), key
        if not key.endswith(("sinks", "router.bias")):  # theirs are drawn, ours begin at 0
            bound = 0.005 + 5 * 0.03 * (2 / tensor.numel()) ** 0.5  # theirs are drawn anew each time
            assert abs(ours.mean() - tensor.float().mean()) < bound, key


def test_scaled_matrices_write_less_to_the_residual_stream_and_heads_are_drawn():
    config = shrunk("qwen2.5-7b") | {"tie_word_embeddings": False}
    arch, table = families.read(config)
    model = LanguageModel(arch, table, config)
    torch.nn.init.constant_(model.lm_head.weight, 7.0)
    initial.init_weights(model, 0, std=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(0.05, rel=0.05)
    layers = len(model.model.layers)
    written = torch.cat([block.mlp.down_proj.weight.flatten() for block in model.model.layers])
    assert written.std().item() == pytest.approx(0.05 / (2 * layers) ** 0.5, rel=0.05)
    again = LanguageModel(arch, table, config)
    initial.init_weights(again, 0, std=0.05)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.json"))])
def test_every_published_shape_in_a_small_size(name, tmp_path):
    config = published(name)
    if "text_config" in config:
        pytest.skip("a language model inside another")
    if any("short_factor" in (config.get(key) or {}) for key in ("rope_scaling", "rope_parameters")):
        pytest.skip("its rope is made for one width")
    (tmp_path / "config.json").write_text(json.dumps(config))
    mixture = {"experts": 8, "experts_per_token": 3} if config.get("num_experts_per_tok") else {}
    sizes = Sizes(layers=5, dim=256, vocab=512, **mixture)
    folder = write(tmp_path, tmp_path / "out", sizes)
    new = json.loads((folder / "config.json").read_text())
    arch, table = families.read(new)
    with torch.device("meta"):
        model = LanguageModel(arch, table, new)
    assert (arch.dim, arch.vocab, len(arch.layers)) == (256, 512, 5)
    assert model.lm_head.weight.shape == (512, 256)
    assert not mixture or {layer.ffn.top_k for layer in arch.layers if isinstance(layer.ffn, Moe)} == {3}
    assert resized(new, sizes) == new, "again changes nothing"
    with torch.device("meta"):
        assert sum(p.numel() for p in theirs(new).parameters()) == sum(p.numel() for p in model.parameters())


def test_sizes_that_do_not_fit_are_named():
    config = published("qwen3-0.6b")
    with pytest.raises(UserError, match="no multiple"):
        resized(config, Sizes(heads=6, kv_heads=4))
    with pytest.raises(UserError, match="no multiple"):
        resized(published("llama-2-7b"), Sizes(dim=250, heads=4))
    with pytest.raises(UserError, match="go to 8 experts, and there are 4") as caught:
        resized(published("qwen3-30b-a3b"), Sizes(experts=4))
    assert "sizes.experts_per_token=4" in caught.value.fix
    with pytest.raises(UserError, match="has no experts"):
        resized(config, Sizes(experts=4))
    with pytest.raises(ValueError, match="must be even"):
        Sizes(head_dim=15)


@pytest.mark.parametrize("name", ["qwen3-0.6b", "llama-2-7b", "phi-4", "gemma-3-1b"])
def test_heads_have_the_size_that_is_set_and_else_it_is_told(name):
    config, small = published(name), {"layers": 2, "dim": 64, "heads": 4, "kv_heads": 2, "hidden": 64, "vocab": 128}
    new = resized(config, sizes := Sizes(head_dim=32, **small))
    arch, table = families.read(new)
    assert arch.head_dims == {32} and resized(new, sizes) == new and not note(config, sizes)
    with torch.device("meta"):
        mine = LanguageModel(arch, table, new)
        assert sum(p.numel() for p in theirs(new).parameters()) == sum(p.numel() for p in mine.parameters())
    kept = config.get("head_dim") or 0
    follows = kept * config["num_attention_heads"] in (0, config["hidden_size"])
    assert bool(note(config, Sizes(**small))) != follows and not note(config, Sizes(layers=1))
    if not follows:
        assert f"{kept} channels: 4 of them, and dim is 64" in note(config, Sizes(**small))[0]


def test_a_run_in_other_sizes(tmp_path):
    from tiny_model import write_config, write_model, write_rows

    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 40)
    sizes = {"layers": 2, "dim": 96, "heads": 4, "vocab": 320}
    file = write_config(tmp_path / "c.yaml", model, rows, steps=6, sizes=sizes)
    found = train("pretrain", "--config", file)
    assert steps(found)[-1] < steps(found)[0]
    final = json.loads((tmp_path / "out" / "final" / "config.json").read_text())
    assert (final["num_hidden_layers"], final["hidden_size"], final["vocab_size"]) == (2, 96, 320)
    with pytest.raises(UserError, match="weights have the sizes and the attention they have"):
        train("pretrain", "--config", file, "from_scratch=false")
