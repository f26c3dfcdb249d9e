"""Masked diffusion of text: tokens are hidden at random, the model restores them from both sides."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ftlib.kernels.linear_logprobs import linear_logprobs
from ftlib.layers.batch import IGNORED, Batch, Layout
from ftlib.layers.bidirectional import Bidirectional

MASK = "diffusion.mask_token"  # key of a run's config, and of the record beside the weights that it trained


@dataclass
class Noised:
    """A batch whose hidden tokens are the mask token and whose labels are those tokens in place, not shifted;
    `weights` float32 [B, T] are 1 / p of each, p the chance with which its document's tokens were hidden, times the
    weight that the batch gives it."""

    batch: Batch
    weights: Tensor


def hide(batch: Batch, mask_id: int, least: float, seeds: list[int], seq_len: int | None = None) -> Noised:
    """The forward process of LLaDA (Nie et al. 2025, arXiv 2502.09992, algorithm 1), on the CPU.

    Each document draws t from U(0, 1), and each of its trained tokens is hidden with chance p = (1 - least) t + least.
    Row i draws from a generator seeded with seeds[i] alone, as many numbers as a row of `seq_len` tokens takes (None:
    of its own): noise depends neither on how rows are split over processes nor on how wide those without packing are.
    """
    ids, shape = batch.input_ids, batch.input_ids.shape
    most = seq_len or shape[1]
    trained = torch.zeros(shape, dtype=torch.bool)
    trained[:, 1:] = batch.labels[:, :-1] != IGNORED  # labels were shifted: the first token of a document has none
    documents = batch.layout.document_ids.long()
    chance, dice = torch.empty(shape), torch.empty(shape)
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        t = torch.rand(most + 1, generator=generator)
        chance[row] = (1 - least) * t[documents[row] - documents[row, 0]] + least
        dice[row] = torch.rand(most, generator=generator)[: shape[1]]
    hidden = trained & (dice < chance)
    labels = torch.where(hidden, ids, IGNORED)
    changed = replace(
        batch,
        input_ids=torch.where(hidden, mask_id, ids),
        labels=labels,
        layout=Bidirectional(batch.layout),
        target_tokens=int(hidden.sum()),
        weights=None,
    )
    own = 1 if batch.weights is None else torch.roll(batch.weights, 1, 1)  # of the tokens themselves, as their labels
    return Noised(changed, torch.where(hidden, own / chance, 0.0))


def diffusion_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, targets: int | None = None, **terms: float | None
) -> Tensor:
    """Sum over hidden tokens of weight * -log p(token): divided by the trained tokens, hidden or not, a bound on the
    mean -log likelihood (LLaDA, eq. 3). hidden [B, T, D]; labels, weights [B, T]; `terms` as in `next_token_loss`."""
    logprobs = linear_logprobs(hidden.flatten(0, 1), head, labels.flatten(), targets=targets, **terms)
    return -(logprobs * weights.flatten()).sum()


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: list[list[int]],
    length: int,
    mask_id: int,
    *,
    steps: int = 32,
    block: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """`length` tokens behind each prompt, by the reverse process with low-confidence remasking (LLaDA, algorithm 5).

    All start hidden. In each of `steps` rounds all hidden tokens are guessed, and the most certain stay, as many as
    make the number that is left fall evenly. `block`: tokens of one block are finished before the next begins. At a
    temperature the guess is drawn, else it is the most likely token; the mask token is never guessed.
    """
    device, generator = model.lm_head.weight.device, torch.Generator().manual_seed(seed)
    block = block or length
    found = []
    for prompt in prompts:
        ids = torch.tensor([[*prompt, *[mask_id] * length]], device=device)
        for start in range(len(prompt), ids.shape[1], block):
            stop = min(start + block, ids.shape[1])
            rounds = max(1, min(stop - start, steps * (stop - start) // length))
            for done in range(rounds):
                open_ = (ids[0, start:stop] == mask_id).nonzero()[:, 0] + start
                keep = len(open_) - len(open_) * (rounds - done - 1) // (rounds - done)
                guess, certain = _guess(model, ids, open_, mask_id, temperature, generator)
                best = certain.topk(keep).indices
                ids[0, open_[best]] = guess[best]
        found.append(ids[0, len(prompt) :].tolist())
    return found


def _guess(
    model: nn.Module, ids: Tensor, places: Tensor, mask_id: int, temperature: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A token for each place, and the model's probability of it."""
    count = ids.shape[1]
    layout = Layout.packed(torch.tensor([0, count], dtype=torch.int32, device=ids.device), count, (1, count))
    positions = torch.arange(count, device=ids.device)[None]
    batch = Batch(ids, torch.full_like(ids, IGNORED), positions, Bidirectional(layout), target_tokens=0)
    logits = model.head(model(batch)[0, places]).float()
    logits[:, mask_id] = -torch.inf
    chances = logits.softmax(-1)
    if temperature == 0:
        guess = chances.argmax(-1)
    else:
        drawn = (logits / temperature).softmax(-1).cpu()
        guess = torch.multinomial(drawn, 1, generator=generator)[:, 0].to(ids.device)
    return guess, chances.gather(1, guess[:, None])[:, 0]
