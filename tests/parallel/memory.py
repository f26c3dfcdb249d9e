"""Host memory of a process that loads its part of a model: `memory.py RANK STORE MODEL [QUANTIZE]` prints MiB: above
the start, of what is kept, and of the model whole and plain."""

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo  # the compiler's own memory, before anything is counted
import torch.distributed as dist

from ftlib import build
from ftlib.launch import leave_group
from ftlib.models import load, shards
from ftlib.parallel import run as processes
from ftlib.sections import Lora, Memory, Model, Parallel


def anonymous() -> float:
    """MiB that are this process's own; pages of mapped files belong to the machine's cache."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def main(rank, store, model, quantize=None):
    os.environ |= {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=int(rank), world_size=2)
    cfg = SimpleNamespace(
        model=Model(path=model, quantize=quantize), memory=Memory(), parallel=Parallel(), batch=None, dtype="fp32",
        seed=0,
    )  # fmt: skip
    if quantize:
        cfg.lora = Lora(rank=1)
    run, done, most = processes.start(cfg.parallel, 0), threading.Event(), [0.0]
    start = anonymous()

    def watch():
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    built = build.model(cfg, run)
    done.set()
    watcher.join()
    kept = [*map(shards.local, built.parameters()), *built.buffers()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in kept) / 2**20
    whole = sum(4 * weight.shape.numel() for weight in load.base_state(built).values()) / 2**20
    print(f"{most[0] - start:.1f} {held:.1f} {whole:.1f}")
    leave_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
