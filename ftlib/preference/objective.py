"""From `dpo` of a config to one loss: resolved constants, its formula for people, and its values over a batch."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ftlib import plugins
from ftlib.data.preference_batch import Answers
from ftlib.errors import UserError, about
from ftlib.losses.preference import LOSSES, Pairs, Rated, Settings
from ftlib.sections import Dpo, methods
from ftlib.sections.dpo import CONSTANTS

FIGURES = (
    "rewards_chosen", "rewards_rejected", "accuracy", "logps_chosen", "logps_rejected",
    "token_logps_chosen", "token_logps_rejected", "length_chosen", "length_rejected",
)  # fmt: skip
SHIFTED = ("bco", "bco_pair")  # losses that subtract the mean reward so far


@dataclass(frozen=True)
class Term:
    """One method, its weight in the sum and its constants."""

    name: str
    weight: float
    loss: Callable[..., Tensor]
    settings: Settings

    @property
    def formula(self) -> str:
        """With numbers."""
        constants = asdict(self.settings)
        text = methods.method(self.name).formula.format(right=1 - self.settings.label_smoothing, **constants)
        return text if self.weight == 1 else f"{self.weight:g} * [{text}]"


@dataclass(frozen=True)
class Objective:
    """A weighted sum of methods. `length_alpha`, `on_policy`: see `ftlib.sections.Dpo`."""

    terms: tuple[Term, ...]
    length_alpha: float = 1.0
    on_policy: bool = False

    @property
    def reference(self) -> bool:
        """Whether log-probabilities of a reference are needed."""
        return any(methods.method(term.name).reference for term in self.terms)

    @property
    def mismatched(self) -> bool:
        """Whether answers to other prompts are needed: kto's baseline is their mean h."""
        return self.terms[0].name == "kto"

    @property
    def shifted(self) -> bool:
        """Whether the mean reward so far is needed, by the loss or by one of several."""
        return any(term.name in SHIFTED for term in self.terms)

    @property
    def formula(self) -> str:
        """All of it with numbers, for people."""
        text = " + ".join(term.formula for term in self.terms)
        text = f"w ({text}), w = likelihood of both answers under the policy" if self.on_policy else text
        return f"{text}; tokens behind the shorter answer x {self.length_alpha:g}" if self.length_alpha != 1 else text

    def __call__(
        self,
        answers: Answers,
        policy: Tensor,
        reference: Tensor | None,
        baseline: Tensor | float = 0.0,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss of each unit, [U], and sums for the log, detached [len(FIGURES), 2] (see `figures`).

        policy, reference [K]: `answer_logprobs`; `baseline`: the mean h of mismatched answers, or the mean reward;
        `weights` [K]: `policy_weights`.
        """
        if methods.method(self.terms[0].name).rated:
            return self._rated(answers, policy, reference, baseline)
        (chosen, rejected), (chosen_len, rejected_len) = _sides(policy), _sides(answers.lengths)
        refs = (None, None) if reference is None else _sides(reference)
        pairs = Pairs(chosen, rejected, *refs, chosen_len, rejected_len, baseline)
        values = sum(term.weight * term.loss(pairs, term.settings) for term in self.terms)
        if weights is not None:
            values = values * weights.view(-1, 2).prod(1)
        rewards = self._rewards(policy, reference, answers.lengths)
        return values, _paired_figures(rewards.detach(), policy.detach(), answers.lengths)

    def _rated(
        self, answers: Answers, policy: Tensor, reference: Tensor, baseline: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        good = answers.values > 0
        (term,) = self.terms
        values = term.weight * term.loss(Rated(policy, reference, good, baseline), term.settings)
        rewards, policy = self._rewards(policy, reference, answers.lengths).detach(), policy.detach()
        zero = baseline * term.settings.beta if self.mismatched else baseline
        right = torch.where(rewards == zero, 0.5, ((rewards > zero) == good).to(rewards.dtype))
        columns = (rewards, policy, policy / answers.lengths, answers.lengths)
        sides = [[(x * side).sum(), side.sum()] for x in columns for side in (good, ~good)]
        sides.insert(2, [right.sum(), right.new_tensor(len(right))])
        return values, torch.stack([torch.stack([n.to(rewards.dtype) for n in pair]) for pair in sides])

    def _rewards(self, policy: Tensor, reference: Tensor | None, lengths: Tensor) -> Tensor:
        """beta * h of each answer, of the log-probability where there is no reference; per token where the loss is. Of
        several losses the first's, or that of the one that subtracts their mean."""
        term = next((term for term in self.terms if term.name in SHIFTED), self.terms[0])
        h = policy if reference is None else policy - reference
        per_token = term.name in methods.PER_TOKEN or (term.name == "ipo" and term.settings.average)
        return term.settings.beta * (h / lengths if per_token else h)


def resolve(cfg: Dpo) -> Objective:
    """The loss that a config asks for; UserError if a function of the user cannot be found."""
    preset = methods.preset(cfg.loss)
    weights = dict(preset.terms)
    if cfg.sft is not None:
        weights["sft"] = cfg.sft
    terms = []
    for name, weight in weights.items():
        constants: dict[str, Any] = dict(methods.method(name).constants)
        constants |= {k: getattr(cfg, k) for k in CONSTANTS if k in constants and getattr(cfg, k) is not None}
        with about("dpo.loss"):
            loss = plugins.find("losses", name, LOSSES)
        if name not in LOSSES:
            plugins.check_call(loss, ["pairs", "settings"], {}, "dpo.loss")
            loss = _own(name, loss)
        terms.append(Term(name, weight, loss, Settings(**constants)))
    alpha = preset.length_alpha if cfg.length_alpha is None else cfg.length_alpha
    return Objective(tuple(terms), alpha, preset.on_policy if cfg.on_policy is None else cfg.on_policy)


def try_own(objective: Objective) -> None:
    """Call every function of the user on three made-up pairs, so that its mistakes show before anything is loaded."""
    for term in objective.terms:
        if term.name not in LOSSES:
            sums = (torch.tensor([-9.0, -8.0, -7.0], requires_grad=True) * scale for scale in (1.0, 1.5, 1.1, 1.4))
            term.loss(Pairs(*sums, torch.tensor([4.0, 5.0, 6.0]), torch.tensor([6.0, 4.0, 5.0])), term.settings)


def _own(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of the user whose mistakes are told with the key, its file and line."""
    given = [*(field.name for field in fields(Pairs)), "h_w", "h_l", "d"]
    mend = f"mend the function; pairs has {', '.join(given)}, settings {', '.join(f.name for f in fields(Settings))}"

    def loss(pairs: Pairs, settings: Settings) -> Tensor:
        with plugins.told(function, name, "dpo.loss", mend):
            values = function(pairs, settings)
        shape = getattr(values, "shape", None)
        if shape != pairs.chosen.shape:
            what = type(values).__name__ if shape is None else f"values of shape {list(shape)}"
            fix = "return one value for each pair: their mean over the step is taken afterwards"
            raise UserError(f"{name} returned {what} for {len(pairs.chosen)} pairs", where="dpo.loss", fix=fix)
        if pairs.chosen.requires_grad and torch.is_grad_enabled() and not values.requires_grad:
            fix = "compute it from pairs.chosen and pairs.rejected, without .detach(), .item() or torch.no_grad()"
            raise UserError(f"{name} returned values without a gradient", where="dpo.loss", fix=fix)
        return values

    return loss


def figures(sums: Tensor) -> dict[str, float]:
    """Means out of sums and counts over any number of batches and processes; null where nothing was counted.

    `accuracy`: how often the better answer has the higher reward (of rated answers: how often the reward is on the
    right side of the baseline); a tie, as all are before the first step, counts as one half."""
    found = {name: s / n if n else None for name, (s, n) in zip(FIGURES, sums.tolist(), strict=True)}
    both = found["rewards_chosen"], found["rewards_rejected"]
    return found | {"margin": None if None in both else both[0] - both[1]}


def better(won: Tensor, lost: Tensor) -> Tensor:
    """1 where the first is greater, 0 where it is less, one half for a tie; of the same shape and dtype."""
    return (1 + torch.sign(won - lost)) / 2


def running_mean(counters: dict[str, Any], sums: Tensor) -> None:
    """Take the rewards of a step (`sums` over all processes) into the mean of all so far, which bco subtracts."""
    (total, count), before = sums[:2].sum(0).tolist(), counters.get("rewards", 0)
    counters["rewards"] = before + count
    counters["mean_reward"] = (counters.get("mean_reward", 0.0) * before + total) / max(1, before + count)


def _sides(values: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected answers of pairs that stand side by side."""
    return values.view(-1, 2).unbind(1)


def _paired_figures(rewards: Tensor, policy: Tensor, lengths: Tensor) -> Tensor:
    won, lost = _sides(rewards)
    columns = (won, lost, better(won, lost), *_sides(policy), *_sides(policy / lengths), *_sides(lengths))
    sums = torch.stack([x.sum().to(rewards.dtype) for x in columns])
    return torch.stack((sums, torch.full_like(sums, len(won))), 1)
