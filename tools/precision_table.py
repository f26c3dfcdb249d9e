"""The table of ftlib/quant/README.md: each mode of low precision, its loss, memory, GPU figures, what it works with.

    python tools/precision_table.py --train   # train the shipped model in every mode first: some minutes on 2 cores
    python tools/precision_table.py           # write the table again, from tools/bench/results
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "bench")]

from sft import OWN  # noqa: E402
from table import results  # noqa: E402

from ftlib import build, config, plugins  # noqa: E402
from ftlib.errors import UserError  # noqa: E402

RESULTS = ROOT / "tools" / "bench" / "results"
MEASURED, README = RESULTS / "precision_cpu.json", ROOT / "ftlib" / "quant" / "README.md"
START, END = "<!-- tools/precision_table.py -->", "<!-- end -->"
SHORT = ["eval.exact_match=0", "steps=20", "batch.rows=4", "batch.micro_rows=4", "checkpoint.every=0", "profile=true"]
SMALL = ["model.fp8_smallest=16"]  # the shipped model's layers are small
MODES: dict[str, tuple[str, list[str]]] = {
    "LoRA": ("lora", []),
    "LoRA, `model.quantize: nf4`": ("lora", ["model.quantize=nf4"]),
    "LoRA, `model.quantize: int8`": ("lora", ["model.quantize=int8"]),
    "LoRA, `model.quantize: fp8`": ("lora", ["model.quantize=fp8"]),
    "LoRA, `model.fp8: tensorwise`": ("lora", ["model.fp8=tensorwise", *SMALL]),
    "LoRA, `model.fp8: rowwise`": ("lora", ["model.fp8=rowwise", *SMALL]),
    "LoRA, `qat.scheme: int4`": ("lora", ["qat.scheme=int4"]),
    "LoRA, `qat.scheme: int8_int4`": ("lora", ["qat.scheme=int8_int4"]),
    "LoRA, `qat.scheme: fp8`": ("lora", ["qat.scheme=fp8"]),
    "full": ("full", []),
    "full, `model.fp8: tensorwise`": ("full", ["model.fp8=tensorwise", *SMALL]),
    "full, `model.fp8: rowwise`": ("full", ["model.fp8=rowwise", *SMALL]),
    "full, `qat.scheme: int4`": ("full", ["qat.scheme=int4"]),
    "full, `qat.scheme: int8_int4`": ("full", ["qat.scheme=int8_int4"]),
    "full, `qat.scheme: fp8`": ("full", ["qat.scheme=fp8"]),
    "full, `optim.states: int8`": ("full", ["optim.states=int8"]),
    "full, `optim.states: fp8`": ("full", ["optim.states=fp8"]),
    "full, `optim.states: int4`": ("full", ["optim.states=int4"]),
    "full, `dtype: bf16`": ("full", ["dtype=bf16"]),
    "full, `dtype: bf16`, `optim.rounding: stochastic`": ("full", ["dtype=bf16", "optim.rounding=stochastic"]),
}
HELD = ("frozen weights", "trained weights", "gradients", "optimizer state")
AXES = {
    "FSDP2": ["parallel.dp_shard=2"], "copies": ["parallel.dp_replicate=2", "parallel.dp_shard=1"],
    "TP": ["parallel.tp=2"], "DoRA": ["lora.dora=true"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true")
    if parser.parse_args().train:
        found = {}
        for name, mode in MODES.items():
            found[name] = trained(*mode)
            MEASURED.write_text(json.dumps(found, indent=1) + "\n")
    text = README.read_text()
    before, rest = text.split(START)
    README.write_text(before + START + "\n" + "\n".join(table()) + "\n" + END + rest.split(END)[1])


def trained(recipe: str, overrides: list[str]) -> dict:
    """Held-out loss of the demo's run in this mode, what the run said of its layers, and MiB by what holds them."""
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "ftlib", "run", f"recipes/{recipe}_sft.py"]
        run += ["--config", f"configs/demo_{recipe}.yaml", *overrides, *SHORT, f"output_dir={folder}"]
        said = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        held = json.loads((Path(folder) / "profile/summary.json").read_text())["memory_gib"]
    notes = re.findall(r"^(?:base|fp8|rounding): .*$", said, re.MULTILINE)
    kept = 16.0 if "dtype=bf16" in overrides else 32.0
    bits = next((float(b) for note in notes for b in re.findall(r"([\d.]+) bits a weight", note)), kept)
    mib = {name: round(1024 * held[name], 2) for name in HELD}
    return {"eval_loss": rows[-1]["eval_loss"], "steps": rows[-1]["step"], "bits": bits, "said": notes, "mib": mib}


