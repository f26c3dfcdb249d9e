"""One process of a case of parallel.py: the step of the SFT recipes on dense rows, timed, checked and traced."""

import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import common
import torch

from ftlib import build, optim
from ftlib.adapters import lora
from ftlib.checkpoint import Saver, State, exchange
from ftlib.layers.batch import Batch, Layout
from ftlib.losses.language_modelling import next_token_loss
from ftlib.models import LanguageModel
from ftlib.models.load import base_state
from ftlib.models.shards import fill
from ftlib.parallel import run as processes
from ftlib.sections import Checkpoint, Lora, Memory, Model, Optim, Parallel

TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512}  # fmt: skip


def main() -> None:
    work = json.loads(sys.argv[1])
    shape = common.config_of(work["shape"]) | (TINY if work["tiny"] else {})
    cfg = settings(work, shape)
    run = processes.start(cfg.parallel, cfg.seed, cfg.deterministic)
    started = time.perf_counter()
    model = build.model(cfg, run)
    draw_weights(model)
    optimizer = optim.build(model, cfg.optim)
    step = stepper(model, optimizer, run, work)
    wait(run)
    built = time.perf_counter() - started
    row = measure(step, run, work, shape["vocab_size"]) | {"build_s": round(built, 1)}
    if work.get("save"):
        row |= saving(step, run, work, State(model, optimizer, Nowhere()), shape["vocab_size"], row["step_ms"] / 1e3)
    if run.is_main:
        print("ROW " + json.dumps({"case": work["case"], "work": work, "processes": run.world, **row}), flush=True)
    if work.get("save"):  # without waiting for the disk
        os._exit(0)
    torch.distributed.destroy_process_group()


