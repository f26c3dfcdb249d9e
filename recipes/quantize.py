"""Round a model's layers to few bits and say what it costs: a trained model, or the result of training with `qat`.

    tune run recipes/quantize.py --config configs/demo_quantize.yaml to.scheme=fp8
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ftlib import build, models
from ftlib.checkpoint.final import final_folder
from ftlib.config import OutputDir
from ftlib.evaluation.evaluate import Evaluation
from ftlib.export import compressed
from ftlib.launch import launch
from ftlib.observe.metrics import MetricsFile
from ftlib.parallel import run as processes
from ftlib.quant import qat
from ftlib.sections import Batch, Data, Eval, Memory, Model, Parallel, Rounding, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    to: Rounding = Rounding()
    data: Data  # its held-out rows are what the two models are compared on
    batch: Batch = Batch()
    eval: Eval = Eval()
    memory: Memory = Memory()
    parallel: Parallel = Parallel()
    seed: int = 0  # which rows are held out
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the arithmetic, and of what is not rounded
    output_dir: OutputDir = Path("output/quantize")  # metrics.jsonl and final/ go here


def main(cfg: Config) -> list[dict]:
    """Evaluate, round, evaluate, save; returns the rows of metrics.jsonl."""
    build.check(cfg, processes.world_size())
    run = processes.start(cfg.parallel, cfg.seed)

    tokenizer = build.tokenizer(cfg)
    rows = build.datasets(cfg, tokenizer)
    loader = build.loader(cfg, rows.train, tokenizer, run)
    model = build.model(cfg, run)
    evaluate = Evaluation(cfg, rows, tokenizer, run, loader.max_documents)

    found = []
    for rounded in (False, True):
        qat.switch(model, rounded)
        found.append({"rounded": rounded, **evaluate(model)})
        if run.is_main:
            numbers = "  ".join(
                f"{key.replace('_', ' ')} {value:.4f}" for key, value in found[-1].items() if key != "rounded"
            )
            print(f"{cfg.to.scheme if rounded else 'before'}:  {numbers}", *evaluate.samples(), sep="\n")

    with final_folder(run, cfg.output_dir) as folder:
        change = partial(compressed.packed, model, cfg.to)
        models.save_pretrained(model, folder, write=run.is_main, packed=(change, compressed.config(cfg.to)))
        if run.is_main:
            tokenizer.save(folder)
    metrics = MetricsFile(cfg.output_dir, enabled=run.is_main)
    metrics.truncate_after(-1)
    for step, row in enumerate(found):
        metrics.write({"step": step, **row})
    if run.is_main:
        print(f"{len(qat.rounded(model))} layers rounded; results in {cfg.output_dir}/final")
    return found


if __name__ == "__main__":
    launch(Config, main)
