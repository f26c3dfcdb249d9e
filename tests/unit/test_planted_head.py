"""Faults that were planted in the fused head and went unseen: sums of the head's own gradient in bfloat16, the edges of
blocks and tiles, and a vocabulary that lies on two processes."""

import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ftlib.kernels import linear_cross_entropy as head
from ftlib.kernels.linear_cross_entropy import linear_cross_entropy
from ftlib.kernels.linear_logprobs import linear_logprobs, tile_entropy
from ftlib.losses.weighted import weighted_cross_entropy

LOSSES = [linear_cross_entropy, lambda *args, **told: -linear_logprobs(*args, **told).sum()]


def exact(hidden, weight, labels):
    """Gradients by torch's own cross-entropy, in float64."""
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    return torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].T, labels, reduction="sum"), wide)


@pytest.mark.parametrize("loss", LOSSES, ids=["sum", "logprobs"])
def test_a_head_s_gradient_is_not_summed_in_bfloat16(loss, monkeypatch):
    """Of 1500 tiles of a row each that all pull the same way: bfloat16 would stop growing on its way there."""
    monkeypatch.setattr(head, "tile_rows", lambda *_: 1)
    g = torch.Generator().manual_seed(0)
    hidden = (1 + torch.rand(1500, 4, generator=g)).bfloat16()
    weight = (0.1 * torch.randn(6, 4, generator=g)).bfloat16().requires_grad_()
    labels = torch.zeros(1500, dtype=torch.int64)
    (found,) = torch.autograd.grad(loss(hidden, weight, labels), weight)
    _, wanted = exact(hidden, weight, labels)
    assert (found.double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("loss", LOSSES, ids=["sum", "logprobs"])
@pytest.mark.parametrize("size", [1, 4, 9])
def test_a_last_tile_of_one_row_counts(loss, size, monkeypatch):
    """Where all rows are targets, and that is known beforehand: tiles are slices."""
    monkeypatch.setattr(head, "tile_rows", lambda *_: size)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 4, generator=g).double(), torch.randn(6, 4, generator=g).double()
    labels = torch.randint(6, (9,), generator=g)
    given = [t.requires_grad_() for t in (hidden, weight)]
    found = loss(*given, labels, targets=9)
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, labels, reduction="sum"))
    for ours, theirs in zip(torch.autograd.grad(found, given), exact(hidden, weight, labels), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_kernel_s_rows_of_several_blocks():
    """16,384 logits are a block; the largest, and the label, lie in any. Large ones do not overflow under the cap."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    from unit.test_kernels_interpreted import interpreted

    interpreted(
        """
        import torch
        import torch.nn.functional as F
        from ftlib.kernels.cross_entropy_triton import tile_triton
        vocab = 16384 + 5
        for cap, large in ((None, 30.0), (3.0, 500.0)):
            logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(0))
            labels = torch.tensor([7, 16386, vocab - 1])
            logits[0, 16385], logits[1, vocab - 2], logits[2, 3] = large, large, large
            exact = logits.double().requires_grad_()
            z = 1.3 * exact
            z = z if cap is None else cap * torch.tanh(z / cap)
            wanted = F.cross_entropy(z, labels, reduction="none")
            (slope,) = torch.autograd.grad(wanted.sum(), exact)
            nll = tile_triton(logits, labels, 1.3, cap)
            assert (nll - wanted).abs().max() < 1e-4, (cap, nll, wanted)
            assert (logits - slope).abs().max() < 1e-6, cap
        """
    )


class Half:
    """One of two processes of a group, as a thread."""

    def __init__(self, rank):
        self._rank = rank

    def rank(self):
        return self._rank


def together(function, monkeypatch):
    """`function(group)` of two processes, whose all-reduces meet."""
    meet, given, found = threading.Barrier(2), [None, None], [None, None]

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
        given[group.rank()] = tensor.clone()
        meet.wait(20)
        tensor.copy_(torch.maximum(*given) if op == dist.ReduceOp.MAX else given[0] + given[1])
        meet.wait(20)

    def work(rank):
        found[rank] = function(Half(rank))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_vocabulary_on_two_processes(softcap, monkeypatch):
    """Logits of a few hundred, whose exponentials no float32 holds."""
    g = torch.Generator().manual_seed(0)
    logits, labels = 200 * torch.randn(6, 10, generator=g), torch.tensor([0, 4, 5, 9, 2, 7])
    wide = logits.double().requires_grad_()
    z = 1.3 * wide if softcap is None else softcap * torch.tanh(1.3 * wide / softcap)
    wanted = F.cross_entropy(z, labels, reduction="none")
    (slope,) = torch.autograd.grad(wanted.sum(), wide)
    halves = [half.clone() for half in logits.split(5, 1)]
    found = together(lambda group: head.tile_of_vocab(halves[group.rank()], labels, 1.3, softcap, group), monkeypatch)
    for nll in found:
        torch.testing.assert_close(nll, wanted.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.cat(halves, 1), slope.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_entropy_of_a_vocabulary_on_two_processes(softcap, monkeypatch):
    """One half holds nearly all of a row's weight, the other half of another's."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 10, generator=g)
    logits[0, :5] += 90
    logits[1, 5:] += 90
    z = 1.3 * logits.double()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    wanted = torch.special.entr(z.softmax(-1)).sum(-1)
    halves = logits.split(5, 1)
    for found in together(lambda group: tile_entropy(halves[group.rank()], 1.3, softcap, group), monkeypatch):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1 / 3, 1 / 20_011, 1 / 49_345])
def test_a_factor_of_all_rows_is_one_of_all_gradients(factor):
    """Rounded into bfloat16 at the labels, where most slopes are about -1, it made all gradients 0.1 % longer."""
    torch.manual_seed(0)
    hidden = torch.randn(256, 64).bfloat16().requires_grad_()
    weight = (torch.randn(512, 64) * 0.1).bfloat16().requires_grad_()
    labels = torch.randint(512, (256,))

    def gradients(loss):
        return [x.double().flatten() for x in torch.autograd.grad(loss, (hidden, weight))]

    each = torch.full((256,), factor)
    for whole, part in (
        (-linear_logprobs(hidden, weight, labels).sum(), -linear_logprobs(hidden, weight, labels).sum() * factor),
        (linear_cross_entropy(hidden, weight, labels), linear_cross_entropy(hidden, weight, labels, weights=each)),
        (weighted_cross_entropy(hidden, weight, labels), weighted_cross_entropy(hidden, weight, labels, weights=each)),
    ):
        for exact, found in zip(gradients(whole), gradients(part), strict=True):
            assert abs(float(found @ exact / (exact @ exact)) / factor - 1) < 5e-4
