"""Each operation of ftlib/kernels against its plain formula, compiled, and Liger-Kernel; errors against float64.

    python tools/bench/kernels.py --peer-path /folder/with/liger --out tools/bench/results/kernels_h100.json
    python tools/bench/kernels.py --tiny          # small shapes, on a CPU too: does it run, and is it right

Times are medians, the operands out of the cache where a GPU's is larger than they are, and a GPU's alone: its kernels
are recorded and launched at once, as between other blocks of a model (`*`: a call that waits for the device midway,
with the host's time in it). `forward` keeps what backward needs, as in training. `peak` is what a call takes beside
its operands, results and gradients included. An error is the norm of the difference from float64 over the norm of the
truth, the largest of outputs or gradients.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
from kernel_cases import Case, Function, Maker, cases, experts
from torch import Tensor

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 320}  # fmt: skip
TINY_EXPERTS = {"num_experts": 4, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
SHAPES = ("llama-3.1-8b", "qwen3-0.6b")
SECONDS = 0.15  # for one figure


def main() -> None:
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.peer_path:
        sys.path.insert(0, args.peer_path)
    started, rows = time.perf_counter(), []
    for shape, case in chosen(args.tiny, args.only):
        late = time.perf_counter() - started > args.limit
        for row in [{"not_run": "no time left"}] if late else measured(case, device):
            rows.append({"kernel": case.kernel, "shape": shape, "sizes": case.sizes, **row})
            print(line(rows[-1]), flush=True)
        if args.out:
            save(Path(args.out), rows, device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--peer-path", help="folder with liger_kernel")
    parser.add_argument("--limit", type=float, default=110, help="seconds after which no further case is begun")
    parser.add_argument("--out")
    return parser.parse_args()


def chosen(tiny: bool, only: str) -> list[tuple[str, Case]]:
    """(shape, case), a kernel's shapes one after the other."""
    tokens = 128 if tiny else 8192
    if tiny:
        found = [("tiny", case) for case in (*cases(TINY, tokens), experts(TINY_EXPERTS, tokens))]
    else:
        every = [[(shape, case) for case in cases(common.config_of(shape), tokens)] for shape in SHAPES]
        found = [pair for pairs in zip(*every, strict=True) for pair in pairs]
        found.append(("qwen3-30b-a3b", experts(common.config_of("qwen3-30b-a3b"), tokens)))
    return [(shape, case) for shape, case in found if only in case.kernel]


