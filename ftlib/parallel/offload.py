"""Block inputs kept in pinned host memory between forward and backward, moved on a stream of their own."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class _Parked:
    """One tensor on its way to the host, on the host, or on its way back."""

    host: Tensor
    arrived: torch.cuda.Event  # the copy to the host is done
    device: Tensor | None = None  # the copy back, once it has begun
    returned: torch.cuda.Event | None = None


@dataclass(eq=False)
class HostOffload:
    """`with torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack):` around what saves large tensors.

    Tensors come back in the reverse of the order they left, so unpacking one starts the copy of the one before it: the
    transfer runs while the block in between is computed. Host buffers are reused from step to step. Tensors of less
    than `smallest` bytes stay where they are.
    """

    smallest: int = 1 << 20
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    _parked: list[_Parked] = field(default_factory=list)
    _free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Tensor | _Parked:
        """Start the copy to the host; what autograd keeps instead of the tensor."""
        if tensor.numel() * tensor.element_size() < self.smallest or tensor.device.type != "cuda":
            return tensor
        pool = self._free.setdefault((tensor.shape, tensor.dtype), [])
        host = pool.pop() if pool else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        tensor.record_stream(self.stream)  # its memory is not handed out before the copy is done
        parked = _Parked(host, arrived)
        self._parked.append(parked)
        return parked

    def unpack(self, kept: Tensor | _Parked) -> Tensor:
        """The tensor again, and a head start for the one before it."""
        if isinstance(kept, Tensor):
            return kept
        self._fetch(kept)
        at = self._parked.index(kept)
        if at:
            self._fetch(self._parked[at - 1])
        del self._parked[at:]
        current = torch.cuda.current_stream()
        current.wait_event(kept.returned)
        kept.device.record_stream(current)
        # A later step copies into it on the same stream, hence after the copy out of it.
        self._free[kept.host.shape, kept.host.dtype].append(kept.host)
        return kept.device

    def _fetch(self, parked: _Parked) -> None:
        if parked.device is not None:
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(parked.arrived)
            parked.device = torch.empty(parked.host.shape, dtype=parked.host.dtype, device="cuda")
            parked.device.copy_(parked.host, non_blocking=True)
            parked.returned = torch.cuda.Event()
            parked.returned.record()
