"""Modules beside the decoder that predict tokens further ahead, as DeepSeek-V3 trains them (arXiv 2412.19437, section
2.2). A checkpoint keeps them in a folder of their own: the model beside it is the one it would be without them."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ftlib.errors import UserError
from ftlib.layers.batch import Batch, Layout
from ftlib.layers.linear import Linear
from ftlib.layers.norms import RMSNorm
from ftlib.models.arch import Arch
from ftlib.models.decoder import init_parameters, level_experts
from ftlib.models.initial import STD
from ftlib.models.language_model import LanguageModel
from ftlib.models.shards import local_index, whole
from ftlib.models.weights import open_folder, save_tensors
from ftlib.sections.loss import Mtp

FOLDER = "mtp"  # below a model's, where nothing that loads the model looks


class Depth(nn.Module):
    """One module: h^k = norm(TRM(M [RMSNorm(h^{k-1}); RMSNorm(Emb(t_{i+k}))])), equations 21 and 22.

    TRM is a block like the decoder's last one. Every h is what the head reads: h^0 is the decoder's output.
    """

    def __init__(self, arch: Arch, block: nn.Module) -> None:
        super().__init__()
        norms = (RMSNorm(arch.dim, arch.norm_eps, arch.zero_centered_norms) for _ in range(3))
        self.hidden_norm, self.token_norm, self.norm = norms
        self.proj = Linear(2 * arch.dim, arch.dim, bias=False)
        self.block = block

    def forward(self, model: LanguageModel, hidden: Tensor, ids: Tensor, batch: Batch) -> Tensor:
        """h^k [B, T, D] of h^{k-1} `hidden` [B, T, D] and the tokens `ids` [B, T]."""
        mixer, layout = model.arch.layers[-1].mixer, batch.layout
        layout.prepare(model.model.backend, {mixer.window})  # a sharded model has prepared a copy
        rope = mixer.rope
        lengths = layout.lengths if rope is not None and rope.needs_lengths else None
        turns = None if rope is None else rope.table(batch.position_ids, lengths)
        embeds = model.model.embed(replace(batch, input_ids=ids))
        x = self.proj(torch.cat((self.hidden_norm(hidden), self.token_norm(embeds)), -1))
        return self.norm(self.block(x, turns, layout))


class Ahead(nn.ModuleList):
    """Modules 1 … D. `weight` is lambda of equation 25."""

    weight: float = 0.0


def attach(model: LanguageModel, cfg: Mtp) -> None:
    """Give a model on the meta device, whose attention backend is chosen, `mtp`; with depth 0 it stays None."""
    if not cfg.depth:
        return
    last, count = model.model.layers[-1], len(model.model.layers)
    with torch.device("meta"):
        blocks = [type(last)(model.arch, model.arch.layers[-1], count + k) for k in range(cfg.depth)]
        model.mtp = Ahead(Depth(model.arch, block) for block in blocks).to(model.lm_head.weight.dtype)
    for block in blocks:
        block.self_attn.backend = model.model.backend
    model.mtp.weight = cfg.weight


@torch.no_grad()
def fill(model: LanguageModel, source: Path | None, seed: int, std: float | None = None) -> None:
    """Weights of `model.mtp`: those saved with the model in `source`, else drawn from `seed`, the same on any mesh."""
    level_experts(model.mtp)  # which no training moves, so that they are not saved
    if source is not None and (source / FOLDER).is_dir():
        _load(model, source / FOLDER)
        return
    std = model.config.get("initializer_range", STD) if std is None else std
    generator = torch.Generator(device=model.lm_head.weight.device).manual_seed(seed + 2)
    init_parameters(model.mtp, model.arch, generator, std)


def _load(model: LanguageModel, folder: Path) -> None:
    weights, wanted = open_folder(folder), dict(model.mtp.named_parameters())
    if {name: tuple(p.shape) for name, p in wanted.items()} != weights.shapes:
        depth = len({name.split(".")[0] for name in weights.shapes})
        raise UserError(
            f"{folder} was saved with mtp.depth {depth} or other sizes; this run has {len(model.mtp)}",
            where="mtp.depth",
            fix=f"set it to {depth}, or remove that folder to begin with fresh modules",
        )
    for name, parameter in wanted.items():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local.copy_(weights.read(name, local_index(parameter)))


def save(model: LanguageModel, folder: Path, write: bool = True) -> None:
    """Write `folder`/mtp if the model has such modules. Every process of a sharded model calls it; one writes."""
    if model.mtp is None:
        return
    tensors = {name: whole(parameter) for name, parameter in model.mtp.named_parameters()}
    if write:
        (folder / FOLDER).mkdir(exist_ok=True)
        save_tensors(tensors, folder / FOLDER / "model.safetensors")


def ahead(tokens: Tensor, layout: Layout, k: int, missing: int) -> Tensor:
    """tokens[i + k] at i, [B, T]; `missing` where that is past the end of i's document."""
    documents = layout.document_ids
    moved = torch.roll(tokens, -k, 1)
    inside = torch.roll(documents, -k, 1) == documents
    inside[:, documents.shape[1] - k :] = False
    return torch.where(inside, moved, missing)
