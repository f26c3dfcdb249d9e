"""Checkpoint -> parameters, one at a time: each process reads only the slice it keeps."""

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftlib.errors import UserError
from ftlib.models import families, heads, hub
from ftlib.models.keys import Piece, check_keys, piece, plan
from ftlib.models.language_model import LanguageModel
from ftlib.models.quantized import dequantized
from ftlib.models.shards import local_index
from ftlib.models.weights import Weights, open_folder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by the names that configs and commands use


def build(
    folder: Path, dtype: torch.dtype, decoder: type[nn.Module] | None = None, head: heads.Head | None = None
) -> LanguageModel:
    """The model of a folder's config.json, on the meta device: shapes, no memory.

    `decoder`: a class in place of `ftlib.models.decoder.Decoder`; its `family`, if it has one, reads config.json.
    `head`: scores in place of a vocabulary.
    """
    config = hub.read_config(folder)
    arch, table = families.read(config, str(folder / "config.json"), getattr(decoder, "family", None))
    with torch.device("meta"):
        model = LanguageModel(arch, table, config, **({"decoder": decoder} if decoder else {}))
        if head is not None:
            heads.attach(model, head)
    return model.to(dtype)


def open_weights(model: LanguageModel, folder: Path) -> Weights:
    """The weight files of the folder a model was built from, read as plain numbers whatever they are kept in."""
    return dequantized(open_folder(folder), hub.packed(model.config), folder)


def check_weights(model: LanguageModel, folder: Path) -> Weights:
    """Headers of every weight file against the model: names and shapes. Raises UserError listing what differs."""
    weights = open_weights(model, folder)
    if model.lm_head.out_features != model.arch.vocab:
        weights = heads.WithHead(weights, model)
    state = base_state(model)
    pieces = plan(state, model.table)
    language = model.config.get("text_config") or model.config
    kept = check_keys(pieces, weights.files, model.table, model.arch.tied, language, str(folder))
    model.kept = {key: weights.files[key] for key in kept}
    wrong = []
    for name, source in pieces.items():
        if source.hf not in weights.shapes:
            continue  # the tied head
        wanted = list(state[name].shape)
        if source.experts:
            wanted = wanted[-2:]
        for key in source.keys:
            found = list(weights.shapes[key])
            rows = found[0] if source.rows is None else source.rows[1] - source.rows[0]
            if [rows, *found[1:]] != wanted:
                wrong.append(f"{key}: config.json gives {wanted}, the file has {found}")
    if wrong:
        listed = "\n  ".join(wrong[:5]) + (f"\n  … and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(f"weights do not fit config.json:\n  {listed}", where=str(folder))
    if model.arch.tied:
        _check_tied(weights, piece("model.embed_tokens.weight", model.table).hf, pieces["lm_head.weight"].hf, folder)
    return weights


def _check_tied(weights: Weights, embedding: str, head: str, folder: Path, rows: int = 4096) -> None:
    """UserError where the files bring a head of its own for a model that config.json says has none."""
    if head not in weights.shapes:
        return
    same = (size := weights.shapes[head]) == weights.shapes[embedding]
    for start in range(0, size[0] if same else 0, rows):
        part = (slice(start, min(start + rows, size[0])), slice(0, size[1]))
        if not torch.equal(weights.read(head, part).float(), weights.read(embedding, part).float()):
            same = False
            break
    if not same:
        raise UserError(
            f"tie_word_embeddings is true (or the default), and {head} in the files is not {embedding}",
            where=str(folder / "config.json"),
            fix='write "tie_word_embeddings": false to train both matrices, as transformers loads them; '
            f"or remove {head} from the files",
        )


class Stored(Protocol):
    """A weight that is not kept as a tensor of its shape (ftlib.quant)."""

    shape: torch.Size
    dtype: torch.dtype

    def fill(self, weight: Tensor) -> None: ...
    def dequantize(self) -> Tensor: ...


def base_state(model: LanguageModel) -> dict[str, Tensor | Stored]:
    """Parameters and buffers that a checkpoint holds, by our names: everything but adapters and `mtp`."""
    state = model.state_dict(keep_vars=True).items()
    found = {name: t for name, t in state if not name.startswith("mtp.") and ".adapters." not in name}
    stored = {f"{name}.weight": module.base for name, module in model.named_modules() if hasattr(module, "base")}
    return found | stored


@torch.no_grad()
def load_weights(model: LanguageModel, weights: Weights, only: Collection[str] | None = None) -> None:
    """Fill the model's (already materialised) parameters from a checkpoint, casting to their dtype; `only`: of these
    names."""
    pieces = plan(base_state(model), model.table)
    for name, tensor in base_state(model).items():
        if (model.arch.tied and name == "lm_head.weight") or (only is not None and name not in only):
            continue
        if not isinstance(tensor, Tensor):
            whole = tuple(slice(0, size) for size in tensor.shape)
            tensor.fill(_read(weights, pieces[name], whole).to(tensor.dtype))
            continue
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.numel():  # there may be more processes than experts
            local.copy_(_read(weights, pieces[name], local_index(tensor)))


def _read(weights: Weights, piece: Piece, index: tuple[slice, ...]) -> Tensor:
    if piece.experts:
        return torch.stack([_read_expert(weights, keys, index[1:]) for keys in piece.experts[index[0]]])
    if piece.rows is not None:
        first = index[0]
        index = (slice(first.start + piece.rows[0], first.stop + piece.rows[0]), *index[1:])
    return weights.read(piece.hf, index)


def _read_expert(weights: Weights, keys: tuple[str, ...], index: tuple[slice, ...]) -> Tensor:
    if len(keys) == 1:
        return weights.read(keys[0], index)
    which, *index = index
    return torch.stack([weights.read(key, tuple(index)) for key in keys[which]])
