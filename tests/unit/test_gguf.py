"""GGUF files against the format's own reader and quantizer, and against the weights they were made from."""

import json
import shutil

import numpy as np
import pytest
import torch
from parity.shrink import reference, shrunk
from safetensors.torch import load_file
from shared_data import shared
from tiny_model import write_model

from ftlib import cli
from ftlib.errors import UserError
from ftlib.export import gguf as ours

gguf = pytest.importorskip("gguf")

FAMILIES = {"llama": "llama-3.2-1b", "mistral": "mistral-7b-v0.3", "qwen2": "qwen2.5-0.5b", "qwen3": "qwen3-0.6b"}
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|x"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One folder a family; their tokenizer splits as Qwen's."""
    folder = tmp_path_factory.mktemp("models")
    for family, name in FAMILIES.items():
        write_model(folder / family, name, hidden_size=64, head_dim=16)
        file = folder / family / "tokenizer.json"
        settings = json.loads(file.read_text())
        byte_level = settings["pre_tokenizer"] | {"use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
        settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
        settings["model"]["vocab"]["ab"] = 256
        for i, token in enumerate(settings["added_tokens"]):
            token["id"], token["special"] = 257 + i, i > 0
        settings["model"]["merges"] = [["a", "b"]]
        file.write_text(json.dumps(settings))
    return folder


def read(file):
    reader = gguf.GGUFReader(file)
    return {t.name: t for t in reader.tensors}, {key: field.contents() for key, field in reader.fields.items()}


def expected_name(family, key):
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, "LLAMA" if family == "mistral" else family.upper()), 8)
    return names.get_name(key, try_suffixes=(".weight", ".bias"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_and_the_metadata(models, tmp_path, family):
    ours.export(models / family, tmp_path / "m.gguf", "f32")
    tensors, fields = read(tmp_path / "m.gguf")
    source = load_file(models / family / "model.safetensors")
    config = json.loads((models / family / "config.json").read_text())
    if config.get("tie_word_embeddings"):
        source.pop("lm_head.weight", None)
    architecture = "llama" if family == "mistral" else family
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for key, tensor in source.items():
        found = tensors.pop(expected_name(family, key))
        wanted = tensor.float().numpy()
        if architecture == "llama" and (count := heads.get(key.split(".")[-2])):  # as llama.cpp's converter turns them
            wanted = wanted.reshape(count, 2, -1, *wanted.shape[1:]).swapaxes(1, 2).reshape(wanted.shape)
        assert np.array_equal(found.data, wanted), key
    assert set(tensors) <= {"rope_freqs.weight"}
    assert ("rope_freqs.weight" in tensors) == (family == "llama")
    assert fields["general.architecture"] == architecture
    wanted = {
        "block_count": config["num_hidden_layers"], "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"], "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"], "context_length": 512, "vocab_size": 260,
        "rope.dimension_count": 16, "attention.key_length": 16, "attention.value_length": 16,
    }  # fmt: skip
    assert {key: fields[f"{architecture}.{key}"] for key in wanted} == wanted
    assert fields[f"{architecture}.attention.layer_norm_rms_epsilon"] == pytest.approx(config["rms_norm_eps"])
    assert fields["general.file_type"] == 0


def test_the_byte_level_tokenizer(models, tmp_path):
    ours.export(models / "qwen3", tmp_path / "m.gguf")
    _, fields = read(tmp_path / "m.gguf")
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    assert (get["model"], get["pre"]) == ("gpt2", "qwen2")
    assert get["merges"] == ["a b"]
    assert get["tokens"][256:] == ["ab", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert get["token_type"][255:] == [1, 1, 4, 3, 3]
    assert (get["eos_token_id"], get["padding_token_id"]) == (259, 257)
    assert get["add_bos_token"] is False
    assert "generation" in fields["tokenizer.chat_template"]


@pytest.mark.parametrize("stored", ["f16", "bf16", "q8_0"])
def test_storage_is_the_reference_s(models, tmp_path, stored):
    ours.export(models / "qwen2", tmp_path / "m.gguf", stored)
    tensors, _ = read(tmp_path / "m.gguf")
    source = load_file(models / "qwen2" / "model.safetensors")
    kind = getattr(gguf.GGMLQuantizationType, stored.upper())
    for key, tensor in source.items():
        found = tensors.get(expected_name("qwen2", key))
        if found is None:
            continue  # the tied head
        wanted = gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else kind
        assert found.tensor_type == wanted
        values = gguf.quants.quantize(tensor.float().numpy(), wanted)
        assert found.data.tobytes() == values.tobytes(), key


def test_llama3_frequency_factors_slow_rope_as_the_model_does(models, tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaConfig

    ours.export(models / "llama", tmp_path / "m.gguf")
    tensors, _ = read(tmp_path / "m.gguf")
    config = LlamaConfig(**json.loads((models / "llama" / "config.json").read_text()))
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    theta = config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / torch.from_numpy(tensors["rope_freqs.weight"].data.copy()), wanted)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def scaled(models, tmp_path, settings):
    """Fields of the qwen3 model with another `rope_parameters`."""
    shutil.copytree(models / "qwen3", tmp_path / "m", dirs_exist_ok=True)
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    theta = config.pop("rope_theta", None) or config["rope_parameters"]["rope_theta"]
    config |= {"rope_parameters": {"rope_theta": theta} | settings, "rope_scaling": None}
    file.write_text(json.dumps(config))
    ours.export(tmp_path / "m", tmp_path / "m.gguf")
    return read(tmp_path / "m.gguf")[1]


@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0}], ids=len)
def test_a_longer_range_by_yarn_is_written_as_llama_cpp_reads_it(models, tmp_path, more):
    """llama.cpp multiplies cos and sin with attn_factor times (1 + 0.1 ln factor)."""
    fields = scaled(models, tmp_path, YARN | more)
    names = gguf.Keys.Rope
    get = lambda key: fields[key.format(arch="qwen3")]  # noqa: E731
    assert get(names.SCALING_TYPE) == gguf.RopeScalingType.YARN.value
    assert (get(names.SCALING_FACTOR), get(names.SCALING_ORIG_CTX_LEN)) == (4, 128)
    gain = more.get("attention_factor", 0.1 * np.log(4) + 1)
    assert get(names.SCALING_ATTN_FACTOR) * (1 + 0.1 * np.log(4)) == pytest.approx(gain)
    betas = (get(names.SCALING_YARN_BETA_FAST), get(names.SCALING_YARN_BETA_SLOW))
    assert betas == (more.get("beta_fast", 32), more.get("beta_slow", 1))
    assert get(gguf.Keys.LLM.CONTEXT_LENGTH) == 512


