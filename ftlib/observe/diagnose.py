"""Errors of the machine said in the words of the config: out of memory, a lost process, shapes that do not fit."""

import re
import traceback
from pathlib import Path
from typing import Any

from ftlib.data.stream_workers import ENDED
from ftlib.errors import UserError
from ftlib.parallel import pulse
from ftlib.sections.optim import HOST
from ftlib.sections.run import LEANER

TRACEBACK = "traceback.txt"
MIB = 1 << 20
LONG = 16_384  # tokens of a row from which feed-forward layers are worth cutting


def explain(error: BaseException, cfg: Any) -> UserError | None:
    """What the user can change about `error`, with keys, values now and values to try; None if nothing is known.

    The traceback goes to `<output_dir>/traceback.txt`, for those who need it.
    """
    text = f"{type(error).__name__}: {error}"
    if ENDED in text:
        found = UserError(
            f"{ENDED}; the machine may have run out of host memory and killed it (dmesg says so)",
            where="stream.workers, stream.buffer",
            fix="lower one of them if it did; the same command continues where it saved last",
        )
    elif "OutOfMemoryError" in text or "out of memory" in text.lower() or "can't allocate memory" in text:
        found = _memory(text, cfg)
    elif re.search(r"NCCL|DistBackendError|Connection (closed|reset)|gloo|Socket Timeout", text):
        missing = pulse.lost()
        found = UserError(
            f"a process of this run was lost or did not answer: {missing or _first_line(error)}",
            where="communication between processes",
            fix="read the message of the process that failed first; if there is none, look for one that was killed "
            "(host memory: dmesg) or a broken link (NCCL_DEBUG=INFO); the same command continues where it saved last",
        )
    elif "index out of range in self" in text or "device-side assert" in text:
        found = UserError(
            f"an index is outside of its table, most likely a token the model has no row for: {_first_line(error)}",
            where=_place(error),
            fix="tokenizer.path must fit model.path; with data prepared earlier, run `tune prepare` again",
        )
    elif re.search(r"shapes cannot be multiplied|size of tensor|must match|shape '.*' is invalid|size mismatch", text):
        found = UserError(
            f"tensors do not fit each other: {_first_line(error)}",
            where=_place(error),
            fix="check what you changed there"
            + (f", or model.code ({cfg.model.code})" if getattr(getattr(cfg, "model", None), "code", None) else "")
            + ("; config.json must belong to the weights in model.path" if hasattr(cfg, "model") else ""),
        )
    else:
        return None
    note = _keep_traceback(error, cfg)
    return UserError(found.what, where=found.where, fix=found.fix + (f"\n  traceback: {note}" if note else ""))


def _memory(text: str, cfg: Any) -> UserError:
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
    what = "out of memory" + (f": {asked[1]} more were asked for" if asked else "")
    spare = re.search(r"([\d.]+) (MiB|GiB) is reserved by PyTorch but unallocated", text)
    tries = knobs(cfg)
    if spare and float(spare[1]) * (1024 if spare[2] == "GiB" else 1) > 1024:
        tries.insert(0, "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment (memory is fragmented)")
    return UserError(what, where="the device", fix="one of these, the first costs least:\n    " + "\n    ".join(tries))


def knobs(cfg: Any) -> list[str]:
    """Keys that lower the memory a run needs, each with its value now -> the value to try, cheapest first."""
    found = []
    batch, memory, data = (getattr(cfg, name, None) for name in ("batch", "memory", "data"))
    if batch is not None and batch.micro_rows > 1:
        smaller = max(n for n in range(1, batch.micro_rows) if batch.micro_rows % n == 0)
        found.append(f"batch.micro_rows: {batch.micro_rows} -> {smaller} (same results, more accumulation)")
    if memory is not None:
        if (some := getattr(memory, "recompute_layers", 0)) != 0:
            found.append(f"memory.recompute_layers: {some} -> {2 * some} (same results, slower; if fewer, all blocks)")
        elif memory.recompute in LEANER[:-1]:
            then = LEANER[LEANER.index(memory.recompute) + 1]
            found.append(f"memory.recompute: {memory.recompute} -> {then} (same results, slower)")
        if getattr(memory, "offload", None) is False:
            found.append("memory.offload: false -> true (same results; activations wait in host memory)")
        if getattr(memory, "tiled_mlp", None) == 0 and getattr(data, "seq_len", 0) >= LONG:
            found.append(f"memory.tiled_mlp: 0 -> {LONG // 2} (same results, slower; no mixture of experts)")
    if (optim := getattr(cfg, "optim", None)) is not None and optim.name in HOST and not optim.offload:
        found.append("optim.offload: false -> true (same results; moments wait in host memory)")
    saved = "no gradients and moments for the frozen weights"
    if hasattr(cfg, "lisa"):  # recipes/full_sft.py
        found.append(f"the recipe: full_sft -> lora_sft ({saved})")
    elif hasattr(cfg, "lora") and cfg.lora is None:
        found.append(f"lora: null -> {{}} ({saved})")
    elif hasattr(cfg, "lora") and cfg.lora.dora:
        found.append("lora.dora: true -> false")
    if data is not None and hasattr(data, "seq_len") and data.seq_len > 256:
        found.append(f"data.seq_len: {data.seq_len} -> {data.seq_len // 2} (longer documents: see data.overlong)")
    if getattr(cfg, "parallel", None) is not None:
        found.append("more devices: tune run --nproc-per-node N; parallel.dp_shard -1 shares the weights among them")
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _place(error: BaseException) -> str | None:
    """The innermost line that is not inside torch."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if "site-packages" not in frame.filename and "<" not in frame.filename:
            return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}"
    return None


def _keep_traceback(error: BaseException, cfg: Any) -> Path | None:
    folder = getattr(cfg, "output_dir", None)
    if folder is None:
        return None
    try:
        path = Path(folder) / TRACEBACK
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        return path
    except OSError:
        return None
