"""torchtune 0.6.1: its own Llama-3.1-8B with adapters, compiled layers and chunked loss, in its recipe's step."""

from importlib.metadata import version

import common
import torch
from torchtune import modules, training
from torchtune.models.llama3_1 import lora_llama3_1_8b
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj", "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj", "mlp.w3": "mlp.up_proj", "mlp.w2": "mlp.down_proj", "sa_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}  # fmt: skip


def hugging_face_name(name: str) -> str:
    """torchtune's parameter in a Hugging Face checkpoint."""
    module, _, _ = name.rpartition(".")
    factor = ""
    for which in ("lora_a", "lora_b"):
        if module.endswith(which):
            module, factor = module.removesuffix(f".{which}"), which
    if module.startswith("layers."):
        _, layer, rest = module.split(".", 2)
        module = f"model.layers.{layer}.{NAMES[rest]}"
    else:
        module = NAMES[module]
    return f"{module}.lora_{factor[-1].upper()}" if factor else f"{module}.weight"


def interleaved(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order of torchtune's rotary embedding (pairs, not halves)."""
    out = value.shape[0]
    return value.view(heads, 2, out // heads // 2, -1).transpose(1, 2).reshape(value.shape)


def main() -> None:
    work = common.job()
    config = common.config_of(work["shape"])
    assert work["shape"] == "llama-3.1-8b" and work["method"] == "lora", "what torchtune 0.6.1 builds of our work"
    targets = ["q_proj", "k_proj", "v_proj", "output_proj"]
    assert work.get("quantize") in (None, "nf4"), "what torchtune calls quantize_base is NF4"
    options = {"lora_rank": work["rank"], "lora_alpha": 2 * work["rank"], "quantize_base": bool(work.get("quantize"))}
    with training.set_default_dtype(torch.bfloat16), torch.device("cuda"):
        model = lora_llama3_1_8b(targets, apply_lora_to_mlp=True, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            hf = hugging_face_name(name)
            if hf.endswith("lora_B"):
                parameter.zero_()
                continue
            value = common.weight(hf, parameter.shape)
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(hf.split(".")[-2])
            parameter.copy_(interleaved(value, config[heads]) if heads and not hf.endswith("lora_A") else value)
    set_trainable_params(model, get_adapter_params(model))
    if work["recompute"] in common.RECOMPUTED:
        training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    training.compile_model(model, verbose=False)
    loss_fn = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_fn.num_output_chunks)
    training.compile_loss(loss_fn, verbose=False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)

    def step(ids: torch.Tensor) -> tuple[float, float]:
        loss = loss_fn(model(tokens=ids), common.shifted(ids))
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainable])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    common.measure("torchtune", work, step, {"torchtune": version("torchtune"), "torchao": version("torchao")})


if __name__ == "__main__":
    main()