def test_other_scalings_are_written_or_refused_by_their_key(models, tmp_path):
    fields = scaled(models, tmp_path, {"rope_type": "linear", "factor": 2.0})
    assert (fields["qwen3.rope.scaling.type"], fields["qwen3.rope.scaling.factor"]) == ("linear", 2)
    with pytest.raises(UserError, match=r"rope_scaling of config\.json\n  fix: .*convert_hf_to_gguf\.py /") as caught:
        scaled(models, tmp_path, YARN | {"truncate": False})
    assert "yarn with truncate: false is not exported to GGUF, but linear, yarn" in str(caught.value)


def test_sentencepiece_keeps_scores_and_kinds(tmp_path):
    import sentencepiece

    settings = shrunk("llama-2-7b", vocab_size=32000, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    reference(settings).save_pretrained(tmp_path / "m")
    shutil.copy(shared("tokenizers/llama2/tokenizer.model"), tmp_path / "m")
    ours.export(tmp_path / "m", tmp_path / "m.gguf")
    _, fields = read(tmp_path / "m.gguf")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m" / "tokenizer.model"))
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.tokens"] == [model.id_to_piece(i) for i in range(32000)]
    assert fields["tokenizer.ggml.scores"] == pytest.approx([model.get_score(i) for i in range(32000)])
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is True


def test_the_command_says_what_ollama_is_told(models, tmp_path, capsys):
    assert cli.main(["gguf", str(models / "qwen3"), str(tmp_path / "m.gguf")]) == 0
    said = f"next: echo 'FROM {tmp_path}/m.gguf' > Modelfile && ollama create m -f Modelfile\n"
    assert capsys.readouterr().out.endswith(said)


def test_what_gguf_cannot_say_is_refused(models, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(models / "qwen3", folder)
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "odd"
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="split pattern is not known: 'odd'"):
        ours.export(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*.part"))
    ours.export(folder, tmp_path / "m.gguf", pre="qwen2")


def decoded(llama, file, ids, text):
    """(logits at every place of `ids`, 24 greedy tokens behind them, tokens of `text`) as llama.cpp has them."""
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers, settings.use_extra_bufts = 0, False  # plain CPU kernels
    model = llama.llama_model_load_from_file(str(file).encode(), settings)
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 256
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = options.flash_attn_type = 0  # keys and values in float32
    context = llama.llama_init_from_model(model, options)
    vocab = llama.llama_model_get_vocab(model)
    size = llama.llama_vocab_n_tokens(vocab)

    def step(tokens, start):
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama.llama_decode(context, batch) == 0
        rows = [llama.llama_get_logits_ith(context, i) for i in range(len(tokens))]
        rows = np.stack([np.ctypeslib.as_array(row, (size,)).copy() for row in rows])
        llama.llama_batch_free(batch)
        return rows

    logits, said = step(ids, 0), []
    last = logits[-1]
    for i in range(24):
        said.append(int(last.argmax()))
        last = step(said[-1:], len(ids) + i)[0]
    buffer, raw = (llama.llama_token * 256)(), text.encode()
    count = llama.llama_tokenize(vocab, raw, len(raw), buffer, 256, True, True)
    llama.llama_free(context), llama.llama_model_free(model)
    return logits, said, list(buffer[:count])


@pytest.mark.slow
@pytest.mark.parametrize("stored", [("f32", 1e-5), ("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 1e-1)], ids=lambda s: s[0])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_says_what_the_model_says(models, tmp_path, family, stored):
    """Needs the package llama-cpp-python. It rounds activations as well: only float32 is close."""
    llama = pytest.importorskip("llama_cpp")
    from ftlib import models as library
    from ftlib import tokenizers
    from ftlib.generation import ReferenceEngine, SamplingParams

    kind, tolerance = stored
    ours.export(models / family, tmp_path / "m.gguf", kind)
    model, tokenizer = library.from_pretrained(models / family), tokenizers.from_pretrained(models / family)
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(1))
    text = "abc red 12\nblue<|im_end|> xx ab"
    logits, said, tokens = decoded(llama, tmp_path / "m.gguf", ids[0].tolist(), text)
    with torch.no_grad():
        mine = model.logits(ids)[0].numpy()
    assert np.abs(logits - mine).max() <= tolerance * np.abs(mine).max()
    assert tokens == tokenizer.encode(text)
    if kind in ("f32", "f16"):
        greedy = ReferenceEngine(model).generate([ids[0].tolist()], SamplingParams(24, temperature=0))
        assert said == list(greedy[0][0].token_ids)