def measured(case: Case, device: torch.device) -> list[dict]:
    """A row for each contender of a case."""
    torch.compiler.reset()
    compiled = torch.compile(case.plain, dynamic=False, backend="inductor" if device.type == "cuda" else "aot_eager")
    contenders: dict[str, Callable[[], Function]] = {"ours": lambda: case.ours or compiled}
    if not case.compiles:
        contenders["plain"] = lambda: case.plain
    elif case.ours is not None:
        contenders["compiled"] = lambda: compiled
    if case.liger is not None:
        contenders["liger"] = case.liger
    exact, rows = truth(case, device), []
    for name, find in contenders.items():
        if device.type != "cuda" and (name == "liger" or (name == "ours" and case.only_gpu)):
            rows.append({"contender": name, "not_run": "needs a GPU"})
            continue
        try:
            rows.append({"contender": name, **figures(find(), case, device, exact)})
        except Exception as error:  # a rival that fails is a row of the table
            rows.append({"contender": name, "not_run": f"{type(error).__name__}: {str(error)[:300]}"})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def truth(case: Case, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients in float64, from the same rounded operands."""
    operands = case.operands(Maker(device))
    wide = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in operands]
    outputs = listed((case.exact or case.plain)(*wide))
    leaves = [t for t in wide if t.requires_grad]
    return [t.detach() for t in outputs], gradients(outputs, leaves)


def figures(call: Function, case: Case, device: torch.device, exact: tuple[list[Tensor], list[Tensor]]) -> dict:
    """Errors, times and memory of one contender."""
    operands = case.operands(Maker(device))
    leaves = [t for t in operands if t.requires_grad]
    outputs = listed(call(*operands))
    kept = [t.detach().clone() for t in outputs]  # a contender may write over what it is given
    grads = gradients(outputs, leaves)
    row = {"error": largest(kept, exact[0]), "gradient_error": largest(grads, exact[1]) if leaves else None}
    weights = drawn(outputs)
    del outputs, kept, grads
    operands = case.operands(Maker(device))
    leaves = [t for t in operands if t.requires_grad]

    def both() -> None:
        gradients(listed(call(*operands)), leaves, weights)

    row["forward_ms"], row["recorded"] = milliseconds(lambda: call(*operands), device)
    row["both_ms"], both_recorded = milliseconds(both, device) if leaves else (None, True)
    row["recorded"] = row["recorded"] and both_recorded
    row["peak_mib"] = peak(both if leaves else lambda: call(*operands), device)
    return row


def listed(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def gradients(outputs: list[Tensor], leaves: list[Tensor], weights: list[Tensor] | None = None) -> list[Tensor]:
    """Of a sum of the outputs with these weights, or `drawn`."""
    return list(torch.autograd.grad(outputs, leaves, weights or drawn(outputs))) if leaves else []


def drawn(outputs: list[Tensor]) -> list[Tensor]:
    """A weight for each number, drawn in bf16, so that all contenders have the same."""
    weights = []
    for output in outputs:
        generator = torch.Generator(output.device).manual_seed(1)
        weight = torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.bfloat16)
        weights.append(weight.to(output.dtype) if output.ndim else torch.ones_like(output))
    return weights


def largest(found: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(found, exact, strict=True)
    return max(float((ours.double() - right).norm() / right.norm()) for ours, right in pairs)


def milliseconds(call: Callable[[], object], device: torch.device) -> tuple[float, bool]:
    """Median over as many calls as SECONDS allow, at least 3; and whether it is the device's time alone."""
    for _ in range(2):
        call()
    if device.type != "cuda":
        return 1e3 * sorted(clocked(call) for _ in range(3))[1], False
    from triton.testing import do_bench  # clears the cache between calls

    replay = recorded(call)
    return do_bench(replay or call, warmup=20, rep=int(1e3 * SECONDS), return_mode="median"), replay is not None


def recorded(call: Callable[[], object]) -> Callable[[], None] | None:
    """The kernels of a call as a CUDA graph, which are launched at once; None of a call that waits for the device."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            call()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def clocked(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB beyond what is there before the call."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def line(row: dict) -> str:
    name = f"{row['kernel']:26} {row['shape']:13} {row.get('contender', ''):9}"
    if "not_run" in row:
        return f"{name} not run: {row['not_run']}"

    def cell(key: str, form: str) -> str:
        return "       -" if row[key] is None else format(row[key], form)

    star = "*" if torch.cuda.is_available() and not row["recorded"] else " "
    times = f"forward {cell('forward_ms', '8.3f')} ms  both {cell('both_ms', '8.3f')} ms{star}"
    errors = f"error {cell('error', '.1e')} gradients {cell('gradient_error', '.1e')}"
    return f"{name} {times}  peak {cell('peak_mib', '8.0f')} MiB  {errors}  {row['sizes']}"


def save(out: Path, rows: list[dict], device: torch.device) -> None:
    versions = {"torch": torch.__version__}
    if "liger_kernel" in sys.modules:
        from importlib.metadata import PackageNotFoundError, version

        try:
            versions["liger"] = version("liger-kernel")
        except PackageNotFoundError:
            versions["liger"] = "unknown"
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    command = "python tools/bench/kernels.py " + " ".join(sys.argv[1:])
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {"command": command, "device": name, "versions": versions, "rows": rows}
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
