"""`memory.offload` without a GPU: what blocks keep is copied as late as a stream of its own may do it."""

from collections import deque

import torch

from ftlib.parallel.offload import LEAVING, HostOffload


class LateCopies(HostOffload):
    """Copies a storage when `LEAVING` others have come behind it, or backward begins. What is freed before is lost."""

    def __init__(self, weights):
        self.weights, self.gathered, self.smallest = weights, frozenset(), 0
        self.leaving = deque()

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if self.stays(storage):
            return tensor
        kept = {"storage": storage, "like": (tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())}
        self.leaving.append(kept)
        self.copy(LEAVING)
        return kept

    def unpack(self, kept):
        self.copy(0)
        if isinstance(kept, torch.Tensor):
            return kept
        dtype, size, stride, offset = kept["like"]
        return torch.empty(0, dtype=dtype).set_(kept["host"], offset, size, stride)

    def copy(self, keep):
        while len(self.leaving) > keep:
            kept = self.leaving.popleft()
            kept["host"] = kept.pop("storage").clone()
