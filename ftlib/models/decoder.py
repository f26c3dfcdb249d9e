"""One decoder for every family: embed, blocks, norm. What differs between families is data in `Arch`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftlib.layers.attention import Attention, AttentionLayout
from ftlib.layers.batch import Batch
from ftlib.layers.mlp import feed_forward
from ftlib.layers.moe import Moe, MoeMlp
from ftlib.layers.norms import RMSNorm
from ftlib.layers.rope import Rope, Turns
from ftlib.models.arch import Arch, Layer, NormSlot
from ftlib.models.shards import fill


class Block(nn.Module):
    """One layer, for all families: the mixer and the feed-forward part, each with the norms its slots ask for.

    `recompute`: keep only the block's input for backward and run `compute` again there.
    `routes`: of a mixture of experts; in passes with gradients the router's logits [B * T, E] come out beside x.
    """

    recompute = False
    routes = False

    def __init__(self, arch: Arch, layer: Layer, index: int) -> None:
        super().__init__()

        def norm(slot: NormSlot) -> nn.Module:
            if slot not in layer.norms:
                return nn.Identity()
            return RMSNorm(arch.dim, arch.norm_eps, arch.zero_centered_norms)

        self.attn_pre, self.attn_post = norm("attn_pre"), norm("attn_post")
        self.mlp_pre, self.mlp_post = norm("mlp_pre"), norm("mlp_post")
        self.self_attn = Attention(layer.mixer, arch.dim, arch.norm_eps, index, arch.zero_centered_norms)
        self.mlp = (MoeMlp if isinstance(layer.ffn, Moe) else feed_forward)(layer.ffn, arch.dim)
        self.scale = layer.residual_scale

    def forward(self, x: Tensor, rope: Turns | None, layout: AttentionLayout) -> Tensor | tuple[Tensor, Tensor]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, rope, layout, use_reentrant=False)
        return self.compute(x, rope, layout)

    def compute(self, x: Tensor, rope: Turns | None, layout: AttentionLayout) -> Tensor | tuple[Tensor, Tensor]:
        x = x + self.scaled(self.attn_post(self.self_attn(self.attn_pre(x), rope, layout)))
        if self.routes and torch.is_grad_enabled():
            y, logits = self.mlp.routed(self.mlp_pre(x))
            return x + self.scaled(self.mlp_post(y)), logits
        return x + self.scaled(self.mlp_post(self.mlp(self.mlp_pre(x))))

    def scaled(self, branch: Tensor) -> Tensor:
        return branch if self.scale == 1.0 else branch * self.scale


class Decoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.arch = arch
        self.embed_tokens = nn.Embedding(arch.vocab, arch.dim)
        self.layers = nn.ModuleList(Block(arch, layer, i) for i, layer in enumerate(arch.layers))
        self.norm = RMSNorm(arch.dim, arch.norm_eps, arch.zero_centered_norms)
        self.use_attention("sdpa")
        self.saving: Callable[[], AbstractContextManager] = nullcontext  # where blocks keep what backward needs
        self.parked = len(self.layers)  # blocks that do so, from the first
        self.routed: list[Tensor] = []  # logits of the last pass, of each block that `routes`

    def use_attention(self, backend: str) -> None:
        """Set the attention backend of every layer (a name from `ftlib.layers.attention.choose_backend`).

        A model that caps scores softly takes `reference` where the one asked for cannot.
        """
        self.backend = "reference" if self.arch.softcap and backend not in ("flex", "flash4") else backend
        for block in self.layers:
            block.self_attn.backend = self.backend

    def embed(self, batch: Batch) -> Tensor:
        """[B, T, D] embeddings of `batch.input_ids`."""
        x = self.embed_tokens(batch.input_ids)
        # Rounded to the embedding's dtype first, as Gemma was trained.
        return x if self.arch.embed_scale == 1.0 else x * torch.tensor(self.arch.embed_scale, dtype=x.dtype)

    def body(self, embeds: Tensor, batch: Batch) -> Tensor:
        """Blocks and the last norm over embeddings [B, T, D]."""
        mixers = [layer.mixer for layer in self.arch.layers]
        ropes: set[Rope] = {mixer.rope for mixer in mixers if mixer.rope is not None}
        lengths = batch.layout.lengths if any(rope.needs_lengths for rope in ropes) else None
        tables = {rope: rope.table(batch.position_ids, lengths) for rope in ropes}
        batch.layout.prepare(self.backend, {mixer.window for mixer in mixers})
        return self.blocks(embeds, tables, batch.layout)

    def blocks(self, x: Tensor, tables: dict[Rope, Turns], layout: AttentionLayout) -> Tensor:
        """The same where everything that is the batch's own has been made."""
        self.routed = []
        for i, (block, layer) in enumerate(zip(self.layers, self.arch.layers, strict=True)):
            with self.saving() if i < self.parked else nullcontext():
                x = block(x, tables.get(layer.mixer.rope), layout)
            if isinstance(x, tuple):
                x, logits = x
                self.routed.append(logits)
        return self.norm(x)

    def forward(self, batch: Batch, embeds: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D]; `embeds` replaces the embedding lookup when given."""
        return self.body(self.embed(batch) if embeds is None else embeds, batch)

    @torch.no_grad()
    def init_weights(self, seed: int, std: float = 0.02, scaled: bool = True) -> None:
        """Fresh weights: N(0, std), output projections over sqrt(2 * layers) (GPT-2) if `scaled`, norms neutral,
        biases 0. The head is not the decoder's: see ftlib.models.initial."""
        generator = torch.Generator(device=self.embed_tokens.weight.device).manual_seed(seed)
        init_parameters(self, self.arch, generator, std, (2 * len(self.layers)) ** -0.5 if scaled else 1.0)


def init_parameters(
    module: nn.Module, arch: Arch, generator: torch.Generator, std: float, residual: float = 1.0
) -> None:
    """Fresh weights of blocks, norms and what goes with them, in the order of their names: N(0, std), of output
    projections N(0, std * residual), norms neutral, biases 0. Called without gradients."""
    for name, parameter in module.named_parameters():
        if name.endswith(("bias", "sinks")):
            parameter.zero_()
        elif name.endswith("ssmax"):
            parameter.fill_(arch.ssmax)
        elif parameter.ndim == 1:
            parameter.fill_(0.0 if arch.zero_centered_norms else 1.0)
        else:
            scale = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            # Drawn whole, whatever part is kept: the same weights on every mesh.
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=generator.device)
            fill(parameter, whole.normal_(0.0, std * scale, generator=generator))
    level_experts(module)


def level_experts(module: nn.Module) -> None:
    """No expert is preferred to another: corrections of their scores (ftlib.layers.moe) are 0."""
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
