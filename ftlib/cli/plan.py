"""What a run would take of each GPU, before there is one: which settings fit, and how many GPUs it needs.

    tune plan RECIPE --config FILE [--gpus N] [--gib G] [key=value …]

Nothing is loaded: of the model its config.json is read, of the data nothing. Memory of the training steps, estimated
as `memory.budget_gib` does (within some percent of what was measured on H100s and H200s); what draws answers or holds
a second model (GRPO, distillation, DPO of every weight) comes on top. Weights and what trains them are in `dtype`
(bf16 throughout, unless optim.states says otherwise); gradients hold the head's in float32 too until the loss is known;
`other` is logits and what other GPUs' weights take while they are here. --gib: of one GPU; 80 where none is here.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from ftlib.cli import recipe
from ftlib.cli.preview import take_number
from ftlib.errors import UserError, about

TIGHT = 0.95  # of a GPU's memory: the estimate may be some percent off, and the allocator leaves gaps
MANY = 4096  # GPUs, and rows of a forward, beyond which nobody looks


def main(argv: Sequence[str]) -> int:
    """`tune plan RECIPE --config F [--gpus N] [--gib G] [k=v]`"""
    if any(word in ("-h", "--help") for word in argv):
        print(__doc__.strip())
        return 0
    gpus, argv = take_number(argv, "plan", "--gpus", 1)
    gib, argv = take_number(argv, "plan", "--gib", _of_a_gpu())
    if recipe.starts_processes("plan", argv):
        raise UserError(f"tune plan: the recipe comes before {argv[0]}", fix="tune plan RECIPE --config FILE --gpus N")
    path = recipe.find(argv[0], "plan")
    from ftlib import config  # what follows imports torch

    module = recipe.load(path)
    cfg, places = config.read(module.Config, recipe.with_shipped_configs(argv[1:]))
    if not all(hasattr(cfg, name) for name in ("model", "batch", "memory", "parallel", "optim")):
        raise UserError(f"{path}: its config has no training step to plan")
    with places.told(), TemporaryDirectory() as scratch:
        cfg = _without_weights(cfg)
        cfg = module.shaped(cfg, Path(scratch)) if hasattr(module, "shaped") else cfg  # other sizes than its model's
        print("\n".join(lines(cfg, gpus, gib)))
    return 0


def _without_weights(cfg: Any) -> Any:
    """The config with a model of the Hub replaced by its files but the weights."""
    from ftlib.models import hub, remote

    name = str(cfg.model.path)
    if not hub.HUB_ID.fullmatch(name) or Path(name).expanduser().exists():
        return cfg
    with about("model.path"):
        return replace(cfg, model=replace(cfg.model, path=str(remote.fetch(name, weights=False))))


def lines(cfg: Any, gpus: int, gib: int) -> list[str]:
    """The table of settings and what follows from it, as Markdown."""
    from ftlib import budget, build, preflight
    from ftlib.models.remote import size
    from ftlib.parallel import check, recompute
    from ftlib.parallel import run as processes

    least = cfg.memory.budget_gib if isinstance(cfg.memory.budget_gib, (int, float)) else gib
    budget_bytes = int(min(gib, least) * 2**30)
    replicas, shard, cp, tp = processes.sizes(cfg.parallel, gpus)
    own, ways = cfg.batch.micro_rows, shard * cp * tp
    step = getattr(cfg.batch, "rows", MANY)
    build.check_rows(cfg, replicas * shard)
    model = build.outline(cfg)
    check.check(model, cfg, cp, tp)
    recompute.check(cfg.memory, len(model.model.layers))

    def need(memory: Any, micro_rows: int = own, ways: int = ways) -> preflight.Need:
        batch = replace(cfg.batch, micro_rows=micro_rows)
        return preflight.need(model, SimpleNamespace(**vars(cfg) | {"memory": memory, "batch": batch}), ways)

    def fits(memory: Any, micro_rows: int = own, ways: int = ways) -> bool:
        return need(memory, micro_rows, ways).about <= budget_bytes

    mesh = processes.note(cfg.parallel, gpus)
    found = [f"{gpus} GPU{'s' * (gpus > 1)} of {size(budget_bytes)}; a forward of each: {cfg.batch.micro_rows} x "
             f"{cfg.data.seq_len:,} tokens (batch.micro_rows x data.seq_len)", *mesh, ""]
    parts = ("weights", "gradients", "optimizer", "activations")
    found += [f"| GiB of each GPU | {' | '.join(parts)} | other | in all | fits | micro_rows up to |", "|---" * 8 + "|"]
    rungs = [rung.memory for rung in budget.ladder(model, cfg, ways)]
    asked = replace(cfg.memory, budget_gib=None)
    needs = {memory: need(memory) for memory in (asked, *rungs)}
    blocks, form = len(model.model.layers), ".1f" if needs[asked].about >= 1 << 31 else ".3f"
    shown = rungs if cfg.memory.budget_gib is not None else needs
    for memory in sorted(shown, key=lambda memory: (-needs[memory].about, budget.cost(memory, blocks))):
        taken = needs[memory]
        at_peak = taken.moments[taken.peak]
        cells = [at_peak.get(part, 0) for part in parts]
        cells += [taken.about - sum(cells), taken.about]
        most = max((rows for rows in _doubling() if rows * replicas * shard <= step and fits(memory, rows)), default=0)
        this = " (this config)" if memory == asked and cfg.memory.budget_gib is None else ""
        found.append(f"| {budget.words(memory)}{this} | {' | '.join(f'{cell / 2**30:{form}}' for cell in cells)} | "
                     f"{_verdict(taken.about / budget_bytes)} | {most or '-'} |")
    found += ["", *_left_out(cfg)]
    taken = needs[asked]
    found += [f"on disk: a checkpoint {size(taken.checkpoint)}, the result {size(taken.final)}"
              + f"; in host memory of each process: {size(taken.host)}" * bool(taken.host)]
    if not any(map(fits, rungs)):
        if getattr(cfg, "lora", None) is None and not (cfg.optim.in_backward or cfg.optim.offload):
            found.append("optim.in_backward and optim.offload take less (ftlib/optim/README.md)")
        found.append(_enough(lambda ways: fits(rungs[-1], 1, ways), replicas, cp * tp))
    return found


def _left_out(cfg: Any) -> list[str]:
    """What the estimates do not know of, and what it came to where it was measured (ftlib/quant/README.md)."""
    found = []
    if cfg.memory.budget_gib is not None:
        what = "memory.budget_gib: a run tries them on its GPU, takes the fastest that fits"
        found.append(f"{what}, and lets some blocks keep more with what that leaves")
    if getattr(cfg, "qat", None) is not None:
        found.append("qat is not in these estimates: 1.7B runs took 9 to 17 % more")
    if cfg.model.fp8 is not None and getattr(cfg, "lora", None) is None:
        found.append("model.fp8 is not in these estimates: a 1.7B run of every weight took 15 % less")
    return found


def _verdict(share: float) -> str:
    return "no" if share > 1 else "tight" if share > TIGHT else "yes"


def _enough(fits: Any, replicas: int, together: int) -> str:
    """The smallest number of GPUs that would do, with the leanest setting and one row each."""
    ways = next((together * n for n in _doubling() if fits(together * n)), None)
    if ways is None:
        return "does not fit on any number of GPUs: a shorter data.seq_len, model.quantize=nf4, LoRA, optim.states=int8"
    many = f"{ways * replicas} GPU{'s' * (ways * replicas > 1)}"
    return f"the leanest of these settings fits on {many} with batch.micro_rows=1"


def _doubling() -> list[int]:
    return [1 << n for n in range(MANY.bit_length())]


def _of_a_gpu() -> int:
    """GiB of the GPU here; 80 where there is none."""
    from ftlib import preflight

    where, have, _ = preflight.available()
    return have >> 30 if where == "the GPU" else 80
