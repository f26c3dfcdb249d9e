"""An engine in a process of its own, on another device: it draws while the process that asked computes.

    python -m ftlib.generation.remote FD      with a socket at FD: pickled calls in, results out
"""

import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ftlib.errors import UserError
from ftlib.generation.engine import Engine
from ftlib.generation.merged import Merged
from ftlib.generation.params import Completion, SamplingParams
from ftlib.models import LanguageModel

MEMORY = "/dev/shm"  # where weights pass through, if the machine has it and there is room: a container may have 64 MiB
LOOK_S = 1.0  # between two looks at whether the process that asks is still there
KEPT_FROM = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # a terminal and a scheduler send them to all processes


class RemoteEngine:
    """`generate` as `Engine` has it, with the weights of `model` as they were at the last `load`, adapters folded in.

    Both wait for the other process; to go on meanwhile, call `generate` from a thread.
    """

    def __init__(self, model: LanguageModel, device: torch.device, max_batch: int) -> None:
        self.merged = Merged(model)
        self._pipe, theirs = multiprocessing.connection.Pipe()
        path = os.pathsep.join(filter(None, (p or os.getcwd() for p in sys.path)))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ftlib.generation.remote", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        theirs.close()
        dtype = model.lm_head.weight.dtype
        self._call((model.arch, model.table, model.config), dtype, model.model.backend, str(device), max_batch)

    def load(self) -> None:
        """Hand the weights over as they are now."""
        self.merged.refresh()
        weights = {name: p.detach().cpu().contiguous() for name, p in self.merged.model.named_parameters()}
        with tempfile.TemporaryDirectory(dir=_where(sum(weight.nbytes for weight in weights.values()))) as folder:
            file = Path(folder) / "weights.safetensors"
            save_file(weights, file)
            self._call("load", str(file))

    def generate(self, prompts: list[list[int]], params: SamplingParams, n: int = 1) -> list[list[Completion]]:
        """`n` completions of each prompt."""
        return self._call("generate", prompts, params, n)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def _call(self, *message: Any) -> Any:
        try:
            self._pipe.send(message)
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            raise UserError(f"the process that draws ended with code {self._process.wait()}") from None
        if kind == "error":
            raise UserError(f"the process that draws: {value}")
        return value


def _where(size: int) -> str | None:
    """A folder in memory with room for `size` bytes and some more; None: on disk."""
    roomy = os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 1.05 * size + 2**20
    return MEMORY if roomy else None


def serve(pipe: multiprocessing.connection.Connection) -> None:
    """Answer calls until the other end closes. Signals are left to it: it needs what it asked for before it saves.

    One that was killed says nothing: what it asked for last is dropped too.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for number in KEPT_FROM:
        signal.signal(number, signal.SIG_IGN)
    parts, dtype, backend, device, max_batch = pipe.recv()
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    with torch.device("meta"):
        model = LanguageModel(*parts).to(dtype)
    model.model.use_attention(backend)
    model.to_empty(device=device)
    model.tie()
    engine = Engine(model.eval().requires_grad_(False), max_batch=max_batch)
    answer: Any = None
    while True:
        try:
            pipe.send(("ok", answer))
            kind, *given = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = _load(engine, *given) if kind == "load" else _generate(engine, *given)
        except Exception as error:
            pipe.send(("error", f"{type(error).__name__}: {error}"))
            return


def _end_with(parent: int) -> None:
    """End this process as soon as its parent is gone."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)


@torch.no_grad()
def _load(engine: Engine, file: str) -> None:
    weights = load_file(file)
    for name, parameter in engine.model.named_parameters():
        parameter.copy_(weights[name])
    engine.refresh()


def _generate(engine: Engine, prompts: list[list[int]], params: SamplingParams, n: int) -> list[list[Completion]]:
    return engine.generate(prompts, params, n)


if __name__ == "__main__":
    serve(multiprocessing.connection.Connection(int(sys.argv[1])))
