"""The load-balancing loss of a mixture of experts, which keeps a router from sending every token to the same few."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftlib.errors import UserError
from ftlib.layers.batch import IGNORED, Batch
from ftlib.models.language_model import LanguageModel
from ftlib.sections.loss import Loss


def load_balancing_loss(logits: Sequence[Tensor], top_k: int, kept: Tensor) -> Tensor:
    """E * sum over experts of f_e * P_e (Switch Transformer, Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6).

    f_e is the share of tokens that pick expert e among their `top_k`, P_e the mean of its probability, both over all
    layers together, as transformers' `load_balancing_loss_func` has it: `top_k` where experts are used evenly, E where
    every token takes the same. `logits`: a router's [N, E] for each layer; `kept` bool [N]: the tokens that count.
    float32 scalar, or float64 for float64 logits. No gradient goes through f_e, which is a count.
    """
    wide = torch.promote_types(logits[0].dtype, torch.float32)
    counted = kept[:, None].to(wide)
    picked = likely = torch.zeros(logits[0].shape[1], dtype=wide, device=kept.device)
    for each in logits:
        p = each.softmax(-1, dtype=wide)
        best = torch.zeros_like(p).scatter_(1, p.detach().topk(top_k, -1).indices, 1.0)
        picked, likely = picked + (best * counted).sum(0), likely + (p * counted).sum(0)
    tokens = len(logits) * counted.sum().clamp(min=1)
    return len(picked) * (picked / tokens * (likely / tokens)).sum()


def with_targets(batch: Batch) -> Tensor:
    """bool [B * T]: tokens of documents that have a target; padding is a document that has none."""
    before = torch.nn.functional.pad((batch.labels != IGNORED).flatten().cumsum(0), (1, 0))
    targets = before[batch.layout.cu_seqlens.long()].diff()
    return (targets > 0)[batch.layout.document_ids.flatten().long()]


class Balance:
    """What `loss.router_aux` adds to a step's loss: the coefficient times the mean of `load_balancing_loss` over the
    step's micro-batches on all processes, each counting as much as its targets do.

    The loss is no sum over tokens: f and P are those of one micro-batch on one process, as in transformers (whose
    trainer adds one such term for each of them, where this takes their mean). So another `batch.micro_rows` gives
    another loss, by a little. Experts of `mtp` modules are not balanced.
    """

    def __init__(self, model: LanguageModel, rule: Loss) -> None:
        """Have the blocks of a model that `check` lets pass hand out what their routers say; nothing if it is off."""
        self.model, self.rule, self.seen = model, rule, 0.0
        if rule.router_aux:
            blocks = _routers(model)
            self.top_k = blocks[0].mlp.spec.top_k
            for block in blocks:
                block.routes = True

    def __call__(self, batch: Batch) -> Tensor | float:
        """The part of the micro-batch that `model` has just computed, times its target weight: to be added to a sum
        over targets, float scalar. 0.0 if it is off."""
        if not self.rule.router_aux:
            return 0.0
        decoder = self.model.model
        loss = load_balancing_loss(decoder.routed, self.top_k, with_targets(batch))
        decoder.routed = []
        loss = loss * (batch.target_tokens if batch.weights is None else batch.weights.sum())
        self.seen = self.seen + loss.detach().double()
        return self.rule.router_aux * loss

    def column(self, run: Any, step: Any) -> dict[str, float]:
        """`router_aux` of the step that is over, without the coefficient; every process must call it. `run` sums over
        processes (`Run.total`), `step` is the loader's and knows the target weight."""
        if not self.rule.router_aux:
            return {}
        seen, self.seen = self.seen, 0.0
        return {"router_aux": run.total(seen).item() / step.target_weight}


def check(model: LanguageModel, cfg: Any) -> None:
    """UserError where `loss.router_aux` has nothing to balance, or tokens of a micro-batch lie on several processes."""
    if not getattr(getattr(cfg, "loss", None), "router_aux", 0):
        return
    if not _routers(model):
        what = "there are no experts to balance in this model" + " (or model.code hides them)" * bool(cfg.model.code)
        raise UserError(what, where="loss.router_aux, model.path", fix="set loss.router_aux=0")
    if any(block.mlp.spec.score == "sigmoid" for block in _routers(model)):
        raise UserError(
            "the routers of this model score each expert by a sigmoid and have no probabilities to balance; their "
            "e_score_correction_bias keeps experts even, and stays as it is",
            where="loss.router_aux, model.path",
            fix="set loss.router_aux=0",
        )
    if cfg.parallel.tp * cfg.parallel.cp > 1:
        raise UserError(
            "how evenly experts are used is counted over a whole micro-batch, and here processes share its tokens",
            where="loss.router_aux, parallel.tp, parallel.cp",
            fix="set parallel.tp=1 and parallel.cp=1 (dp_shard and dp_replicate work), or loss.router_aux=0",
        )


def note(model: Any, cfg: Any) -> list[str]:
    """What a checkpoint asks for and the run does not do, for the user."""
    asked = getattr(model, "config", {})
    coefficient = asked.get("output_router_logits") and asked.get("router_aux_loss_coef")
    rule = getattr(cfg, "loss", None)
    if not coefficient or getattr(rule, "router_aux", 0):
        return []
    how = "" if rule is None else f"; loss.router_aux={coefficient:g} does"
    return [f"config.json asks for a loss that balances experts (router_aux_loss_coef), and this run adds none{how}"]


def _routers(model: LanguageModel) -> list[torch.nn.Module]:
    """Blocks that can hand out their router's logits."""
    blocks = getattr(model.model, "layers", ()) if hasattr(model.model, "routed") else ()
    return [block for block in blocks if hasattr(block, "routes") and hasattr(getattr(block, "mlp", None), "routed")]
