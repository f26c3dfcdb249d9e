"""Log-probabilities of whole answers, out of the hidden states of packed rows. Only rows that predict a trained token
go through the head, and sums are float32 whatever the model's dtype."""

import torch
from torch import Tensor

from ftlib.data.preference_batch import Answers
from ftlib.kernels.linear_logprobs import linear_logprobs


def answer_logprobs(
    hidden: Tensor,
    head: Tensor,
    answers: Answers,
    *,
    length_alpha: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """log p(answer | prompt) of each answer, float32 [K].

    hidden [B, T, D]; head [V, D]; `scale` and `softcap` are the model's (`LanguageModel.logit_terms`). `length_alpha`
    weighs the tokens of a pair's longer answer behind the length of the shorter one (Liu et al. 2024, arXiv
    2409.06411): to be used for policy and reference alike.
    """
    logprobs = _of_tokens(hidden, head, answers, scale=scale, softcap=softcap)
    if length_alpha != 1.0:
        shorter = answers.lengths.view(-1, 2).amin(1).repeat_interleave(2)
        logprobs = logprobs.where(answers.places < shorter[answers.owners], length_alpha * logprobs)
    return _per_answer(logprobs, answers)


@torch.no_grad()
def policy_weights(
    hidden: Tensor, head: Tensor, answers: Answers, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """How likely the policy is to write an answer itself, beside how likely it writes anything, float32 [K].

    exp(mean over tokens of log p(token) - log sum_v p(v)^2) (Zhou et al. 2024, arXiv 2406.11827, with their alignment
    of weights). At temperature 1/2 a token has log p' = 2 log p - log sum_v p(v)^2, so two calls of the head give it.
    """
    terms = {"scale": scale, "softcap": softcap}
    warm, cold = (_of_tokens(hidden, head, answers, temperature=t, **terms) for t in (1.0, 0.5))
    return (_per_answer(cold - warm, answers) / answers.lengths).exp()


def _of_tokens(hidden: Tensor, head: Tensor, answers: Answers, **terms: float | None) -> Tensor:
    rows = hidden.flatten(0, 1)[answers.rows]
    return linear_logprobs(rows, head, answers.targets, targets=len(answers.targets), **terms)


def _per_answer(values: Tensor, answers: Answers) -> Tensor:
    """Sums in the order of the tokens: equal log-probabilities of tokens give equal ones of answers."""
    return torch.segment_reduce(values, "sum", lengths=answers.lengths.long(), unsafe=True)
