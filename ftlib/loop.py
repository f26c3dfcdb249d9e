"""What every training loop does between two steps, in one order: go back, evaluate, save, stop."""

from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

from ftlib.checkpoint import Saver, State, StopFlag, stop_agreed
from ftlib.checkpoint.agree import Ranks
from ftlib.errors import Stopped, UserError
from ftlib.observe import sinks
from ftlib.observe.output import Output
from ftlib.observe.profile import STEPS, WARM, StepProfile
from ftlib.optim import schedule, schedule_free
from ftlib.parallel import pulse
from ftlib.parallel.apply import reshard
from ftlib.sections.steps import in_steps


def check(cfg: Any) -> None:
    """UserError for what a run would only find out after its first steps, or need and not find installed."""
    if (steps := getattr(cfg, "steps", None)) is not None and steps < 1:
        raise UserError(f"{steps} steps are none", where="steps", fix="1 or more, or null to count epochs")
    if steps is None and getattr(cfg, "epochs", 1) <= 0:
        raise UserError(f"{cfg.epochs:g} epochs are none", where="epochs", fix="above 0, a fraction too, or set steps")
    if steps is not None and hasattr(cfg, "schedule"):
        schedule.check(cfg.schedule, steps)
    if not 0 <= getattr(cfg, "seed", 0) < 1 << 63:
        raise UserError("a seed has at most 63 bits and no sign", where="seed", fix="a number such as 0")
    if getattr(cfg, "neftune", 0) < 0:
        raise UserError(f"noise of {cfg.neftune:g} is none", where="neftune", fix="above 0 (5 is usual), or 0 for none")
    if getattr(cfg, "profile", False) and cfg.steps is not None and cfg.steps < WARM + STEPS:
        what = f"steps {WARM + 1} to {WARM + STEPS} are traced, and the run has {cfg.steps}"
        raise UserError(what, where="profile, steps", fix="raise steps, or leave profile out")
    log, evaluation, checkpoint = (getattr(cfg, name, None) for name in ("log", "eval", "checkpoint"))
    if log is not None:
        sinks.check(log.to)
        if log.statistics and not hasattr(cfg, "stream"):
            what = "norms by kind of parameter are counted by recipes/pretrain.py alone"
            raise UserError(what, where="log.statistics", fix="set it to 0")
    if checkpoint is None or evaluation is None:
        return
    if _goes_back(cfg) and not (checkpoint.every or getattr(checkpoint, "keep_best", False)):
        what, where = "rollback goes back to a checkpoint, and none is saved", "optim.nonfinite, optim.spike"
        raise UserError(what, where=f"checkpoint.every, {where}", fix="set checkpoint.every above 0")
    best, patience = getattr(checkpoint, "keep_best", False), getattr(evaluation, "patience", 0)
    if best and not evaluation.every:
        raise UserError("there is no evaluation to pick the best by", where="eval.every", fix="set it above 0")
    held_out = getattr(getattr(cfg, "data", None), "eval", 0)
    if (best or patience) and held_out is None:
        raise UserError(
            "checkpoint.keep_best and eval.patience look at held-out rows, and none are set apart",
            where="data.eval",
            fix="name files, or a share of the training rows: data.eval=0.05",
        )
    asked = [key for key in ("every", "exact_match") if getattr(evaluation, key, 0)]
    if asked and held_out is None and not getattr(evaluation, "prompts", ()):
        raise UserError(
            f"{' and '.join(f'eval.{key}' for key in asked)} would look at held-out rows, and none are set apart",
            where=f"data.eval, {', '.join(f'eval.{key}' for key in asked)}",
            fix="name files, or a share of the training rows: data.eval=0.05; or leave the evaluation out",
        )


def _goes_back(cfg: Any) -> bool:
    """Whether a run may go back to a checkpoint."""
    section = getattr(cfg, "optim", None)
    return "rollback" in (getattr(section, "nonfinite", None), getattr(section, "spike", None))


