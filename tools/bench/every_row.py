"""Every row that was measured or still has to be, again, one after the other within a time.

    python tools/bench/every_row.py --list
    python tools/bench/every_row.py --only 'llama8b*' --seconds 540 --peers FOLDER
    CUDA_VISIBLE_DEVICES=1 python tools/bench/every_row.py --only dpo,grpo --gpu h200 --seconds 540

A row is one command; it is begun only while the seconds it needs are left, as half a row is none. Results go to
`tools/bench/results/NAME.json`, where README's table, LOG.md and the estimate of eight GPUs read them. `--peers` has a
folder for each peer (torchtune, torchtitan, unsloth, trl) with its packages; without it they must be importable here,
or their rows say that they are not.
"""

import argparse
import fnmatch
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Row(NamedTuple):
    """One file of results: what makes it, and the seconds that takes where nothing is compiled yet."""

    name: str  # with {gpu} in it, h100 or h200
    seconds: int  # it is ended after these
    command: str  # of tools/bench, without --out and --peer-path


LEAN = "--recompute except_attention --offload"
TIGHT = "--recompute full --offload"
WITHIN = "--recompute full --budget-gib"
FULL = "--shape qwen3-1.7b --method full --rows 4"
TITAN = "--rows 4 --vs plain,torchtitan"
FLASH = f"{TITAN} --attention flash4 --steps 0"
MODES = {  # of low precision, and what each is held against: ftlib/quant/README.md
    "lora_int8": "--quantize int8 --vs dequantized", "lora_fp8_base": "--quantize fp8 --vs dequantized",
    **{f"{method}_{kind}": f"--method {method} --fp8 {kind} --vs bf16"
       for method in ("lora", "full") for kind in ("tensorwise", "rowwise")},
    **{f"{method}_qat_{scheme}": f"--method {method} --qat {scheme} --vs dequantized"
       for method in ("lora", "full") for scheme in ("int4", "int8_int4", "fp8")},
    **{f"full_states_{kind}": f"--method full --states {kind} --vs usual" for kind in ("int8", "fp8", "int4")},
    "full_stochastic": "--method full --rounding stochastic --vs usual",
}  # fmt: skip
ROWS = (
    Row("{gpu}_llama8b_qlora_r16_2x4096_recompute", 330, f"sft.py --quantize nf4 {LEAN} --vs unsloth,torchtune"),
    Row("{gpu}_llama8b_lora_r16_2x4096_recompute", 290, f"sft.py {LEAN} --vs torchtune,unsloth"),
    Row("{gpu}_llama8b_lora_r16_2x4096_no_recompute", 270, "sft.py --vs torchtune,unsloth"),
    Row("{gpu}_llama8b_lora_r16_2x4096_selective", 270, "sft.py --recompute selective --vs torchtune,unsloth"),
    Row("{gpu}_llama8b_lora_fp8_1x4096_no_recompute", 200, "sft.py --fp8 tensorwise --rows 1 --vs bf16"),
    Row(
        "{gpu}_llama8b_full_fp8_4x4096_recompute", 330, "sft.py --fp8 tensorwise --method full --rows 4 "
        "--recompute full --in-backward --states int8 --rounding stochastic --vs bf16",
    ),
    Row(
        "{gpu}_llama70b_qlora_r16_1x4096_recompute", 150,
        f"sft.py --shape llama-3.3-70b --quantize nf4 --rows 1 {TIGHT}",
    ),
    Row(
        "{gpu}_qwen8b_lora_r16_1x16384_recompute", 330,
        f"sft.py --shape qwen3-8b --rows 1 --seq-len 16384 {TIGHT} --vs unsloth",
    ),
    Row("{gpu}_qwen06b_lora_r16_4x4096_recompute", 150, f"sft.py --shape qwen3-0.6b --rows 4 {TIGHT} --vs unsloth"),
    Row("{gpu}_qwen06b_lora_r16_4x4096_no_recompute", 150, "sft.py --shape qwen3-0.6b --rows 4 --vs unsloth,trl"),
    Row(
        "{gpu}_qwen06b_lora_r16_4x4096_selective", 150,
        "sft.py --shape qwen3-0.6b --rows 4 --recompute selective --vs unsloth,trl",
    ),
    Row("{gpu}_qwen17b_full_4x4096_recompute", 180, f"sft.py {FULL} {LEAN} --in-backward --vs trl"),
    Row("{gpu}_qwen17b_full_int4_4x4096_recompute", 180, f"sft.py {FULL} {LEAN} --in-backward --states int4 --vs trl"),
    *(Row(f"{{gpu}}_llama8b_lora_within_{gib}", 300, f"sft.py {WITHIN} {gib} --vs unsloth,torchtune")
      for gib in (24, 48)),
    Row("{gpu}_qwen17b_full_within_24", 240, f"sft.py {FULL} {WITHIN} 24 --in-backward --vs trl"),
    Row("budgets_llama8b_lora_{gpu}", 460, "budgets.py --vs torchtune,unsloth --limit 100"),
    Row(
        "budgets_llama8b_qlora_{gpu}", 330, "budgets.py --quantize nf4 --vs torchtune,unsloth --limit 100 --budgets 16 "
        "--settings selective,except_attention+",
    ),
    Row("budgets_qwen17b_full_{gpu}", 330, f"budgets.py {FULL} --in-backward --vs trl --limit 80"),
    *(Row(f"precision_qwen17b_{mode}_2x4096_{{gpu}}", 90, f"sft.py --shape qwen3-1.7b {command} --limit 45")
      for mode, command in MODES.items()),
    Row("pretrain_qwen06b_4x4096_{gpu}", 280, f"pretrain.py --shape qwen3-0.6b {TITAN} --limit 90"),
    Row("pretrain_qwen17b_4x4096_{gpu}", 320, f"pretrain.py --shape qwen3-1.7b {TITAN} --limit 99"),
    Row("packed_qwen06b_{gpu}", 280, "packed.py --recompute none --vs trl,unsloth"),
    Row(
        "packed_qwen06b_selective_{gpu}", 130,
        "packed.py --recompute selective --cuda-graph --attention flash4 --vs unsloth",
    ),
    Row("packed_qwen06b_recompute_{gpu}", 280, "packed.py --recompute full --vs trl,unsloth"),
    Row(
        "graphs_qwen06b_lora_4x4096_selective_{gpu}", 120,
        "sft.py --shape qwen3-0.6b --rows 4 --recompute selective --cuda-graph --vs unsloth",
    ),
    Row("pretrain_qwen06b_4x4096_graphs_{gpu}", 150, f"pretrain.py --shape qwen3-0.6b {FLASH} --cuda-graph --limit 60"),
    Row("flash4_llama8b_lora_2x4096_{gpu}", 170, "sft.py --attention flash4 --vs torchtune --limit 80"),
    Row("graphs_llama8b_lora_2x4096_{gpu}", 170, "sft.py --attention flash4 --cuda-graph --vs torchtune --limit 80"),
    *(Row(f"pretrain_qwen{size}_4x4096_flash4_{{gpu}}", 280, f"pretrain.py --shape {shape} {FLASH} --limit 90")
      for size, shape in (("06b", "qwen3-0.6b"), ("17b", "qwen3-1.7b"))),
    Row("dpo_llama8b_lora_4x1024_{gpu}", 260, "dpo.py --shape llama-3.1-8b --fp8 tensorwise --vs trl"),
    Row("generate_llama8b_64_{gpu}", 280, "generate.py --shape llama-3.1-8b --new 512 --vs transformers --limit 170"),
    Row("generate_qwen06b_64x256_{gpu}", 120, "generate.py --shape qwen3-0.6b --new 256 --vs transformers --limit 90"),
    Row("generate_qwen06b_64_{gpu}", 240, "generate.py --shape qwen3-0.6b --new 768 --vs transformers --limit 150"),
    Row("grpo_qwen06b_8x8_{gpu}", 300, "grpo.py --shape qwen3-0.6b --vs trl --limit 180"),
    Row("grpo_llama8b_8x8_{gpu}", 200, "grpo.py --shape llama-3.1-8b --vs '' --quantize none,nf4 --limit 95"),
    Row("kernels_{gpu}", 110, "kernels.py --limit 90"),
    Row("kernels_adamw_{gpu}", 40, "kernels.py --only AdamW"),
    Row("context_llama8b_lora_{gpu}", 460, "context.py --tiled-mlp 8192 --from 8192 --limit 450"),
    Row("context_llama8b_qlora_{gpu}", 240, "context.py --quantize nf4 --tiled-mlp 8192 --from 131072 --limit 230"),
    Row("startup_qwen06b_{gpu}", 150, "startup.py --shape qwen3-0.6b --limit 60"),
    Row("startup_llama8b_{gpu}", 260, "startup.py --shape llama-3.1-8b --limit 120"),
    *(Row(f"{{gpu}}x2_{group}", seconds, f"parallel.py --only {group} --budget {seconds - 10} --limit {seconds // 2}")
      for group, seconds in (("lora", 300), ("long", 220), ("full", 220), ("save", 110), ("70b", 130),
                             ("full8b", 300))),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="names without the GPU's, comma separated; * stands for anything")
    parser.add_argument("--gpu", default="h100", help="what files are called after")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="in which all must end")
    parser.add_argument("--peers", type=Path, help="a folder of folders of packages, each called like its peer")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--list", action="store_true", help="the rows and whether there is a result; runs nothing")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    for row in chosen(args.only):
        out, left = args.out / f"{row.name.format(gpu=args.gpu)}.json", end - time.monotonic()
        if args.list:
            print(f"{'measured' if out.is_file() else '-':9} {row.seconds:4} s  {out.stem:45} {row.command}")
        elif row.seconds > left:
            print(f"== {out.stem}: needs {row.seconds} s, {left:.0f} are left", flush=True)
        else:
            print(f"== {out.stem}", flush=True)
            limit = ["timeout", "--kill-after=3", str(row.seconds)]  # ends the contenders too
            subprocess.run([*limit, *command(row, out, args.peers)], check=False)


def chosen(only: str) -> list[Row]:
    """The rows whose names hold one of the patterns, in the order of the patterns."""
    patterns = [f"*{pattern.strip()}*" for pattern in only.split(",")]
    found = [row for pattern in patterns for row in ROWS if fnmatch.fnmatch(row.name, pattern)]
    return list(dict.fromkeys(found))


def command(row: Row, out: Path, peers: Path | None) -> list[str]:
    """What the system runs."""
    script, *options = shlex.split(row.command)
    takes_peers = "--vs" in row.command or "full8b" in row.command
    paths = sorted(peers.iterdir()) if peers and takes_peers else []
    return [
        sys.executable, str(HERE / script), *options, *(f"--peer-path={path.name}={path}" for path in paths),
        "--out", str(out),
    ]  # fmt: skip


if __name__ == "__main__":
    os.chdir(HERE.parents[1])
    main()
