"""What contenders of a benchmark share: shapes, identical weights and tokens, one way to time, one row of results."""

import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
WARM, TIMED = 4, 12  # steps
RECOMPUTED = ("full", "except_attention")  # `recompute` of peers that have all or nothing; `selective` is nothing there
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
most_bytes: Callable[[], int] = torch.cuda.max_memory_allocated  # a contender with CUDA graphs has its own
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip


def job() -> dict:
    """The work, as the runner hands it to a contender: shape, rows, seq_len, recompute, rank, …"""
    return json.loads(sys.argv[1])


def config_of(shape: str) -> dict:
    """The published config.json of a shape, kept with the parity tests; `tiny-` before a name shrinks its sizes."""
    name = shape.removeprefix("tiny-")
    config = json.loads((ROOT / "tests" / "parity" / "configs" / f"{name}.json").read_text())
    return config if name == shape else config | TINY


def weight(name: str, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """The weight called `name` in a Hugging Face checkpoint: a draw that depends on its name alone, bf16."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) * 0.02


def tokens(work: dict, step: int) -> torch.Tensor:
    """Token ids [rows, seq_len] of one step on the CPU, the same for every contender; each predicts its successor."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (work["rows"], work["seq_len"])
    return torch.randint(0, config_of(work["shape"])["vocab_size"], shape, generator=generator)


def pairs(work: dict) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) of all steps, `pairs` of them each; both answers end with the checkpoint's end."""
    size, count = config_of(work["shape"])["vocab_size"], work["pairs"] * (WARM + TIMED + 1)
    generator, found = torch.Generator().manual_seed(1000), []
    for _ in range(count):
        lengths = work["prompt_tokens"], work["answer_tokens"] - 1, work["answer_tokens"] - 1
        prompt, chosen, rejected = (torch.randint(0, size - 3, (n,), generator=generator).tolist() for n in lengths)
        found.append((prompt, [*chosen, size - 2], [*rejected, size - 2]))
    return found


def shifted(ids: torch.Tensor) -> torch.Tensor:
    """Labels [rows, seq_len]: the next token; the last of a row has none (-100)."""
    return torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), -100)), 1)


def wait() -> float:
    """The time, once the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def forget_peak() -> None:
    """Measure the peak from here on."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """Bytes that tensors had on the GPU at most, and what CUDA graphs keep for theirs; 0 on a CPU."""
    return most_bytes() if DEVICE.type == "cuda" else 0


def peak_gib() -> float:
    """The same in GiB, for a table."""
    return round(peak() / 2**30, 2)


def measure(
    name: str, work: dict, step: Callable[[torch.Tensor], tuple[float, float]], versions: dict,
    more: Callable[[], dict] = dict,
) -> None:  # fmt: skip
    """Run the steps and print the row. `step(tokens)` does one optimizer step; (loss, gradient norm) as floats.
    `more()` is asked after the last one for what else belongs into the row."""
    checks, seconds, built = [], [], torch.cuda.max_memory_allocated()
    for i in range(WARM + TIMED + 1):
        ids = tokens(work, i).to(DEVICE)
        if i == WARM:
            forget_peak()
        start = wait()
        checks.append(step(ids))
        seconds.append(wait() - start)
    report(name, work, seconds, checks, versions, built, **more())


def report(
    name: str, work: dict, seconds: list[float], checks: list[tuple[float, float]], versions: dict, built: int = 0,
    tokens: list[int] | None = None, **more: object,
) -> None:  # fmt: skip
    """Print the row: `seconds` of every step, (loss, gradient norm) of at least the first two, the peak of memory, in
    bytes, while the model was made (0: not known), the `tokens` of every step (rows x seq_len), and `more`."""
    first, timed = seconds[0], sorted(seconds[WARM + 1 :])
    median = timed[len(timed) // 2]
    tokens = tokens or [work["rows"] * work["seq_len"]] * len(seconds)
    a_token = sorted(time / count for time, count in list(zip(seconds, tokens, strict=True))[WARM + 1 :])
    row = {
        "contender": name,
        "work": work,
        "tokens_per_s": round(1 / a_token[len(a_token) // 2]),
        "step_ms": round(1e3 * median, 1),
        "spread": round((timed[-1] - timed[0]) / median, 3),
        "peak_gib": peak_gib(),
        "built_gib": round(built / 2**30, 2) or None,
        "first_step_s": round(first, 1),
        "loss": [loss for loss, _ in checks[:2]],
        "grad_norm": [norm for _, norm in checks[:2]],
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, **versions},
        **more,
    }
    print("ROW " + json.dumps(row), flush=True)


def report_steps(name: str, work: dict, rows: list[dict[str, float]], versions: dict) -> None:
    """Print the row of reinforcement learning: medians over the steps behind the first."""
    kept = rows[1:] or rows
    row = {"contender": name, "work": work, "first_step_s": rows[0]["step_s"]}
    row |= {key: statistics.median(one[key] for one in kept) for key in rows[0]}
    row["device"] = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    print("ROW " + json.dumps(row | {"versions": {"torch": torch.__version__, **versions}}), flush=True)