def settings(work: dict, shape: dict) -> SimpleNamespace:
    """What build.model reads of a recipe's config."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(shape))
    options = {key: work[key] for key in ("quantize", "attention", "fp8") if key in work}
    if "fp8" in work:
        options["fp8_smallest"] = min(1024, shape["hidden_size"])
    cfg = SimpleNamespace(
        model=Model(path=str(folder), **options),
        memory=Memory(recompute=work["recompute"], offload=work.get("offload", False)),
        parallel=Parallel(**work["mesh"]),
        batch=SimpleNamespace(rows=work["rows"], micro_rows=work["micro_rows"]),
        data=SimpleNamespace(seq_len=work["seq_len"]),
        optim=Optim(lr=1e-4, in_backward=work.get("in_backward", False)),
        from_scratch=True,
        dtype="bf16",
        seed=0,
        deterministic=work.get("deterministic", False),
    )
    if work["kind"] == "lora":
        cfg.lora = Lora(rank=16, alpha=32)
    return cfg


@torch.no_grad()
def draw_weights(model: LanguageModel) -> None:
    """Every weight from its name alone, so that all meshes hold the same model; both factors of adapters too."""
    for name, tensor in base_state(model).items():
        if model.arch.tied and name == "lm_head.weight":
            continue
        if isinstance(tensor, torch.Tensor):
            fill(tensor, draw(name, tensor))
        else:
            tensor.fill(draw(name, torch.empty(tensor.shape, device="meta"), tensor.parts[0].device))
    for name, _, factors in lora.adapted(model):
        for which in ("lora_A", "lora_B"):
            fill(factors.stored(which), draw(f"{name}.{which}", factors.stored(which)))


def draw(name: str, like: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """The whole tensor called `name`, of the shape of `like` and on its device, if no other is named."""
    device = device or like.device
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=like.dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator, device=device, dtype=torch.bfloat16) * 0.02


def stepper(
    model: LanguageModel, optimizer: torch.optim.Optimizer, run: processes.Run, work: dict
) -> Callable[[torch.Tensor], tuple[float, float]]:
    """One optimizer step over the token ids [rows, seq_len + 1] of all processes -> (loss, gradient norm)."""
    length, rows = work["seq_len"], work["micro_rows"]
    own = work["rows"] // run.data_ranks
    cu_seqlens = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=run.device)
    positions = torch.arange(length, device=run.device).expand(rows, length)

    def step(ids: torch.Tensor) -> tuple[float, float]:
        total = torch.zeros((), dtype=torch.float64, device=run.device)
        for micro in ids[run.data_rank * own : (run.data_rank + 1) * own].split(rows):
            layout = Layout.packed(cu_seqlens, length, (rows, length))
            batch = Batch(micro[:, :-1], micro[:, 1:], positions, layout, target_tokens=rows * length)
            batch = run.share(batch)
            hidden = model(batch)
            loss = next_token_loss(hidden, model.lm_head.weight, batch.labels, batch.target_tokens, **model.logit_terms)
            loss = loss / (work["rows"] * length)
            loss.backward()
            total += loss.detach()
        norm = optim.step(optimizer, 1.0)
        return run.total(total).item(), norm.item()

    return step


def measure(step: Callable[[torch.Tensor], tuple[float, float]], run: processes.Run, work: dict, vocab: int) -> dict:
    """Losses and norms of the first two steps, the median of the timed ones, and one more step traced."""

    def ids(i: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 + i)
        return torch.randint(0, vocab, (work["rows"], work["seq_len"] + 1), generator=generator).to(run.device)

    checks, seconds = [], []
    for i in range(work["warm"] + work["timed"]):
        tokens = ids(i)
        if i == work["warm"] and run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait(run)
        start = time.perf_counter()
        found = step(tokens)
        wait(run)
        seconds.append(time.perf_counter() - start)
        if i == 0:
            began = time.time() - work.get("launched", time.time())
        checks.append(found)
    timed = sorted(seconds[work["warm"] :])
    median = timed[len(timed) // 2]
    cuda = run.device.type == "cuda"
    row = {
        "tokens_per_s": round(work["rows"] * work["seq_len"] / median, 1),
        "step_ms": round(1e3 * median, 1),
        "spread": round((timed[-1] - timed[0]) / median, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "first_step_s": round(seconds[0], 1),
        "start_s": round(began, 1),  # from the command to the end of the first step
        "loss": [loss for loss, _ in checks[:2]],
        "grad_norm": [norm for _, norm in checks[:2]],
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {"torch": torch.__version__, "nccl": torch.cuda.nccl.version() if cuda else None},
    }
    return row | (communication(step, ids(0)) if cuda and run.world > 1 and work["trace"] else {})


class Nowhere:
    """The place in data that are drawn anew for each step."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def saving(
    step: Callable[[torch.Tensor], tuple[float, float]], run: processes.Run, work: dict, state: State, vocab: int,
    usual: float,
) -> dict:  # fmt: skip
    """One save in the background, of a run that saves every 100 steps: seconds that making the page-locked memory took
    beside training (it begins after the first step), that training stood still for the save, until it was on disk, if
    that was within `work["save_wait"]` seconds; the slowest step till then, and the share of the time of 100 steps of
    `usual` seconds that standing still and slower steps cost."""
    tokens = torch.randint(0, vocab, (work["rows"], work["seq_len"] + 1), device=run.device)
    folder = Path(exchange(run, tempfile.mkdtemp(dir=work["save"]) if run.is_main else None)[0])
    saver = Saver(Checkpoint(every=100, keep=1, background=True), folder, run, {}, say=lambda text: None)
    saver.resume(state)
    start = time.perf_counter()
    saver.due(1, 1000)
    saver.wait()
    row = {"save_memory_s": round(time.perf_counter() - start, 1)}
    wait(run)
    exchange(run, None)  # what one process waits for another is no part of the save
    start = time.perf_counter()
    saver.save(100, state)
    row["save_stall_s"] = round(time.perf_counter() - start, 2)
    seconds: list[float] = []
    for number in itertools.count():
        began = time.perf_counter()
        step(tokens)
        seconds.append(time.perf_counter() - began)
        taken = time.perf_counter() - start
        done, late = exchange(run, [any(saver.root.glob("step_*")), number > 4 and taken > work["save_wait"]])[0]
        if done or late:
            break
    size = sum(file.stat().st_size for file in folder.rglob("shard-*"))
    exchange(run, None)  # nobody removes it before all have looked
    shutil.rmtree(folder, ignore_errors=True)  # it may still be written
    lost = row["save_stall_s"] + sum(seconds) - len(seconds) * usual
    return row | {"save_total_s": round(taken, 1) if done else None, "written_gib": round(size / 2**30, 1),
                  "slowest_step_while_saving_ms": round(1e3 * max(seconds), 1),
                  "share_of_100_steps": round(lost / (100 * usual), 4)}  # fmt: skip


def wait(run: processes.Run) -> None:
    """Until this process's device has done everything."""
    if run.device.type == "cuda":
        torch.cuda.synchronize()


def communication(step: Callable[[torch.Tensor], tuple[float, float]], tokens: torch.Tensor) -> dict:
    """Milliseconds of one step in which NCCL's kernels run, and in which nothing else does (this process's trace)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step(tokens)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [(e["ts"], e["ts"] + e["dur"], "nccl" in e["name"].lower()) for e in events if e.get("cat") == "kernel"]
    talking = merged([(a, b) for a, b, nccl in kernels if nccl])
    working = merged([(a, b) for a, b, nccl in kernels if not nccl])
    both = merged([*talking, *working])
    return {
        "nccl_ms": round(length(talking) / 1e3, 1),
        "exposed_nccl_ms": round((length(both) - length(working)) / 1e3, 1),
    }


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of time spans, in order and apart."""
    found: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def length(spans: list[tuple[float, float]]) -> float:
    return sum(stop - start for start, stop in spans)


if __name__ == "__main__":
    main()
