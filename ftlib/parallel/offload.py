"""What blocks keep for backward, in pinned host memory meanwhile, moved on a stream of its own."""

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, UntypedStorage, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

LEAVING = 2  # storages whose copy to the host may still run while the next layer is computed


@dataclass(eq=False)
class _Parked:
    """One storage on its way to the host, on the host, or on its way back."""

    place: int  # in the order of the forward
    host: Tensor  # bytes
    arrived: torch.cuda.Event  # the copy to the host is done
    views: int = 0  # tensors that backward will still ask for
    device: Tensor | None = None  # the copy back, once it has begun
    returned: torch.cuda.Event | None = None


@dataclass(frozen=True)
class _View:
    """A saved tensor, as a view of a parked storage."""

    parked: _Parked
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def attach(model: nn.Module, layers: int = 0) -> None:
    """Park what the first `layers` blocks (0: all) of a model keep for backward in host memory; weights stay. The model
    has weights, on a GPU.

    But for an embedding that is neither trained, nor the head's, nor sharded: its rows are read out of host memory.
    """
    embedding = model.model.embed_tokens
    if not (embedding.weight.requires_grad or model.arch.tied or isinstance(embedding.weight, DTensor)):
        from ftlib.kernels.host_embedding import host_embedding  # Triton is there where there is a GPU

        embedding.weight = nn.Parameter(embedding.weight.detach().cpu().pin_memory(), requires_grad=False)
        embedding.forward = partial(host_embedding, table=embedding.weight)
    parking = HostOffload(_addresses(model))
    for block in model.model.layers:
        if isinstance(block, FSDPModule):
            block.register_forward_pre_hook(parking.enter)  # behind FSDP2's, which makes its weights whole
    model.model.parked = layers or len(model.model.layers)
    model.model.saving = lambda: torch.autograd.graph.saved_tensors_hooks(parking.pack, parking.unpack)


def detach(model: nn.Module, device: torch.device) -> None:
    """Undo `attach`, between two steps."""
    embedding = model.model.embed_tokens
    if embedding.__dict__.pop("forward", None) is not None:
        embedding.weight = nn.Parameter(embedding.weight.detach().to(device), requires_grad=False)
    model.model.saving, model.model.parked = nullcontext, len(model.model.layers)


def _addresses(module: nn.Module) -> frozenset[int]:
    """Where this process's parts of its weights lie."""
    parts = (t.to_local() if isinstance(t, DTensor) else t for t in (*module.parameters(), *module.buffers()))
    return frozenset(part.untyped_storage().data_ptr() for part in parts)


@dataclass(eq=False)
class HostOffload:
    """Hooks for tensors that autograd saves (torch.autograd.graph.saved_tensors_hooks).

    Whole storages move, once each, however many views of one are kept, and a view comes back with its strides:
    compiled code insists on them. Backward asks from the last layer to the first, so unpacking one starts the copy of
    the nearest earlier one: the transfer runs while the layer in between is computed. Host buffers are reused from
    step to step. Storages of less than `smallest` bytes stay where they are.

    Device memory is given back in the order of the compute stream, which waits for a copy that is `LEAVING` storages
    late: how much is held does not depend on how far the host runs ahead.
    """

    weights: frozenset[int]  # addresses of storages that stay
    gathered: frozenset[int] = frozenset()  # of the block at work, which FSDP2 frees behind it and gathers again
    smallest: int = 8 << 20
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    _parked: list[_Parked] = field(default_factory=list)
    _moved: dict[int, tuple[StorageWeakRef, _Parked]] = field(default_factory=dict)  # address -> who lives there
    _leaving: deque[tuple[torch.cuda.Event, Tensor]] = field(default_factory=deque)
    _backward: bool = False
    _free: dict[int, list[Tensor]] = field(default_factory=dict)  # bytes -> host buffers

    def enter(self, block: nn.Module, _: tuple) -> None:
        """Before the forward of a block whose weights were gathered for it."""
        self.gathered = _addresses(block)

    def stays(self, storage: UntypedStorage) -> bool:
        """Whether it is a weight's."""
        return storage.data_ptr() in self.weights or storage.data_ptr() in self.gathered

    def pack(self, tensor: Tensor) -> Tensor | _View:
        """Start the copy to the host; what autograd keeps instead of the tensor."""
        storage = tensor.untyped_storage()
        if tensor.device.type != "cuda" or storage.nbytes() < self.smallest or self.stays(storage):
            return tensor
        if self._backward:  # a new forward
            self._parked.clear()
            self._moved.clear()
            self._leaving.clear()
            self._backward = False
        known, parked = self._moved.get(storage.data_ptr(), (None, None))
        if known is None or known.expired():  # freed, and another lives there now
            parked = self._park(storage)
            self._moved[storage.data_ptr()] = StorageWeakRef(storage), parked
        parked.views += 1
        return _View(parked, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self, kept: Tensor | _View) -> Tensor:
        """The tensor again, and a head start for the storage before it."""
        if isinstance(kept, Tensor):
            return kept
        self._backward = True
        self._let_go(0)
        parked = kept.parked
        self._fetch(parked)
        for earlier in reversed(self._parked[: parked.place]):
            if earlier.device is None and earlier.returned is None:
                self._fetch(earlier)
                break
        storage = parked.device
        torch.cuda.current_stream().wait_event(parked.returned)
        parked.views -= 1
        if not parked.views:
            parked.device = None
            # A later step copies into the host buffer on the same stream, hence after the copy out of it.
            self._free[parked.host.numel()].append(parked.host)
        typed = torch.empty(0, dtype=kept.dtype, device=storage.device)
        return typed.set_(storage.untyped_storage(), kept.offset, kept.size, kept.stride)

    def _park(self, storage: UntypedStorage) -> _Parked:
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        pool = self._free.setdefault(flat.numel(), [])
        host = pool.pop() if pool else torch.empty(flat.numel(), dtype=torch.uint8, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(flat, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._leaving.append((arrived, flat))
        self._let_go(LEAVING)
        self._parked.append(_Parked(len(self._parked), host, arrived))
        return self._parked[-1]

    def _let_go(self, keep: int) -> None:
        while len(self._leaving) > keep:
            arrived, _ = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(arrived)

    def _fetch(self, parked: _Parked) -> None:
        if parked.device is not None:
            return
        parked.device = torch.empty(parked.host.numel(), dtype=torch.uint8, device="cuda")
        self.stream.wait_stream(torch.cuda.current_stream())  # whoever had this memory is done with it
        with torch.cuda.stream(self.stream):
            parked.device.copy_(parked.host, non_blocking=True)
            parked.returned = torch.cuda.Event()
            parked.returned.record()
