"""Rows of the embedding and the head that an adapter trains, those of new tokens, while every other row stays frozen.

They sit where factors sit, under `adapters.<name>`; a head that is tied to the embedding shares them. In files they are
what peft calls trainable tokens: the rows themselves, not a difference.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftlib.adapters import saved_modules
from ftlib.errors import UserError
from ftlib.models.keys import piece
from ftlib.models.shards import fill, local, local_index, unsharded

EMBEDDING, HEAD = "embed_tokens", "lm_head"  # as the end of their Hugging Face names
Where = Mapping[str, Sequence[int]]  # module -> ids of the tokens whose rows train


class TokenRows(nn.Module):
    """`rows` [n, dim] in place of the rows `ids` of a weight [V, dim]; kept in float32, used in the base's dtype."""

    def __init__(self, weight: Tensor, ids: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.ids = tuple(ids)
        self.rows = nn.Parameter(torch.empty(len(self.ids), weight.shape[1], device=weight.device, dtype=dtype))

    def value(self, name: str, base: Tensor) -> Tensor:
        """The whole weight [V, dim] with these rows: a copy, whose gradient reaches them alone."""
        return base.index_copy(0, _sorted(self.ids, base.device)[2], self.rows.to(base.dtype))

    def embed(self, tokens: Tensor, base: Tensor) -> Tensor:
        """[..., dim] of token ids [...], without that copy."""
        known, order, _ = _sorted(self.ids, base.device)
        at = torch.searchsorted(known, tokens).clamp(max=len(known) - 1)
        mine = F.embedding(order[at], self.rows.to(base.dtype))
        return torch.where((known[at] == tokens)[..., None], mine, F.embedding(tokens, base))

    def forward(self, x: Tensor, y: Tensor, linear: nn.Module) -> Tensor:
        """Nothing to add: `y` was already computed with these rows."""
        return y


@cache
def _sorted(ids: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids in order, where each of them stands in `ids`, and `ids`: int64 [n] each."""
    index = torch.tensor(ids, device=device)
    return *index.sort(), index


def everywhere(model: nn.Module, ids: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """These tokens' rows in the embedding, and in a head of its own; none for no ids."""
    modules = (EMBEDDING,) if model.arch.tied else (EMBEDDING, HEAD)
    return dict.fromkeys(modules, tuple(ids)) if ids else {}


def attach(model: nn.Module, where: Where, name: str, dtype: torch.dtype) -> None:
    """Let adapter `name` train these rows. A module that it trains whole (`lora.modules_to_save`) has them already."""
    shared = None
    for which, module in ((EMBEDDING, model.model.embed_tokens), (HEAD, model.lm_head)):
        tied = which == HEAD and model.arch.tied and HEAD not in where
        ids = where.get(EMBEDDING if tied else which, ())
        held = _adapter(module, name)
        if not ids or isinstance(held, saved_modules.Copies):
            continue
        if held is not None:
            what = f"{which} has low-rank factors, and rows for new tokens (tokenizer.add_tokens)"
            fix = f"leave it out, or train it whole: lora.modules_to_save=[{which}]"
            raise UserError(what, where="lora.targets", fix=fix)
        if max(ids) >= module.weight.shape[0]:
            what = f"{which} has {module.weight.shape[0]:,} rows, token {max(ids):,} needs one more"
            raise UserError(what, where="tokenizer.add_tokens", fix="resize the embedding first (ftlib.models.resize)")
        saved_modules.switch(module)
        rows = shared if tied and shared is not None else TokenRows(module.weight, ids, dtype)
        shared = shared or rows
        module.adapters[name] = rows
        module.active = name


def _adapter(module: nn.Module, name: str) -> nn.Module | None:
    return dict(getattr(module, "adapters", {})).get(name)


def held(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, TokenRows]]:
    """(Hugging Face name, module, its rows) of the embedding and a head with rows of its own."""
    seen = None
    for path, module in model.named_modules():
        rows = _adapter(module, name)
        if isinstance(rows, TokenRows) and rows is not seen:
            seen = rows
            yield piece(f"{path}.weight", model.table).hf.removesuffix(".weight"), module, rows


@torch.no_grad()
def reset(model: nn.Module, name: str) -> None:
    """Begin with the base's rows. Collective."""
    for _, module, rows in held(model, name):
        fill(rows.rows, unsharded(module._parameters["weight"].detach())[list(rows.ids)])


@torch.no_grad()
def merge_into(model: nn.Module, name: str) -> int:
    """Write the rows into the base and remove them; returns how many weights had some. Collective."""
    found = list(held(model, name))
    for _, module, rows in found:
        weight = module._parameters["weight"]
        of, whole = local_index(weight)[0], unsharded(rows.rows).to(weight.dtype)
        here = [i for i, token in enumerate(rows.ids) if of.start <= token < of.stop]
        local(weight)[[rows.ids[i] - of.start for i in here]] = whole[here]
    for module in model.modules():
        if isinstance(_adapter(module, name), TokenRows):
            del module.adapters[name]
            module.active = None
    return len(found)
