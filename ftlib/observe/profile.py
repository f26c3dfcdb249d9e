"""Where the time and memory of a training step go: a trace for a viewer, and a table by component."""

import gzip
import json
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from ftlib.optim.pieces import local
from ftlib.parallel import graphs

WARM, STEPS = 3, 3  # steps before the trace begins (compilation, first allocations), steps in it
COMPONENTS = (  # the first whose expression is found in the name of an operation, of what called it, or of its kernel
    ("communication", re.compile(r"nccl|gloo|c10d::|all_gather|reduce_scatter|all_reduce")),
    ("optimizer", re.compile(r"Optimizer\.step|_foreach_norm|linalg_vector_norm|_fused_adam|clip_grad")),
    ("head and loss", re.compile(r"LinearCrossEntropy|LinearLogprobs|linear_logprobs|cross_entropy|log_softmax")),
    ("attention", re.compile(r"attention|flash|fmha|sdpa", re.I)),
    ("embedding", re.compile(r"embedding")),
    ("matrix products", re.compile(r"aten::(mm|addmm|bmm|linear|matmul|_grouped_mm)|lora_project|gemm|nvjet|cutlass")),
    ("copies", re.compile(r"Memcpy|Memset|aten::(copy_|_to_copy|fill_|zero_)")),
)
REST = "norms, activations, the rest"
OUTSIDE = "ftlib: between steps"  # evaluation, checkpoints: not part of a step


class StepProfile:
    """`with step_profile: …` around what a loop does between two steps; does nothing unless `enabled`.

    After `WARM` steps of this process it records `STEPS`, writes `trace.json.gz` (chrome://tracing, ui.perfetto.dev)
    and `summary.json` into `folder`, and says the table.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        say: Callable[[str], None],
        enabled: bool = True,
    ) -> None:
        self.folder, self.model, self.optimizer, self.say = folder, model, optimizer, say
        self._steps = 0 if enabled else WARM + STEPS + 1
        self._recording: profile | None = None
        self._outside: record_function | None = None
        self._began = self._away = self._left = 0.0

    def __enter__(self) -> None:
        self._steps += 1
        if self._recording is None:
            return
        self._left = time.perf_counter()
        if self._steps == WARM + STEPS:
            self._finish()
        else:
            self._outside = record_function(OUTSIDE)
            self._outside.__enter__()

    def __exit__(self, *_: object) -> None:
        if self._outside is not None:
            self._outside.__exit__(None, None, None)
            self._outside = None
            self._away += time.perf_counter() - self._left
        if self._steps == WARM:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            self._recording = profile(activities=kinds)
            self._recording.__enter__()
            self._began = time.perf_counter()

    def close(self) -> None:
        """After the loop: a recording that the run ended before is given up, and said."""
        if 0 < self._steps < WARM + STEPS:
            traced = f"the {STEPS} steps behind a start's first {WARM} are traced"
            self.say(f"no profile: {traced}, and this one took {self._steps}")
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
            self._recording = None

    def _finish(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall = (time.perf_counter() - self._began - self._away) / STEPS
        self._recording.__exit__(None, None, None)
        self.folder.mkdir(parents=True, exist_ok=True)
        plain = self.folder / "trace.json"
        self._recording.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(f"{plain}.gz", "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        on_gpu = torch.cuda.is_available()
        peak = graphs.peak(self.model) if on_gpu else None
        summary = {
            "step_ms": round(1e3 * wall, 2),
            "time_ms": by_component(self._recording.events(), on_gpu),
            "memory_gib": memory(self.model, self.optimizer, peak),
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        for line in table(summary, "GPU waits" if on_gpu else "Python and what is not an operation"):
            self.say(line)
        self.say(f"trace of {STEPS} steps: {plain}.gz (open it in ui.perfetto.dev)")
        self._recording = None


def by_component(events: Iterable[Any], on_gpu: bool) -> dict[str, dict[str, float]]:
    """Component -> {"forward", "backward"}: milliseconds of a step. `events`: torch.profiler's FunctionEvents.

    Time of kernels on a GPU, else of operations themselves. Backward is what autograd's engine runs, recomputation too.
    """
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        names, parent = [event.name], event.cpu_parent
        while parent is not None:
            names.append(parent.name)
            parent = parent.cpu_parent
        if OUTSIDE in names:
            continue
        phase = "backward" if any(name.startswith("autograd::engine") for name in names) else "forward"
        parts = [(k.name, k.duration) for k in event.kernels] if on_gpu else [("", event.self_cpu_time_total)]
        for kernel, microseconds in parts:
            found[component([*names, kernel])][phase] += microseconds / 1e3 / STEPS
    return {name: {k: round(v, 2) for k, v in times.items()} for name, times in found.items() if sum(times.values())}


def component(names: Iterable[str]) -> str:
    """The component of an operation by its own name, those of its callers and of its kernel."""
    names = list(names)
    for name, expression in COMPONENTS:
        if any(expression.search(text) for text in names):
            return name
    return REST


def memory(model: nn.Module, optimizer: torch.optim.Optimizer, peak: int | None) -> dict[str, float]:
    """GiB of this process by what holds it; `peak` bytes less those are activations and workspace."""
    distinct = {id(p): p for p in model.parameters()}.values()
    trained = [p for p in distinct if p.requires_grad]
    slots = [v for p, state in optimizer.state.items() for v in state.values() if _beside(v, p)]
    # As large as what trains, once backward has ended; one at a time where it moves before that.
    gradients = trained if getattr(optimizer, "in_backward", None) is None else sorted(trained, key=_bytes)[-1:]
    held = {
        "frozen weights": [*(p for p in distinct if not p.requires_grad), *model.buffers()],  # quantized ones
        "trained weights": trained,
        "gradients": gradients,
        "optimizer state": slots,
    }
    sizes = {name: sum(_bytes(t) for t in tensors) for name, tensors in held.items()}
    if peak is not None:
        sizes["activations and workspace"] = max(0, peak - sum(sizes.values()))
    return {name: round(size / 2**30, 6) for name, size in sizes.items()}


def _beside(value: object, p: Tensor) -> bool:
    """Whether it is a tensor in the memory that `p` is in: state may wait on the host (optim.offload)."""
    return isinstance(value, Tensor) and local(value).device == local(p).device


def _bytes(tensor: Tensor) -> int:
    part = local(tensor)
    return part.numel() * part.element_size()


def table(summary: dict[str, Any], idle: str) -> list[str]:
    """The lines that a run says."""
    step, times = summary["step_ms"], summary["time_ms"]
    rows = sorted(times.items(), key=lambda item: -sum(item[1].values()))
    lines = [f"a step takes {step:,.1f} ms", f"  {'':32} {'forward':>9} {'backward':>9} {'share':>6}"]
    for name, part in rows:
        total = part["forward"] + part["backward"]
        lines.append(f"  {name:32} {part['forward']:9,.2f} {part['backward']:9,.2f} {total / step:6.1%}")
    left = step - sum(sum(part.values()) for part in times.values())
    lines.append(f"  {idle:32} {max(left, 0):9,.2f} {'':9} {max(left, 0) / step:6.1%}")
    held = summary["memory_gib"]
    unit, scale = ("MiB", 1024) if sum(held.values()) < 1 else ("GiB", 1)
    lines.append(f"memory, {unit}:  " + "  ".join(f"{name} {size * scale:,.2f}" for name, size in held.items()))
    return lines
