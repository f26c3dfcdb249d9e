"""What a mesh and a memory setting ask of a model and of the rows it reads, known before anything is loaded."""

from typing import Any

from torch import nn

from ftlib.errors import Problems, UserError
from ftlib.parallel import tensor


def check(model: nn.Module, cfg: Any, cp: int, tp: int) -> None:
    """UserError naming the keys that do not fit. `model` may be on meta; `cfg` is the recipe's config."""
    problems = []
    for part in (tensor.check, tensor.check_base) if tp > 1 else ():
        try:
            part(model, tp)
        except UserError as error:
            problems.append(str(error))
    rows = () if problems else (_rows,)  # another tp is wanted, for which rows may do
    others = [part(cfg, cp, tp) for part in (*rows, _answers, _mtp)] + [part(model, cfg) for part in (_tiles, _keys)]
    others += [_heads(model, cfg, cp, tp), _ring(model, cfg, cp)]
    problems += [str(error) for error in others if error]
    if problems:
        raise Problems(problems)


def _heads(model: nn.Module, cfg: Any, cp: int, tp: int) -> UserError | None:
    if cp == 1 or cfg.parallel.cp_style != "ulysses":
        return None
    for layer in model.arch.layers:
        heads = getattr(layer.mixer, "heads", cp * tp)
        if heads % (cp * tp):
            return UserError(
                f"num_attention_heads {heads} is no multiple of parallel.cp {cp} x parallel.tp {tp}",
                where="parallel.cp, config.json",
                fix="set parallel.cp_style=allgather, which does not split heads, or a smaller parallel.cp",
            )
    return None


def _ring(model: nn.Module, cfg: Any, cp: int) -> UserError | None:
    if cp == 1 or cfg.parallel.cp_style != "ring":
        return None
    for key in ("window", "sinks", "softcap"):
        if any(getattr(layer.mixer, key, None) for layer in model.arch.layers):
            return UserError(
                f"cp_style ring is for plain causal attention, and this model has a {key.removesuffix('s')}",
                where="parallel.cp_style, model.path",
                fix="set parallel.cp_style=allgather",
            )
    return None


def _rows(cfg: Any, cp: int, tp: int) -> UserError | None:
    pieces = cp * tp * (2 if cp > 1 and cfg.parallel.cp_style != "ulysses" else 1)
    if cfg.data.seq_len % pieces == 0:
        return None
    style = cfg.parallel.cp_style
    why = f"cp_style {style} gives each process an early and a late piece" if pieces != cp * tp else "split evenly"
    return UserError(
        f"data.seq_len {cfg.data.seq_len} is no multiple of {pieces} (parallel.cp {cp} x parallel.tp {tp}; {why})",
        where="data.seq_len",
        fix=f"set data.seq_len={-(-cfg.data.seq_len // pieces) * pieces}",
    )


def _answers(cfg: Any, cp: int, tp: int) -> UserError | None:
    if cp * tp == 1 or not getattr(getattr(cfg, "eval", None), "exact_match", 0):
        return None
    return UserError(
        "answers cannot be generated while sequences or matrices are shared by several processes",
        where="eval.exact_match, parallel.cp, parallel.tp",
        fix="set eval.exact_match=0 and evaluate the saved result",
    )


def _tiles(model: nn.Module, cfg: Any) -> UserError | None:
    layers = (getattr(block, "mlp", None) for block in model.model.layers)
    if not cfg.memory.tiled_mlp or all(hasattr(layer, "tile") for layer in layers):
        return None
    return UserError(
        "only dense feed-forward layers are computed in tiles, and this model has others (a mixture of experts?)",
        where="memory.tiled_mlp",
        fix="set memory.tiled_mlp=0",
    )


def _mtp(cfg: Any, cp: int, tp: int) -> UserError | None:
    depth = getattr(getattr(cfg, "mtp", None), "depth", 0)
    if depth and cp * tp > 1:
        what, where = "tokens ahead may lie on another process", "mtp.depth, parallel.cp, parallel.tp"
        both = " and ".join(f"parallel.{name}=1" for name, size in (("cp", cp), ("tp", tp)) if size > 1)
        return UserError(what, where=where, fix=f"set {both} (parallel.dp_shard works), or mtp.depth=0")
    if depth >= cfg.data.seq_len:
        what = f"no row of {cfg.data.seq_len} tokens has one {depth + 1} ahead"
        return UserError(what, where="mtp.depth, data.seq_len", fix="set mtp.depth=1")
    return None


def _keys(model: nn.Module, cfg: Any) -> UserError | None:
    skips, both = getattr(getattr(cfg, "context", None), "skip", False), hasattr(cfg, "diffusion")
    if model.arch.ssmax is None or not (skips or both):
        return None
    why = "skipped positions do not" if skips else "diffusion, which looks both ways, does not"
    return UserError(
        f"scalable softmax takes a token's position for the number of keys it sees; {why} tell that",
        where="context.skip" if skips else "model.path",
        fix="set context.skip=false" if skips else "take a model without it",
    )