def table() -> list[str]:
    """Markdown lines."""
    measured = json.loads(MEASURED.read_text())
    lines = [
        "| mode | layers | bits kept | loss held out | against plain | MiB: frozen, trained, gradients, optimizer | "
        "GPU: tokens/s (peak GiB) | validates with |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (recipe, overrides) in MODES.items():
        if name not in measured:
            continue
        row, plain = measured[name], measured["LoRA" if recipe == "lora" else "full"]
        layers = next((n for note in row["said"] for n in re.findall(r"(\d+) (?:matrices|layers)", note)), "–")
        gap = f"{row['eval_loss'] - plain['eval_loss']:+.4f}" if overrides else ""
        held = ", ".join(f"{row['mib'][part]:.1f}" for part in HELD)
        cells = [name, layers, f"{row['bits']:g}", f"{row['eval_loss']:.4f}", gap, held, gpu(recipe, overrides)]
        lines.append("| " + " | ".join([*cells, ", ".join(works(recipe, overrides))]) + " |")
    return lines


def gpu(recipe: str, overrides: list[str]) -> str:
    """The slower of our two runs of each benchmark in this mode; nothing where none was measured."""
    asked = {key.split(".")[-1]: value for key, value in (word.split("=") for word in overrides)}
    asked, cells = {"method": recipe, "qat": asked.pop("scheme", None), **asked}, []
    if "dtype" in asked and "rounding" not in asked:
        return ""  # as all of them
    same = ["method", "quantize", "fp8", "qat"]
    same += [] if asked.get("fp8") else ["states", "rounding"]  # beside fp8 they are named
    for path in [*results(), *sorted(RESULTS.glob("precision_*_h[12]00.json"))]:
        found = [row for row in json.loads(path.read_text()).get("rows", []) if "tokens_per_s" in row and "work" in row]
        rows = [row for row in found if row["contender"] == "ftlib"]
        rows = [row for row in rows if all(_of(row["work"], key) == asked.get(key) for key in same)]
        if rows:
            slower = min(rows, key=lambda r: r["tokens_per_s"])
            work = slower["work"]
            kept = f"within {budget:g} GiB" if (budget := work.get("budget_gib")) else f"recompute {work['recompute']}"
            what = f"{work['shape']} {work['rows']} x {work['seq_len']}, {kept}"
            if work.get("states") and "states" not in asked:
                what += f", states {work['states']}"
            what += f", {slower['device'].split()[1]}"
            cells.append(f"{what}: {slower['tokens_per_s']:,} ({slower['peak_gib']:.1f}){beside(found)}")
    return "; ".join(cells)


def beside(rows: list[dict]) -> str:
    """Against the same step without the mode, where that ran beside it: speed, and whether the two agree."""
    plain = next((row for row in rows if row["contender"] in OWN), None)
    if plain is None:
        return ""
    wrong = "" if plain["agrees"] else f", first gradient {plain['grad_gap']:.0%} off"
    return f", × {plain['ratio']:.2f} of plain's{wrong}"


def _of(work: dict, key: str) -> str | None:
    """A benchmark's setting, None where it is what a run has without it."""
    value = work.get(key)
    return None if value == "nearest" else value


def works(recipe: str, overrides: list[str]) -> list[str]:
    """The axes that validation lets this mode be combined with."""
    schema, found = plugins.load_file(ROOT / "recipes" / f"{recipe}_sft.py").Config, []
    for axis, words in AXES.items():
        if axis == "DoRA" and recipe == "full":
            continue
        arguments = ["--config", str(ROOT / f"configs/demo_{recipe}.yaml"), *overrides, *words]
        arguments += ["batch.micro_rows=1", "eval.exact_match=0"]
        try:
            build.check(config.load(schema, arguments), 2)
            found.append(axis)
        except UserError:
            continue
    return found


if __name__ == "__main__":
    main()
