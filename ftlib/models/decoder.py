"""One decoder for every family: embed, blocks, norm. What differs between families is data in `Arch`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftlib.layers.attention import Attention, AttentionLayout
from ftlib.layers.batch import Batch
from ftlib.layers.mlp import GatedMlp
from ftlib.layers.norms import RMSNorm
from ftlib.layers.rope import Rope
from ftlib.models.arch import Arch, Layer, NormSlot


class Block(nn.Module):
    """One layer, for all families: the mixer and the feed-forward part, each with the norms its slots ask for.

    `recompute`: keep only the block's input for backward and run `compute` again there.
    """

    recompute = False

    def __init__(self, arch: Arch, layer: Layer, index: int) -> None:
        super().__init__()

        def norm(slot: NormSlot) -> nn.Module:
            return RMSNorm(arch.dim, arch.norm_eps) if slot in layer.norms else nn.Identity()

        self.attn_pre, self.attn_post = norm("attn_pre"), norm("attn_post")
        self.mlp_pre, self.mlp_post = norm("mlp_pre"), norm("mlp_post")
        self.self_attn = Attention(layer.mixer, arch.dim, arch.norm_eps, index)
        self.mlp = GatedMlp(layer.ffn, arch.dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, layout: AttentionLayout) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, rope, layout, use_reentrant=False)
        return self.compute(x, rope, layout)

    def compute(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, layout: AttentionLayout) -> Tensor:
        x = x + self.attn_post(self.self_attn(self.attn_pre(x), rope, layout))
        return x + self.mlp_post(self.mlp(self.mlp_pre(x)))


class Decoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.arch = arch
        self.embed_tokens = nn.Embedding(arch.vocab, arch.dim)
        self.layers = nn.ModuleList(Block(arch, layer, i) for i, layer in enumerate(arch.layers))
        self.norm = RMSNorm(arch.dim, arch.norm_eps)
        self.backend = "sdpa"
        self.saving: Callable[[], AbstractContextManager] = nullcontext  # what blocks keep for backward, and where

    def use_attention(self, backend: str) -> None:
        """Set the attention backend of every layer (a name from `ftlib.layers.attention.choose_backend`)."""
        self.backend = backend
        for block in self.layers:
            block.self_attn.backend = backend

    def embed(self, batch: Batch) -> Tensor:
        """[B, T, D] embeddings of `batch.input_ids`."""
        return self.embed_tokens(batch.input_ids)

    def body(self, embeds: Tensor, batch: Batch) -> Tensor:
        """Blocks and the last norm over embeddings [B, T, D]."""
        mixers = [layer.mixer for layer in self.arch.layers]
        ropes: set[Rope] = {mixer.rope for mixer in mixers if mixer.rope is not None}
        tables = {rope: rope.table(batch.position_ids) for rope in ropes}
        batch.layout.prepare(self.backend, {mixer.window for mixer in mixers})
        x = embeds
        with self.saving():
            for block, mixer in zip(self.layers, mixers, strict=True):
                x = block(x, tables.get(mixer.rope), batch.layout)
        return self.norm(x)

    def forward(self, batch: Batch, embeds: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D]; `embeds` replaces the embedding lookup when given."""
        return self.body(self.embed(batch) if embeds is None else embeds, batch)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fresh weights: N(0, 0.02), output projections scaled down by sqrt(2 * layers) (GPT-2), norms 1, biases 0."""
        generator = torch.Generator(device=self.embed_tokens.weight.device).manual_seed(seed)
        residual = (2 * len(self.layers)) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = 0.02 * (residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
                parameter.normal_(0.0, std, generator=generator)
