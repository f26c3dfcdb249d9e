"""From a config's `lora` section to adapters on a model: new ones, or one that is continued."""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ftlib import quant
from ftlib.adapters import lora, peft_format, token_rows
from ftlib.errors import UserError, about
from ftlib.models import hub
from ftlib.sections import Lora

REFERENCE = "ref"  # the frozen copy of the adapter that a preference run started from
OWN = ("dropout", "lr_ratio", "start_from")  # keys that a continued adapter does not bring along


def attach(model: nn.Module, cfg: Lora, reference: bool = False, tokens: Sequence[int] = ()) -> None:
    """Put adapter `policy` on a model that may be on the meta device, as `cfg` says or as `cfg.start_from` was made.

    `reference`: beside a continued adapter also hold it frozen, as `ref` (ftlib.adapters.lora.use switches). `tokens`:
    ids whose rows of the embedding and the head train as well.
    """
    where = token_rows.everywhere(model, tokens)
    if cfg.start_from is not None:
        with about("lora.start_from"):
            cfg = _continued(model, cfg, where)
        if reference:
            lora.attach_section(model, dataclasses.replace(cfg, dropout=0.0), name=REFERENCE, tokens=where)
    lora.attach_section(model, cfg, tokens=where)
    if any(linear is getattr(model, "lm_head", None) for _, linear, _ in lora.adapted(model)):
        raise UserError(
            "losses are made from the head's matrix itself, tile by tile: low-rank factors on it would never train",
            where="lora.targets, lora.start_from",
            fix="leave lm_head out of the targets, or train it whole: lora.modules_to_save=[lm_head]",
        )
    peft_format.check(model)


def fill(model: nn.Module, cfg: Lora, seed: int) -> None:
    """Give every attached adapter its values, once the base has its weights."""
    if cfg.start_from is None:
        return lora.reset(model, seed)
    for name in ("policy", REFERENCE):
        if any(True for _ in lora.adapted(model, name)):
            peft_format.fill(model, hub.resolve(cfg.start_from), name=name)


def compare_base(model: nn.Module, cfg: Lora) -> None:
    """A note on stderr where an adapter that is continued was trained on a base kept otherwise than this one."""
    if cfg.start_from is None:
        return
    was, now = peft_format.base_form(hub.resolve(cfg.start_from)), quant.kept_in(model)
    if was not in (None, now):
        here = f"kept in {now}" if now else "plain"
        what = f"{cfg.start_from} was trained on a base kept in {was}, and goes on with one that is {here}"
        print(f"note: lora.start_from: {what} (model.quantize, model.fp8)", file=sys.stderr)


def reference_name(cfg: Lora) -> str | None:
    """What to hand to `lora.use` for the reference policy: `ref` if the run started from an adapter, else the base."""
    return REFERENCE if cfg.start_from is not None else None


def fingerprint(cfg: Lora) -> dict[str, Any]:
    """What must be equal for a run with this section to be continued."""
    keys = ("rank", "alpha", "targets", "rslora", "dora", "init", "rank_pattern", "alpha_pattern", "modules_to_save")
    found = {f"lora.{key}": getattr(cfg, key) for key in keys}
    if cfg.start_from is not None:
        file = Path(hub.resolve(cfg.start_from)) / peft_format.TENSORS
        found["lora.start_from"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _continued(model: nn.Module, cfg: Lora, tokens: token_rows.Where) -> Lora:
    """The section of the adapter that is continued; a key of `cfg` that says otherwise is an error."""
    theirs = {module: tuple(ids) for module, ids in peft_format.tokens(hub.resolve(cfg.start_from)).items()}
    if theirs != tokens:
        both = f"{theirs or 'none'}, the config names {tokens or 'none'}"
        raise UserError(
            f"the adapter that is continued trains rows of tokens: {both}",
            where="lora.start_from, tokenizer.add_tokens",
            fix="name the tokens it was trained with, in their order",
        )
    found = peft_format.section(model, hub.resolve(cfg.start_from))
    wrong = []
    for field in dataclasses.fields(Lora):
        mine, default = getattr(cfg, field.name), getattr(Lora(), field.name)
        if field.name in (*OWN, "targets") or mine == default:
            continue
        if mine != getattr(found, field.name):
            wrong.append(f"lora.{field.name}: {mine!r} here, {getattr(found, field.name)!r} in the adapter")
    if cfg.targets != "all-linear":
        wrong.append("lora.targets: the adapter brings its own")
    if wrong:
        raise UserError(
            "the adapter that is continued has another shape:\n    " + "\n    ".join(wrong),
            where="lora.start_from",
            fix="leave these keys out",
        )
    return dataclasses.replace(found, **{key: getattr(cfg, key) for key in OWN})
