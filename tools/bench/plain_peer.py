"""Plain PyTorch: a Qwen3 decoder as one would write it in an evening, compiled whole, with torch's fused AdamW."""

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        self.head = c["head_dim"]
        width, eps = c["hidden_size"], c["rms_norm_eps"]
        self.q_proj = nn.Linear(width, c["num_attention_heads"] * self.head, bias=False)
        self.k_proj = nn.Linear(width, c["num_key_value_heads"] * self.head, bias=False)
        self.v_proj = nn.Linear(width, c["num_key_value_heads"] * self.head, bias=False)
        self.o_proj = nn.Linear(c["num_attention_heads"] * self.head, width, bias=False)
        self.q_norm, self.k_norm = Norm(self.head, eps), Norm(self.head, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (p(x).view(rows, length, -1, self.head) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = turn(self.q_norm(q), cos, sin), turn(self.k_norm(k), cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of halves; cos and sin [T, 1, D / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Block(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        width, hidden, eps = c["hidden_size"], c["intermediate_size"], c["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = Norm(width, eps), Norm(width, eps)
        self.self_attn = Attention(c)
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(width, hidden, bias=False), "up_proj": nn.Linear(width, hidden, bias=False),
            "down_proj": nn.Linear(hidden, width, bias=False),
        })  # fmt: skip

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


class Plain(nn.Module):
    """The mean loss of ids and labels [B, T]; the head is the embedding."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.norm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self.rope = (c["rope_theta"], c["head_dim"])

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        theta, width = self.rope
        speed = theta ** (-torch.arange(0, width, 2, device=ids.device).float() / width)
        angle = torch.outer(torch.arange(ids.shape[1], device=ids.device).float(), speed)[:, None]
        x = self.embed_tokens(ids)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.layers:
            x = block(x, cos, sin)
        logits = self.norm(x) @ self.embed_tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def main() -> None:
    work = common.job()
    config = common.config_of(work["shape"])
    assert config["model_type"] == "qwen3" and config["tie_word_embeddings"], "written for the tied Qwen3 shapes"
    with common.DEVICE:
        model = Plain(config).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(common.weight(f"model.{name}", parameter.shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    compiled = torch.compile(model)

    def step(ids: Tensor) -> tuple[float, float]:
        loss = compiled(ids, common.shifted(ids))
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    common.measure("plain", work, step, {})


if __name__ == "__main__":
    main()
