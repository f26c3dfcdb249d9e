"""Which parameters share a learning rate, a decay and a kind of update."""

import re

from torch import nn

from ftlib.errors import UserError
from ftlib.sections import Optim

MATRICES = {"muon": (2, 3, 4), "dion": (2,)}  # dimensions of what they treat as matrices; above 2 are stacks of them
WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.")


def parameter_groups(model: nn.Module, cfg: Optim) -> list[dict]:
    """Trainable parameters by what they share: `params`, `lr`, `lr_scale`, `weight_decay`, `matrices`.

    The learning rate of a parameter is `optim.lr` times its `lr_scale`: of its module (`lr_scales`, as LoRA+ sets it),
    of the first of `optim.groups` that matches its name, and of its width (`optim.mup_width`: Tensor Programs V, Yang
    et al. 2022, arXiv 2203.03466, table 8, Adam; an embedding, tied or not, keeps its own). Vectors (norms, biases)
    are not decayed unless a group says so. `matrices` marks what Muon and Dion treat as matrices: weights of two or
    more dimensions that are neither an embedding nor the head. UserError for a group that matches nothing.
    """
    of_module, apart = lr_scales(model), lookups(model)
    found: dict[tuple, list[nn.Parameter]] = {}
    matched = set()
    for full_name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        name = WRAPPERS.sub("", full_name)
        scale, decay = of_module.get(p, 1.0), cfg.weight_decay if p.ndim >= 2 else 0.0
        number = next((i for i, group in enumerate(cfg.groups) if re.search(group.match, name)), None)
        if number is not None:
            matched.add(number)
            group = cfg.groups[number]
            scale *= group.lr_scale
            decay = decay if group.weight_decay is None else group.weight_decay
        if cfg.mup_width and p.ndim >= 2 and id(p) not in apart["embedding"]:
            scale *= cfg.mup_width / p.shape[-2 if id(p) in apart["transposed"] else -1]
        matrices = p.ndim in MATRICES.get(cfg.name, ()) and id(p) not in apart["embedding"] | apart["head"]
        found.setdefault((scale, -decay, matrices), []).append(p)
    _check_matched(model, cfg, matched)
    groups = [
        {"params": params, "lr": cfg.lr * scale, "lr_scale": scale, "weight_decay": -decay, "matrices": matrices}
        for (scale, decay, matrices), params in sorted(found.items(), key=lambda item: item[0])
    ]
    return groups


def lookups(model: nn.Module) -> dict[str, set[int]]:
    """Ids of the parameters of embeddings, of the output head (`lm_head`; a tied matrix is in both), and of matrices
    that are kept as [inputs, outputs]."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = getattr(model, "lm_head", None)
    return {
        "embedding": {id(p) for module in embeddings for p in module.parameters()},
        "head": set() if head is None else {id(p) for p in head.parameters()},
        "transposed": {
            id(module._parameters.get("weight")) for module in model.modules() if getattr(module, "transposed", False)
        },
    }


def lr_scales(model: nn.Module) -> dict[nn.Parameter, float]:
    """Parameters whose module multiplies their learning rate: `lr_scales`, parameter name -> factor."""
    found = {}
    for module in model.modules():
        for name, scale in getattr(module, "lr_scales", {}).items():
            parameter = module._parameters.get(name)
            if parameter is not None and scale != 1.0:
                found[parameter] = scale
    return found


def _check_matched(model: nn.Module, cfg: Optim, matched: set[int]) -> None:
    for number, group in enumerate(cfg.groups):
        if number not in matched:
            names = [WRAPPERS.sub("", name) for name, p in model.named_parameters() if p.requires_grad]
            few = ", ".join([*names[:3], "…", *names[-2:]] if len(names) > 5 else names)
            raise UserError(
                f"{group.match!r} is found in no trained parameter's name that an earlier group has not taken",
                where=f"optim.groups[{number}].match",
                fix=f"names are {few}",
            )
