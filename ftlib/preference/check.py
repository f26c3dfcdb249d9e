"""What a run over preferences or scores asks of its config, known before anything is loaded."""

from typing import Any

from ftlib.errors import Problems, UserError
from ftlib.preference import reference
from ftlib.preference.objective import resolve, try_own


def check(cfg: Any) -> None:
    """UserError listing what does not go together. `cfg`: a recipe's config with a section `dpo` or `reward`."""
    problems = []
    for part in (_shared, _dpo if hasattr(cfg, "dpo") else _reward):
        try:
            problems += [str(UserError(what, where=where, fix=fix)) for found, what, where, fix in part(cfg) if found]
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise Problems(problems)


def _shared(cfg: Any) -> list[tuple[Any, str, str, str]]:
    return [
        (
            cfg.data.overlong == "split", "an answer cannot be split",
            "data.overlong", "set drop, truncate (cuts the beginning of prompts) or error",
        ),
        (
            cfg.parallel.cp > 1, "answers cannot lie on several processes",
            "parallel.cp", "set parallel.cp=1; parallel.dp_shard and parallel.tp share the model",
        ),
        (
            cfg.eval.exact_match > 0, "held-out answers are compared with each other, not generated",
            "eval.exact_match", "set eval.exact_match=0",
        ),
        (
            bool(cfg.eval.prompts), "nothing is generated in an evaluation here",
            "eval.prompts", "leave them out; tune generate answers them with the result",
        ),
    ]  # fmt: skip


def _dpo(cfg: Any) -> list[tuple[Any, str, str, str]]:
    objective = resolve(cfg.dpo)
    try_own(objective)
    reference.kind(cfg, objective)
    return [
        (
            cfg.lora is not None and cfg.lora.dropout > 0,
            "dropout makes the policy differ from its reference before anything is learnt",
            "lora.dropout", "set lora.dropout=0",
        ),
        (
            any(term.name.startswith("aot") for term in objective.terms) and cfg.batch.rows != cfg.batch.micro_rows,
            "aot sorts all pairs of a step at once",
            "batch", "set batch.micro_rows to batch.rows, on one data-parallel process",
        ),
    ]  # fmt: skip


def _reward(cfg: Any) -> list[tuple[Any, str, str, str]]:
    return [
        (
            cfg.lora is not None and "score" not in cfg.lora.modules_to_save,
            "the head that scores would stay as it began",
            "lora.modules_to_save", "add score to it",
        ),
        (
            cfg.parallel.tp > 1, "a head with so few outputs cannot be shared by several processes",
            "parallel.tp", "set parallel.tp=1",
        ),
        (
            cfg.lora is not None and (cfg.model.quantize or cfg.model.fp8),
            "a model that scores is written whole, and weights in few bits take no adapter in",
            "model.quantize, model.fp8", "leave them out beside adapters; model.fp8 goes with lora=null",
        ),
        (
            cfg.tokenizer.add_tokens, "a model that scores has no head for new tokens",
            "tokenizer.add_tokens", "train a language model with them first",
        ),
    ]  # fmt: skip
