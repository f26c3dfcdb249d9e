"""Writing a checkpoint while training goes on: a copy in host memory first, then files, in a thread."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ftlib.parallel.pulse import patient_group


class Background:
    """One piece of work at a time, in a thread with a process group of its own (gloo): its collectives and those of
    training do not meet. Making it is collective.
    """

    def __init__(self) -> None:
        self.group: ProcessGroup = patient_group()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._host: dict[str, Tensor] = {}  # kept from save to save: making page-locked memory takes seconds

    @property
    def failed(self) -> bool:
        """Whether the work has ended with an error, which `wait` raises."""
        return self._error is not None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`; nothing else may be going on. The thread does not keep a process alive that ends otherwise."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the work is done; raises its error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def reserve(self, tensors: dict[str, Tensor]) -> None:
        """Begin to make the memory that copies of these tensors will need."""
        parts = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
        on_gpu = {name: (t.shape, t.dtype) for name, t in parts.items() if t.device.type == "cuda"}
        if on_gpu:
            self.start(lambda: [self._kept(name, *kind, pinned=True) for name, kind in on_gpu.items()])

    @torch.no_grad()
    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, which training does not touch; sharded tensors stay sharded as they were."""
        copies = {}
        for name in self._host.keys() - tensors.keys():  # the state of a layer that sleeps by now
            del self._host[name]
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            host = self._buffer(name, local.detach())
            copies[name] = DTensor(host, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else host
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies

    def _buffer(self, name: str, local: Tensor) -> Tensor:
        on_gpu = local.device.type == "cuda"
        return self._kept(name, local.shape, local.dtype, pinned=on_gpu).copy_(local, non_blocking=on_gpu)

    def _kept(self, name: str, shape: torch.Size, dtype: torch.dtype, pinned: bool) -> Tensor:
        host = self._host.get(name)
        if host is None or host.shape != shape or host.dtype != dtype:
            host = self._host[name] = torch.empty(shape, dtype=dtype, pin_memory=pinned)
        return host
