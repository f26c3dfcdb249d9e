"""What blocks keep for backward, in pinned host memory meanwhile, moved on a stream of its own."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class _Parked:
    """One tensor on its way to the host, on the host, or on its way back."""

    place: int  # in the order of the forward
    host: Tensor
    arrived: torch.cuda.Event  # the copy to the host is done
    device: Tensor | None = None  # the copy back, once it has begun
    returned: torch.cuda.Event | None = None


def attach(model: nn.Module) -> None:
    """Park what the blocks of a model (with weights, on a GPU) keep for backward in host memory; weights stay."""
    weights = frozenset(tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    parking = HostOffload(weights)
    model.model.saving = lambda: torch.autograd.graph.saved_tensors_hooks(parking.pack, parking.unpack)


@dataclass(eq=False)
class HostOffload:
    """Hooks for tensors that autograd saves (torch.autograd.graph.saved_tensors_hooks).

    Backward asks for them from the last layer to the first, so unpacking one starts the copy of the nearest earlier
    one: the transfer runs while the layer in between is computed. Host buffers are reused from step to step. Tensors
    of less than `smallest` bytes stay where they are.
    """

    weights: frozenset[int]  # addresses of storages that stay
    smallest: int = 8 << 20
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    _parked: list[_Parked] = field(default_factory=list)
    _backward: bool = False
    _free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Tensor | _Parked:
        """Start the copy to the host; what autograd keeps instead of the tensor."""
        if tensor.numel() * tensor.element_size() < self.smallest or tensor.device.type != "cuda":
            return tensor
        if tensor.untyped_storage().data_ptr() in self.weights:
            return tensor
        if self._backward:  # a new forward
            self._parked.clear()
            self._backward = False
        pool = self._free.setdefault((tensor.shape, tensor.dtype), [])
        host = pool.pop() if pool else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        tensor.record_stream(self.stream)  # its memory is not handed out before the copy is done
        self._parked.append(_Parked(len(self._parked), host, arrived))
        return self._parked[-1]

    def unpack(self, kept: Tensor | _Parked) -> Tensor:
        """The tensor again, and a head start for the one before it."""
        if isinstance(kept, Tensor):
            return kept
        self._backward = True
        self._fetch(kept)
        for earlier in reversed(self._parked[: kept.place]):
            if earlier.device is None and earlier.returned is None:
                self._fetch(earlier)
                break
        tensor, kept.device = kept.device, None
        torch.cuda.current_stream().wait_event(kept.returned)
        tensor.record_stream(torch.cuda.current_stream())
        # A later step copies into the host buffer on the same stream, hence after the copy out of it.
        self._free[kept.host.shape, kept.host.dtype].append(kept.host)
        return tensor

    def _fetch(self, parked: _Parked) -> None:
        if parked.device is not None:
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(parked.arrived)
            parked.device = torch.empty(parked.host.shape, dtype=parked.host.dtype, device="cuda")
            parked.device.copy_(parked.host, non_blocking=True)
            parked.returned = torch.cuda.Event()
            parked.returned.record()
