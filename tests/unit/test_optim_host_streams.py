"""The streams of optimizer state in host memory, without a GPU: copies that run as late, or as early, as they may.

A stand-in for CUDA's streams keeps asynchronous copies in a queue until someone waits for them. What is stepped on, or
read on the host, before its copy was waited for is then wrong, memory that is freed under a copy is missed, and a copy
that does not wait for the computation before it is told so.
"""

import weakref
from contextlib import contextmanager

import pytest
import torch
from test_optim_host import Net
from torch.overrides import TorchFunctionMode

from ftlib import optim
from ftlib.optim import host
from ftlib.sections import Optim


class Fake:
    """A stream: copies and waits in order. `early`: what may run runs at once; else only when somebody waits."""

    def __init__(self, early=False):
        self.queue, self.done, self.early, self.seen = [], 0, early, -1

    def record_event(self):
        return self, self.done + len(self.queue)

    def wait_event(self, event):
        self.add(event)

    def wait_stream(self, other):
        self.seen = device.clock
        assert other is device.compute

    def add(self, item):
        self.queue.append(item)
        while self.early and self.queue and not self.blocked():
            self.run_one()

    def blocked(self):
        first = self.queue[0]
        return isinstance(first, tuple) and first[0].done < first[1]

    def run_until(self, count):
        while self.done < count:
            self.run_one()

    def run_one(self):
        first = self.queue[0]
        first[0].run_until(first[1]) if isinstance(first, tuple) else first()
        self.queue.pop(0)
        self.done += 1

    def synchronize(self):
        self.run_until(self.done + len(self.queue))


class Compute(Fake):
    """The stream of the computation, which is always up to date: waiting is waiting."""

    def wait_event(self, event):
        event[0].run_until(event[1])


class Device(TorchFunctionMode):
    """What the module under test sees of CUDA."""

    def __init__(self, early_in, early_out):
        super().__init__()
        self.compute, self.clock, self.made = Compute(), 0, [early_in, early_out]
        self.current = self.compute

    def stream(self, _):
        return Fake(self.made.pop(0))

    @contextmanager
    def use(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty_like:
            kwargs.pop("pin_memory", None)
            return function(*args, **kwargs).fill_(float("nan"))
        if function is torch.Tensor.copy_ and kwargs.get("non_blocking"):
            assert self.current.seen == self.clock, "a copy does not wait for the computation before it"
            self.current.add(self.later(*args))
            return args[0]
        return function(*args, **kwargs)

    def later(self, to, source):
        to, source = weakref.ref(to), weakref.ref(source)

        def copy():
            assert to() is not None and source() is not None, "memory was freed under a copy"
            to().detach().copy_(source())

        return copy


@pytest.fixture(params=[(a, b) for a in (False, True) for b in (False, True)], ids=str)
def cuda(request, monkeypatch):
    global device
    device = Device(*request.param)
    monkeypatch.setattr(host, "Stream", device.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: device.compute)
    monkeypatch.setattr(torch.cuda, "stream", device.use)
    return device


def train(offloaded, in_backward, steps):
    model = Net(torch.float32)
    optimizer = optim.build(model, Optim(lr=1e-2, weight_decay=0.1, in_backward=in_backward, offload=offloaded))
    if offloaded:
        optimizer.host = host.HostState(torch.device("cuda"))
        update, move = optimizer.update, optimizer.move

        def counted(group):
            device.clock += 1
            update(group)

        def seen(group):
            with device:  # a mode does not reach into backward
                move(group)

        optimizer.update, optimizer.move = counted, seen
        if in_backward:
            optimizer.in_backward._host = optimizer.host
    for step in range(steps):
        x = torch.randn(8, 448, generator=torch.Generator().manual_seed(step))
        model(x, whole=step % 3 != 1).square().mean().backward()
        optim.step(optimizer, None)
    return model, optimizer


@pytest.mark.parametrize("in_backward", [False, True])
def test_nothing_is_used_before_it_is_there(cuda, in_backward):
    wanted, plain = train(False, in_backward, 8)
    model, optimizer = train(True, in_backward, 8)
    optimizer.host.wait()
    for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(a, b)
        for slot, value in plain.state[b].items():
            assert torch.equal(torch.as_tensor(optimizer.state[a][slot]), torch.as_tensor(value)), slot


def test_state_that_is_still_on_its_way_out_is_not_fetched(cuda):
    """Two parameters in turns, with no end of a step in between."""
    found = []
    for offloaded in (False, True):
        model, optimizer = train(offloaded, False, 1)
        pair = [model.first.weight, model.last.weight]
        group = next(group for group in optimizer.param_groups if any(p is pair[0] for p in group["params"]))
        for p in pair:
            p.grad = torch.ones_like(p)
        with torch.no_grad():
            for _ in range(3):
                optimizer.move({**group, "params": pair}) if offloaded else optimizer.step()
        found.append(pair)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_host_reads_when_all_copies_are_done(cuda):
    optimizer = train(True, False, 1)[1]
    out = optimizer.host._out
    out.queue.append(lambda: None)
    optimizer.host.wait()
    assert not out.queue


def test_memory_goes_back_to_the_stream_that_it_came_from(cuda):
    """Hooks in backward may run on another stream than the one on which state was fetched ahead."""
    model, optimizer = train(True, False, 2)
    p, before = model.first.weight, device.compute
    group = next(group for group in optimizer.param_groups if any(p is q for q in group["params"]))
    p.grad = torch.ones_like(p)
    with cuda, torch.no_grad():
        optimizer.host._ahead[p] = optimizer.host._fetch(optimizer, p)
        device.compute = Compute()
        optimizer.host.step(optimizer, group, p)
    assert optimizer.host._leaving[-1].owner is before is not device.compute
