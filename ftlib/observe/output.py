"""All that a run leaves in its output folder and on the screen: config, metrics, progress, the last words."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ftlib import config
from ftlib.errors import UserError
from ftlib.observe.flops import count_weights, device_peak, flops_per_token
from ftlib.observe.meter import Devices, Meter
from ftlib.observe.metrics import MetricsFile
from ftlib.observe.progress import Progress


class Output:
    """`with Output(cfg, run, model, steps) as output:` around the training loop; one function emits each kind of row.

    `counters` survive a restart: hand them to the checkpoint's state as `extra`, and call `begin` after resuming.
    """

    def __init__(self, cfg: Any, run: Devices, model: nn.Module, steps: int) -> None:
        self.cfg, self.run, self.steps = cfg, run, steps
        self.folder = Path(cfg.output_dir)
        self.metrics = MetricsFile(self.folder, enabled=run.is_main)
        self.counters: dict[str, Any] = {"tokens": 0}
        mixers = [(layer.mixer.heads * layer.mixer.head_dim, layer.mixer.window) for layer in model.arch.layers]
        peak = None
        if run.device.type == "cuda":
            import torch

            peak = device_peak(torch.cuda.get_device_name(run.device))
        work = flops_per_token(*count_weights(model), mixers, cfg.data.seq_len)
        self._meter = Meter(run, work, peak and (peak.measured or peak.datasheet))
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
            (self.folder / "config.yaml").write_text(config.dump(self.cfg), encoding="utf-8")
        self.metrics.truncate_after(done if done else -1)
        self._meter.tokens = self.counters["tokens"]
        for line in report:
            self.say(line)
        self._progress = Progress(self.steps, done, every=self.cfg.log.every, enabled=self.run.is_main)
        self._meter.start()
        return self

    def step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, tokens: int) -> None:
        """The row of one optimizer step; `tokens` are the step's, over all devices."""
        row = self._meter.row(step, loss.item(), grad_norm.item(), lr, tokens)
        self.counters["tokens"] = row["tokens"]
        self.metrics.write(row)
        self._progress.step(row)

    def evaluation(self, step: int, row: dict[str, float], samples: Sequence[str]) -> None:
        """The row of a held-out evaluation after `step` steps (0: before the first), and answers to look at."""
        if row:
            self.metrics.write({"step": step, **row})
            numbers = "  ".join(f"{key.replace('_', ' ')} {_number(key, value)}" for key, value in row.items())
            self.say(f"held out, after step {step}:  {numbers}")
            for line in samples:
                self.say(line)
        self._meter.start()

    def saved(self) -> None:
        """A checkpoint was written: its time is not training time."""
        self._meter.start()

    def finish(self, *commands: str) -> None:
        """The last words of a finished run: what changed, where things are, what to do next."""
        scores = [row for row in self.rows() if "eval_loss" in row]
        for key in scores[0] if len(scores) > 1 else ():
            if key != "step":
                before, after = (_number(key, row[key]) for row in (scores[0], scores[-1]))
                self.say(f"{key.replace('_', ' ')}: {before} before, {after} after")
        self.say(f"finished {self.steps} steps; results in {self.folder / 'final'}")
        self.say("next:")
        for command in commands:
            self.say(f"  {command}")

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

    def __exit__(self, *ended: object) -> None:
        self._progress.close()


def _number(key: str, value: float) -> str:
    return f"{value:.1%}" if key == "exact_match" else f"{value:.4f}"
