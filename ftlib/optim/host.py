"""State of an optimizer in host memory: a parameter's comes to the device for its step and goes back, beside other
work. (ZeRO-Offload, Ren et al. 2021, arXiv 2101.06840, steps on the host; here the device does, with the same bits.)"""

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.cuda import Event, Stream
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ftlib.optim.pieces import local

LEAVING = 1  # parameters whose state may still be on its way to the host while the next is stepped
Slots = dict[str, Tensor]


class _Visit(NamedTuple):
    """A parameter's state on the device. `done`: it is here, or on the host again; `owner`: whose memory it is in."""

    slots: Slots
    done: Event | None
    owner: Stream | None


class HostState:
    """Steps an optimizer whose state waits in pinned host memory; on a CPU it is copied likewise, within its memory.

    While one parameter is stepped, the state of the one that followed it in the last step comes in and that of the one
    before goes out, each on a stream of its own: three parameters' state is on the device at the most. Scalars stay
    there. Device memory is given back in the order of the stream it belongs to, which waits for the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._in, self._out = (Stream(device), Stream(device)) if self._cuda else (None, None)
        self._ahead: dict[Tensor, _Visit] = {}  # on their way before their step
        self._next: dict[Tensor, Tensor] = {}  # who followed whom
        self._last: Tensor | None = None
        self._sent: dict[Tensor, Event | None] = {}
        self._leaving: deque[_Visit] = deque()

    def step(self, optimizer: Optimizer, group: dict, p: Tensor) -> None:
        """`optimizer.update` of one parameter of a group."""
        state = optimizer.state[p]
        home, visit = _slots(state), self._ahead.pop(p, None) or self._fetch(optimizer, p)
        self._follow(optimizer, p)
        if self._cuda:
            torch.cuda.current_stream().wait_event(visit.done)
        state |= visit.slots
        optimizer.update({**group, "params": [p]})
        self._send(p, state, home, visit.owner)

    def end(self) -> None:
        """After the last parameter of a step: nothing is on the device any more."""
        self._leaving += self._ahead.values()  # had no gradient this time
        self._ahead.clear()
        self._release(0)
        self._last = None

    def wait(self) -> None:
        """Until the host may read and write the state."""
        if self._cuda:
            self._out.synchronize()

    def _follow(self, optimizer: Optimizer, p: Tensor) -> None:
        """Note who comes after whom, and bring in who is next."""
        if self._last is not None:
            self._next[self._last] = p
        self._last = p
        self._release(LEAVING)
        following = self._next.get(p)
        if following is not None and following not in self._ahead and optimizer.state.get(following):
            self._ahead[following] = self._fetch(optimizer, following)

    def _fetch(self, optimizer: Optimizer, p: Tensor) -> _Visit:
        home = _slots(optimizer.state[p])
        slots = {name: _with(x, torch.empty_like(local(x), device=local(p).device)) for name, x in home.items()}
        owner = torch.cuda.current_stream() if self._cuda else None
        if self._cuda:
            self._in.wait_stream(owner)  # whoever had this memory is done with it
            if self._sent.get(p) is not None:
                self._in.wait_event(self._sent[p])
        with self._on(self._in):
            for name, x in home.items():
                local(slots[name]).copy_(local(x), non_blocking=True)
            return _Visit(slots, self._in.record_event() if self._cuda else None, owner)

    def _send(self, p: Tensor, state: dict, home: Slots, owner: Stream | None) -> None:
        slots = _slots(state)
        if self._cuda:
            self._out.wait_stream(torch.cuda.current_stream())
        with self._on(self._out):
            for name, x in slots.items():
                if name not in home:
                    home[name] = _with(x, torch.empty_like(local(x), device="cpu", pin_memory=self._cuda))
                local(home[name]).copy_(local(x), non_blocking=True)
            sent = self._out.record_event() if self._cuda else None
        state |= home
        self._sent[p] = sent
        self._leaving.append(_Visit(slots, sent, owner))

    def _release(self, keep: int) -> None:
        while len(self._leaving) > keep:
            visit = self._leaving.popleft()
            if visit.owner is not None:
                visit.owner.wait_event(visit.done)

    def _on(self, stream: Stream | None) -> AbstractContextManager:
        return torch.cuda.stream(stream) if stream is not None else nullcontext()


def _slots(state: dict) -> Slots:
    return {name: x for name, x in state.items() if isinstance(x, Tensor) and x.ndim > 0}


def _with(x: Tensor, part: Tensor) -> Tensor:
    """`x`, its local part being `part`: DTensor.from_local would move it to the mesh's device."""
    return DTensor(part, x._spec, requires_grad=False) if isinstance(x, DTensor) else part
