"""Seconds from `tune run` to the first finished step: the recipe itself, on random weights that are made here.

    python tools/bench/startup.py --shape qwen3-0.6b --out tools/bench/results/startup_h100.json
    python tools/bench/startup.py --shape llama-3.1-8b --runs cold --out tools/bench/results/startup_h100.json
    python tools/bench/startup.py --tiny                                              # runs on a CPU

`cold`: nothing is compiled yet. `warm`: another run of the same config. `resumed`: that run goes on, to its second
step. Each is a process of its own. The clock starts before Python does and stops when the step's row is in
metrics.jsonl; the weights lie in the file cache, as they have just been written. `new_graphs` counts compiled graphs
that were not in the cache of compiled code: 0 says that it was used. Python may write bytecode, as an installer does:
where it may not, each start compiles every package's source.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
import yaml
from context import TINY

from ftlib.models import families, save
from ftlib.models.language_model import LanguageModel

DEMO = common.ROOT / "ftlib" / "assets" / "demo"
RUNS = ("cold", "warm", "resumed")


def main() -> None:
    args = arguments()
    shape = common.config_of(args.shape) | (TINY if args.tiny else {})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights(shape, folder / "model")
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(settings(folder, args.tiny)))
        rows = []
        for kind in args.runs.split(","):
            name = "tiny" if args.tiny else args.shape
            rows.append({"shape": name, "run": kind, **started(kind, config, args.limit)})
            print(json.dumps(rows[-1]), flush=True)
    if args.out:
        out = Path(args.out)
        found = json.loads(out.read_text()) if out.is_file() else {"commands": [], "rows": []}
        found["commands"].append("python tools/bench/startup.py " + " ".join(sys.argv[1:]))
        gpu = torch.cuda.is_available()
        found |= {"device": torch.cuda.get_device_name() if gpu else "CPU", "versions": {"torch": torch.__version__}}
        found["rows"] += rows
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--runs", default=",".join(RUNS), help="of cold, warm, resumed; in this order")
    parser.add_argument("--limit", type=float, default=150, help="seconds a run may take")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out")
    return parser.parse_args()


def weights(shape: dict, folder: Path) -> None:
    """A model folder: random weights in bf16, the demo's tokenizer."""
    arch, table = families.read(shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = LanguageModel(arch, table, shape).bfloat16()
    model.to_empty(device=device)
    model.tie()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
    save.save_pretrained(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copy(DEMO / "model" / name, folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()


def settings(folder: Path, tiny: bool) -> dict:
    """What the runs share: one step on the demo's rows, saved."""
    return {
        "model": {"path": str(folder / "model")},
        "data": {"sources": [{"path": str(DEMO / "data" / "lora_train.jsonl")}], "seq_len": 256 if tiny else 2048},
        "batch": {"rows": 2, "micro_rows": 2},
        "steps": 1,
        "checkpoint": {"every": 1},
        "dtype": "fp32" if tiny else "bf16",
    }


def started(kind: str, config: Path, limit: float) -> dict:
    """Seconds until the step is there, and how much was compiled for it; `failed` with the reason."""
    out, cache = config.parent / ("warm" if kind == "resumed" else kind), config.parent / "cache"
    command = [sys.executable, "-m", "ftlib", "run", "recipes/lora_sft.py", "--config", str(config)]
    command += [f"output_dir={out}", *(["steps=2"] if kind == "resumed" else [])]
    path = os.pathsep.join(filter(None, (str(common.ROOT), os.environ.get("PYTHONPATH"))))
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    caches["PYTHONDONTWRITEBYTECODE"] = ""
    before, wanted = graphs(cache), 2 if kind == "resumed" else 1
    with (config.parent / f"{kind}.log").open("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=common.ROOT, env={**os.environ, **caches, "PYTHONPATH": path}, stdout=log, stderr=log
        )
        seconds, over = None, False
        while seconds is None and not over:
            time.sleep(0.02)
            over = process.poll() is not None or time.perf_counter() - began > limit
            if finished(out / "metrics.jsonl", wanted):
                seconds = round(time.perf_counter() - began, 2)
        try:
            code = process.wait(timeout=limit if seconds else 0)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        log.seek(0)
        if seconds is None:
            return {"failed": f"exit code {code}: {log.read()[-800:]}"}
    return {"seconds": seconds, "new_graphs": len(graphs(cache) - before)}


def finished(metrics: Path, step: int) -> bool:
    """Whether the row of a step is written."""
    if not metrics.is_file():
        return False
    rows = [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return any(row["step"] == step and "loss" in row for row in rows)


def graphs(cache: Path) -> set[Path]:
    """Compiled graphs in the cache, as the compiler and as autograd files them."""
    return {path for kind in ("fxgraph", "aotautograd") for path in (cache / kind).rglob("*") if path.is_file()}


if __name__ == "__main__":
    main()
