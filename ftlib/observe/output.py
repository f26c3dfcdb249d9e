"""All that a run leaves in its output folder and on the screen: config, metrics, progress, the last words."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ftlib import budget, config, quant
from ftlib.adapters import initial
from ftlib.errors import UserError
from ftlib.losses import balancing
from ftlib.observe import diagnose, report, sinks
from ftlib.observe.environment import environment
from ftlib.observe.flops import count_weights, device_peak, flops_per_token
from ftlib.observe.meter import Devices, Meter
from ftlib.observe.metrics import MetricsFile
from ftlib.observe.progress import Progress
from ftlib.observe.said import Said
from ftlib.observe.watch import Watch
from ftlib.optim import adamw
from ftlib.parallel import graphs, pulse
from ftlib.parallel import run as processes
from ftlib.quant.frozen import FrozenWeight
from ftlib.sections import Loss, Mtp
from ftlib.sections.steps import shares


class Output:
    """`with Output(cfg, run, model, steps) as output:` around the training loop; one function emits each kind of row.

    `counters` survive a restart: hand them to the checkpoint's state as `extra`, and call `begin` after resuming.
    """

    def __init__(self, cfg: Any, run: Devices, model: nn.Module, steps: int) -> None:
        self.cfg, self.run, self.steps = cfg, run, steps
        self.folder = Path(cfg.output_dir)
        self.metrics = MetricsFile(self.folder, enabled=run.is_main)
        self.samples = MetricsFile(self.folder, enabled=run.is_main, name="samples.jsonl")
        self.counters: dict[str, Any] = {"tokens": 0}
        self.watch = Watch(cfg.optim, self.counters, self.say)
        self.must_go_back = False  # what `watch` said about the last step
        self._sinks: list[sinks.Sink] = []
        self._last = steps  # step that was done last
        self._rate: float | None = None  # of the last step of the run that goes on
        self._notes = [*processes.note(cfg.parallel, run.world), *attention_note(getattr(model, "model", None))]
        self._notes += [*quant.note(model), *budget.note(model), *balancing.note(model, cfg), *loss_note(cfg)]
        self._notes += [*adamw.note(model, cfg.optim), *initial.note(getattr(cfg, "lora", None))]
        mixers = [(layer.mixer.heads * layer.mixer.head_dim, layer.mixer.window) for layer in model.arch.layers]
        peak = None
        if run.device.type == "cuda":
            import torch

            peak = device_peak(torch.cuda.get_device_name(run.device))
        work = flops_per_token(*count_weights(model), mixers, cfg.data.seq_len)
        peak_flops = peak and (peak.measured or peak.datasheet)
        self._meter = Meter(run, work, peak_flops, memory=partial(graphs.peak, model))
        self._progress = Progress(steps, steps, enabled=run.is_main)

    def say(self, text: str) -> None:
        """A line for the user, printed once."""
        self._progress.note(text)

    def begin(self, done: int, report: Iterable[str]) -> "Output":
        """Start, or continue after `done` steps: rows of steps that will be done again are dropped.

        `report`: lines about the data, for the user. UserError when more was done than is asked for.
        """
        if done > self.steps:
            raise UserError(
                f"the checkpoint has {done:,} steps, more than the {self.steps:,} asked for",
                where=str(self.folder),
                fix="raise steps, use a new output_dir, or start over: checkpoint.resume=never",
            )
        if self.run.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            again = replace(self.cfg.checkpoint, resume="auto")  # a run is started over once
            kept = config.dump(replace(self.cfg, checkpoint=again))
            (self.folder / "config.yaml").write_text(kept, encoding="utf-8")
            (self.folder / diagnose.TRACEBACK).unlink(missing_ok=True)  # what ended the run last time
            self._sinks = sinks.open_sinks(self.cfg, self.folder, done, self.counters)
        for file in (self.metrics, self.samples):
            file.truncate_after(done if done else -1)
        rates = [row["lr"] for row in self.metrics.rows() if "lr" in row] if done else []
        self._rate = rates[-1] if rates else None
        pulse.at(done + 1)
        self._meter.tokens = self.counters["tokens"]
        for line in (*report, *self._notes, *shares(self.cfg, self.steps)):
            self.say(line)
        self._progress = Progress(self.steps, done, every=self.cfg.log.every, enabled=self.run.is_main)
        self._meter.start()
        return self

    def waiting(self) -> AbstractContextManager[None]:
        """`with output.waiting(): batch = next(loader)` measures how much of a step is spent on that: `data_wait`."""
        return self._meter.waiting()

    def step(
        self,
        step: int,
        loss: Tensor,
        grad_norm: Tensor,
        lr: float,
        tokens: int,
        more: Mapping[str, float | None] | None = None,
    ) -> None:
        """The row of one optimizer step; `tokens` are the step's, over all devices; `more`: what only this recipe has.
        Raises UserError where the config says that numbers like these end a run."""
        if self._rate is not None and lr > 2 * self._rate:
            what = f"step {step}: the learning rate rises from {self._rate:.3g} to {lr:.3g} at once"
            self.say(f"{what}: steps, schedule or optim.lr are not those of the run that goes on")
        self._rate = None
        row = self._meter.row(step, loss.item(), grad_norm.item(), lr, tokens) | dict(more or {})
        self.counters["tokens"], self._last = row["tokens"], step
        self._write(row)
        self._progress.step(row)
        self.must_go_back = self.watch(step, row["loss"], row["grad_norm"])

    def evaluation(self, step: int, row: dict[str, float], samples: Sequence[Said]) -> None:
        """The row of a held-out evaluation after `step` steps (0: before the first), and answers to look at."""
        for one in samples:
            if one.row:
                self.samples.write({"step": step, **one.row})
        if row:
            self._write({"step": step, **row})
            if step:
                self._compare(step, row)
            numbers = "  ".join(f"{key.replace('_', ' ')} {_number(key, value)}" for key, value in row.items())
            self.say(f"held out, after step {step}:  {numbers}")
        elif samples:
            self.say(f"after step {step}:")
        for one in samples:
            self.say(str(one))
        self._meter.start()

    @property
    def best(self) -> dict[str, Any] | None:
        """The best evaluation so far: its `step`, the `value` of its `metric`, evaluations `since` without a better."""
        return self.counters.get("best")

    def forget_best(self) -> None:
        """The next evaluation is the best so far."""
        self.counters.pop("best", None)

    def _compare(self, step: int, row: dict[str, float]) -> None:
        key = self.cfg.eval.metric
        if key not in row:
            if self.cfg.eval.patience or self.cfg.checkpoint.keep_best:
                raise UserError(f"an evaluation has no {key!r}", where="eval.metric", fix=f"it has {', '.join(row)}")
            return
        value, best = row[key], self.best
        sign = -1 if "loss" in key or "perplexity" in key else 1
        if math.isfinite(value) and (best is None or sign * value > sign * best["value"]):
            self.counters["best"] = {"step": step, "value": value, "since": 0, "metric": key}
        elif best is not None:
            best["since"] += 1

    def _write(self, row: dict[str, Any]) -> None:
        self.metrics.write(row)
        for sink in self._sinks:
            sink.write(row)

    def saved(self) -> None:
        """A checkpoint was written: its time is not training time."""
        self._meter.start()

    def finish(self, *commands: str) -> None:
        """The last words of a finished run: what changed, where things are, what to do next."""
        self._progress.close()
        scores = [row for row in self.rows() if any(key.startswith("eval_") for key in row)]
        if self.cfg.checkpoint.keep_best and self.best is not None:  # that is the model in final/
            scores = [row for row in scores if row["step"] <= self.best["step"]]
        for key in scores[0] if len(scores) > 1 else ():
            if key != "step" and key in scores[-1]:
                before, after = (_number(key, row[key]) for row in (scores[0], scores[-1]))
                self.say(f"{key.replace('_', ' ')}: {before} before, {after} after")
        if self.run.is_main:
            self._report()
        self.say(f"finished {self._last} steps; results in {self.folder / 'final'}, curves in {report.NAME} beside it")
        self.say("next:")
        for command in commands:
            self.say(f"  {command}")

    def _report(self) -> None:
        counted = {"bad_steps": "steps left out: no finite gradient", "rollbacks": "returns to a checkpoint"}
        notes = [f"{self.counters[key]} {text}." for key, text in counted.items() if self.counters.get(key)]
        if self.best is not None:
            notes.append(f"Best {self.cfg.eval.metric}: {self.best['value']:.4g}, after step {self.best['step']}.")
        name, text = self.folder.resolve().name, config.dump(self.cfg)
        rows, samples = self.rows(), self.samples.rows()
        kept = self.best["step"] if self.cfg.checkpoint.keep_best and self.best is not None else None
        report.write(self.folder / report.NAME, name, rows, samples, text, environment(), notes, kept)

    def already_finished(self) -> list[dict[str, Any]]:
        """The run of this folder is over: say so, with its numbers; nothing is done again."""
        self.say(
            f"{self.folder} holds a finished run of {self.steps} steps: nothing to do.\n"
            "To train further raise steps; to start over set checkpoint.resume=never or another output_dir."
        )
        return self.rows()

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        return self.metrics.rows()

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind: type[BaseException] | None, *ended: object) -> None:
        self._progress.close()
        for sink in self._sinks:
            sink.close(kind is not None)


def attention_note(decoder: nn.Module | None) -> list[str]:
    """Which attention backend computes, for the user; where it is the slow one, why."""
    backend, arch = getattr(decoder, "backend", None), getattr(decoder, "arch", None)
    if backend == "reference" and getattr(arch, "softcap", False):
        return ["attention: reference, slow and with every score in memory: scores are capped softly"]
    return [f"attention: {backend}"] if backend else []


def loss_note(cfg: Any) -> list[str]:
    """What a run's loss is besides cross-entropy, for the user: the numbers of two such runs are no comparison."""
    rule, ahead = getattr(cfg, "loss", None) or Loss(), getattr(cfg, "mtp", None) or Mtp()
    terms = {
        f"weights of {rule.name}": rule.name != Loss.name,
        f"z_loss {rule.z_loss:g}": rule.z_loss,
        f"router_aux {rule.router_aux:g}": rule.router_aux,
        f"mtp of depth {ahead.depth}": ahead.depth,
        f"neftune {getattr(cfg, 'neftune', 0):g}": getattr(cfg, "neftune", 0),
    }
    found = [term for term, on in terms.items() if on]
    lines = [f"loss: with {', '.join(found)}; held-out losses are plain cross-entropy"] if found else []
    teacher = getattr(cfg, "distill", None)
    if teacher is not None:
        kept = f", by what is kept in {teacher.stored}" if teacher.stored else ""
        lines.append(f"teacher: {teacher.teacher}, {teacher.divergence}{kept}")
    return lines


def trained_share(model: nn.Module) -> str:
    """How much of a model is trained, for the user; sharded parameters count whole, quantized ones as what they are."""
    held = [module for module in model.modules() if isinstance(module, FrozenWeight)]
    codes = {id(p) for module in held for p in module.parameters()}
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters() if id(p) not in codes]
    sizes += [(module.shape.numel(), False) for module in held]
    everything, trained = sum(n for n, _ in sizes), sum(n for n, on in sizes if on)
    return f"{trained:,} of {everything:,} parameters are trained ({trained / everything:.1%})"


def _number(key: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1%}" if key == "exact_match" else f"{value:.4f}"