class Boundary:
    """`with Boundary(…) as boundary:` around the loop; in it, `if boundary(step): break` after each step.

    `evaluate(model)` gives a row of numbers and `evaluate.samples()` answers to print and keep. Inside the block a
    signal that asks the run to end is obeyed after the step: the state is saved and `Stopped` raised.
    """

    def __init__(
        self,
        cfg: Any,
        run: Ranks,
        steps: int,
        evaluate: Callable[[Any], dict[str, float]],
        output: Output,
        saver: Saver,
        state: State,
    ) -> None:
        self.cfg, self.run, self.steps = cfg, run, steps
        self.evaluate, self.output, self.saver, self.state = evaluate, output, saver, state
        self._flag, self._step = StopFlag(), 0
        self._every = in_steps(cfg.eval.every, steps)
        saver.goes_back = _goes_back(cfg)
        saver.cfg = replace(saver.cfg, every=in_steps(saver.cfg.every, steps))
        wanted = getattr(cfg, "profile", False) and run.is_main
        self._profile = StepProfile(output.folder / "profile", state.model, state.optimizer, output.say, wanted)

    def __call__(self, step: int) -> bool:
        """After step `step`; True when the run should end here, as evaluations no longer improve (eval.patience)."""
        with self._profile:
            return self._between(step)

    def _between(self, step: int) -> bool:
        cfg, output, saver, self._step = self.cfg, self.output, self.saver, step
        pulse.at(step + 1)
        if output.must_go_back:
            output.say(f"model and optimizer are those of step {saver.roll_back(self.state)} again")
        if step == self.steps or (self._every and step % self._every == 0):
            self.score(step)
        best = output.best
        best_now = cfg.checkpoint.keep_best and best is not None and best["step"] == step
        stale = bool(cfg.eval.patience and best is not None and best["since"] >= cfg.eval.patience)
        stopping, due = stop_agreed(self.run, self._flag), saver.due(step, self.steps)
        if stale and step < self.steps:
            best_yet = f"{cfg.eval.metric} has not improved on {best['value']:.4g} since step {best['step']}"
            output.say(f"{best_yet}: ending after step {step} of {self.steps}")
            return True  # and nothing is saved: a run that is killed before its result is there ends here once more
        if stopping or due or best_now:
            saver.save(step, self.state)
            output.saved()
        if stopping:
            saver.wait()
            how = " without checkpoint.resume=never" if cfg.checkpoint.resume == "never" else ""
            what = f"stopped by {self._flag.by} after step {step} of {self.steps}"
            raise Stopped(f"{what}; the same command{how} continues")
        return False

    def score(self, step: int) -> None:
        """Evaluate after `step` steps, 0 before the first."""
        with schedule_free.averaged(self.state.optimizer):
            self.output.evaluation(step, self.evaluate(self.state.model), self.evaluate.samples())
            reshard(self.state.model)

    def finish(self) -> None:
        """After the last step the model becomes the one to keep: with `checkpoint.keep_best` the best there was, with
        schedule-free learning the average."""
        best = self.output.best
        if self.cfg.checkpoint.keep_best and best is not None and best["step"] != self._step:
            step = self.saver.load_best(self.state)
            self.output.say(f"final/ is the model of step {step}, the best by {self.cfg.eval.metric}")
        schedule_free.finish(self.state.optimizer)

    def _look_for_another_best(self) -> None:
        """A best evaluation is forgotten where this run goes by another number, or has not kept the model of it."""
        best, metric = self.output.best, self.cfg.eval.metric
        if best is None:
            return
        if best.get("metric", metric) != metric:
            why = f"that was by {best['metric']}"
        elif self.cfg.checkpoint.keep_best and not self.saver.has(best["step"]):
            why = "its checkpoint was not kept"
        else:
            return
        self.output.say(f"the best evaluation was after step {best['step']}, and {why}: the best is looked for anew")
        self.output.forget_best()

    def __enter__(self) -> "Boundary":
        self._look_for_another_best()
        self._flag.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flag.__exit__(kind, error, trace)
        self._profile.close()
