"""Learning from preferences."""

from dataclasses import dataclass
from typing import Literal

from ftlib.config import MaybeFile
from ftlib.errors import did_you_mean
from ftlib.sections.methods import EXO_LEAST, METHODS, NAMES, method, preset

CONSTANTS = ("beta", "label_smoothing", "gamma", "tau", "average", "desirable", "undesirable")


@dataclass(frozen=True, kw_only=True)
class Dpo:
    """The loss over preferences and its constants; one left at null takes the value that belongs to the loss."""

    loss: MaybeFile | dict[str, float] = "sigmoid"  # a name, `./mine.py:loss`, or weights: {sigmoid: 0.8, sft: 1}
    beta: float | None = None  # how far the policy may go from the reference: 0.1; sigmoid_norm and simpo 2
    label_smoothing: float | None = None  # share of wrong labels: cdpo and robust 0.1, exo_pair 0.001
    gamma: float | None = None  # margin of simpo: 1
    tau: float | None = None  # temperature of discopop: 0.05
    average: bool | None = None  # ipo compares log-ratios per token, not their sums: true
    desirable: float | None = None  # weight of good answers (kto, bco): 1
    undesirable: float | None = None  # weight of bad ones: 1
    sft: float | None = None  # weight of -log p per token of the chosen answer: rpo, mpo, cpo and orpo 1, others 0
    length_alpha: float | None = None  # weight of tokens behind the shorter answer's length: ld_dpo 0.5, others 1
    on_policy: bool | None = None  # weigh pairs by how likely the policy is to write them: wpo true, others false
    share_prompt: bool | Literal["auto"] = False  # both answers behind one copy of it; auto: where that saves a fifth
    reference: Literal["auto", "adapter_off", "cache"] = "auto"  # its log-probs: each step, or once before the first

    def __post_init__(self) -> None:
        if isinstance(self.loss, str) and self.loss.startswith("["):  # of a command line; that of a file is no text
            weights = ", ".join(f"{name.strip()}: 1" for name in self.loss.strip("[]").split(","))
            raise ValueError(f"loss: several have weights (write {{{weights}}})")
        try:
            terms = preset(self.loss).terms
        except KeyError as error:
            name = error.args[0]
            if name.endswith(".py"):
                raise ValueError(f"loss: {name} names a file and no function in it (write {name}:function)") from None
            hint = " (DPO itself is 'sigmoid')" if name.lower() == "dpo" else did_you_mean(name, NAMES)
            known = f"{hint}; there are {', '.join(NAMES)}"
            raise ValueError(f"loss: there is no {name!r}{known}") from None
        if not terms:
            raise ValueError("loss: name at least one")
        if len({method(name).rated for name in terms}) > 1:
            raise ValueError("loss: kto and bco rate single answers, the others compare pairs: they cannot be mixed")
        if len(terms) > 1 and method(next(iter(terms))).rated:
            raise ValueError("loss: kto and bco subtract different baselines: take one of them")
        for key in CONSTANTS:
            if getattr(self, key) is not None and not any(key in method(name).constants for name in terms):
                readers = [name for name in METHODS if key in METHODS[name].constants]
                raise ValueError(f"{key}: not a constant of {' and '.join(terms)}, but of {', '.join(readers)}")
        self._check_ranges(terms)

    def _check_ranges(self, terms: dict[str, float]) -> None:
        if min(terms.values()) < 0 or not (any(terms.values()) or self.sft):
            raise ValueError("loss: weights must not be negative, and one must be above 0")
        if any((getattr(self, key) or 0) < 0 for key in ("desirable", "undesirable", "sft")):
            raise ValueError("desirable, undesirable, sft: weights, which must not be negative")
        if self.desirable == self.undesirable == 0:
            raise ValueError("desirable, undesirable: one of them must be above 0")
        if self.beta is not None and self.beta <= 0:
            raise ValueError("beta: must be above 0")
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 0.5:
            raise ValueError("label_smoothing: must be in [0, 0.5)")
        if "exo_pair" in terms and self.label_smoothing is not None and self.label_smoothing < EXO_LEAST:
            raise ValueError(f"label_smoothing: exo_pair needs at least {EXO_LEAST}, at 0 it is infinite")
        if self.tau is not None and self.tau <= 0:
            raise ValueError("tau: must be above 0")
        if self.length_alpha is not None and not 0 <= self.length_alpha <= 1:
            raise ValueError("length_alpha: must lie between 0 and 1")
        if self.rated and (self.sft or self.length_alpha is not None or self.on_policy):
            raise ValueError("sft, length_alpha, on_policy: are for pairs of answers")

    @property
    def rated(self) -> bool:
        """Single answers with a label instead of pairs."""
        return any(method(name).rated for name in preset(self.loss).terms)

    @property
    def mismatched(self) -> bool:
        """Whether answers to other prompts are needed as well."""
        return "kto" in preset(self.loss).terms
