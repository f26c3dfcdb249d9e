"""`memory.offload` without a GPU: which storages leave, which come back, and when.

The bookkeeping had no test that runs here. A stand-in for CUDA's streams keeps a copy in a queue until somebody waits
for it, and tensors on the CPU pass for those of a GPU.
"""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ftlib.parallel import offload


class Stream(TorchFunctionMode):
    """Of copies: they run when their event is waited for, and not into or out of memory that was given back."""

    def __init__(self):
        super().__init__()
        self.queue, self.done, self.behind, self.copies = [], 0, False, []

    def wait_stream(self, other):
        assert other is COMPUTE
        self.behind = True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            assert self.behind, "a copy does not wait for the computation before it"
            self.behind = False
            self.queue.append([weakref.ref(t) for t in args[:2]])
            self.copies.append(args[1].numel())
            return args[0]
        return function(*args, **(kwargs or {}))

    def run_until(self, count):
        while self.done < count:
            to, source = (ref() for ref in self.queue[self.done])
            assert to is not None and source is not None, "memory was given back under a copy"
            self.done += 1
            to.copy_(source)


class Event:
    """Where the stream of copies stood."""

    def record(self):
        self.at = len(STREAM.queue)


COMPUTE = SimpleNamespace(wait_event=lambda event: STREAM.run_until(event.at))


@contextmanager
def on(stream):
    with stream:
        yield


class Torch:
    """What the module sees of torch: host memory is not pinned, and what is there before a copy is no number."""

    cuda = SimpleNamespace(Event=Event, stream=on, current_stream=lambda: COMPUTE)
    made: list[int] = []  # noqa: RUF012 - bytes of each host buffer

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *size, pin_memory=False, device=None, **how):
        if pin_memory:
            self.made.append(size[0])
        made = torch.empty(*size, **how)
        return made.fill_(255) if made.dtype == torch.uint8 else made


class OnGpu:
    """A tensor that says that it is on a GPU."""

    device = SimpleNamespace(type="cuda")

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    global STREAM
    STREAM, made = Stream(), Torch()
    made.made.clear()
    monkeypatch.setattr(offload, "torch", made)
    return made


def parking(weights=(), smallest=0):
    return offload.HostOffload(
        frozenset(w.untyped_storage().data_ptr() for w in weights), smallest=smallest, stream=STREAM
    )


def pack(parked, tensor):
    kept = parked.pack(OnGpu(tensor))
    return kept.tensor if isinstance(kept, OnGpu) else kept


def step(weights, x, hooks):
    """Gradients of layers that keep views of one storage: halves, and a transposed one."""
    with hooks:
        for weight in weights:
            first, second = (x @ weight.T).chunk(2, -1)
            x = torch.tanh(first * second.sin()) @ (x.T @ x).exp().clamp(max=2.0)[: first.shape[1]]
    return torch.autograd.grad(x.square().sum(), weights)


def test_gradients_are_the_same_and_host_memory_is_used_again(stand_in):
    g = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(10, 6, generator=g) * 0.5) for _ in range(5)]
    parked, buffers = parking(weights), []
    for _ in range(3):
        x = torch.randn(7, 6, generator=g)
        wanted = step(weights, x, torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: pack(parked, t), parked.unpack)
        found = step(weights, x, hooks)
        assert all(torch.equal(ours, plain) for ours, plain in zip(found, wanted, strict=True))
        buffers.append(len(stand_in.made))
    assert buffers[0] == buffers[1] == buffers[2] > 10
    assert STREAM.done == len(STREAM.queue), "every copy was waited for"


def test_a_storage_moves_once_and_its_views_come_back_as_they_were():
    parked, x = parking(), torch.arange(24.0).view(4, 6)
    views = [x.T, x[1:, 2:], x.flatten()[5:17:3]]
    kept = [pack(parked, view) for view in views]
    assert STREAM.copies == [96]
    for entry, view in zip(reversed(kept), reversed(views), strict=True):
        back = parked.unpack(entry)
        assert torch.equal(back, view) and back.stride() == view.stride()
        assert back.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert STREAM.copies == [96, 96], "there and back"


def test_another_storage_at_the_address_of_one_that_was_freed_is_another():
    parked = parking()
    first, second = torch.zeros(8), torch.ones(8)
    old = pack(parked, first)
    parked._let_go(0)
    address = first.untyped_storage().data_ptr()
    del first
    parked._moved[second.untyped_storage().data_ptr()] = parked._moved.pop(address)  # as the allocator may do
    new = pack(parked, second)
    assert parked.unpack(new).tolist() == [1.0] * 8 and parked.unpack(old).tolist() == [0.0] * 8


def test_what_stays():
    """Weights, those that were gathered for the block at work, what is small, and what is on no GPU."""
    weight, gathered, large, small = (nn.Parameter(torch.randn(n)) for n in (64, 64, 64, 8))
    parked = parking([weight], smallest=200)
    block = nn.Module()
    block.weight = gathered
    parked.enter(block, ())
    assert pack(parked, weight.view(8, 8)).data_ptr() == weight.data_ptr()
    assert pack(parked, gathered) is gathered and pack(parked, small) is small and parked.pack(large) is large
    assert STREAM.copies == []
    parked.enter(nn.Module(), ())
    for tensor in (gathered, large):
        assert isinstance(pack(parked, tensor), offload._View)


def test_the_one_before_is_on_its_way_while_one_is_read():
    """And nothing else: two are on the device at a time."""
    parked = parking()
    tensors = [torch.full((4,), float(i)) for i in range(5)]
    kept = [pack(parked, tensor) for tensor in tensors]
    held = []
    for i in reversed(range(5)):
        assert parked.unpack(kept[i]).tolist() == [float(i)] * 4
        held.append([entry.place for entry in parked._parked if entry.device is not None])
    assert held == [[3], [2], [1], [0], []]


def test_a_forward_behind_a_backward_begins_anew():
    """What is still alive from the step before, a tensor that all steps read, is copied again with its new numbers."""
    parked, x = parking(), torch.zeros(4)
    assert parked.unpack(pack(parked, x)).tolist() == [0.0] * 4
    x += 3
    kept = pack(parked, x)
    assert len(parked._parked) == 1 and parked.unpack(kept).tolist() == [3.0] * 4


class Decoder(nn.Module):
    """As far as `attach` looks."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding(5, 3), nn.ModuleList([nn.Linear(3, 3)])
        self.saving = None


@pytest.mark.parametrize(
    ("trained", "tied", "moves"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_only_an_embedding_that_nobody_else_uses_is_read_from_the_host(trained, tied, moves, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(
        offload, "HostOffload", lambda weights: SimpleNamespace(weights=weights, pack=None, unpack=None)
    )
    model = nn.Module()
    model.model, model.arch = Decoder(), SimpleNamespace(tied=tied)
    model.model.embed_tokens.weight.requires_grad_(trained)
    before = model.model.embed_tokens.weight
    offload.attach(model)
    embedding = model.model.embed_tokens
    assert ("forward" in vars(embedding)) is moves is (embedding.weight is not before)
    assert torch.equal(embedding.weight, before) and embedding.weight.requires_grad is trained
    offload.detach(model, torch.device("meta"))
    assert "forward" not in vars(embedding) and embedding.weight.is_meta is moves
    with model.model.saving():
        pass
