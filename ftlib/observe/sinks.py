"""Where metric rows also go: TensorBoard, Weights & Biases, MLflow. Each is imported only when `log.to` names it."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ftlib import config
from ftlib.config.secrets import redact_tree
from ftlib.errors import UserError

# `log.to` name -> (module to import, package to install)
PACKAGES = {"tensorboard": ("tensorboard", "tensorboard"), "wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow")}


class Sink(NamedTuple):
    """`write(row)` takes a row of metrics.jsonl; `close(failed)` ends the run there."""

    write: Callable[[dict[str, Any]], None]
    close: Callable[[bool], None]


def check(names: tuple[str, ...]) -> None:
    """UserError naming the command that installs what `log.to` asks for and this machine lacks."""
    for name in names:
        module, package = PACKAGES.get(name, (None, None))
        if module is not None and importlib.util.find_spec(module) is None:
            raise UserError(
                f"{name} is not installed",
                where="log.to",
                fix=f"pip install {package}, or take {name} out of log.to",
            )


def open_sinks(cfg: Any, folder: Path, done: int, memory: dict[str, Any]) -> list[Sink]:
    """The sinks that `cfg.log.to` names, for the run in `folder` after `done` steps; rank 0 only.

    `memory` survives a restart (the run's counters): a resumed run goes on in the same place.
    """
    check(cfg.log.to)
    makers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    return [makers[name](cfg, folder, done, memory) for name in cfg.log.to if name in makers]


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """What can be drawn: `train/…` of a step, `eval/…` of an evaluation."""
    group = "train" if "loss" in row else "eval"
    kinds = (int, float)
    return {f"{group}/{k}": v for k, v in row.items() if k != "step" and isinstance(v, kinds) and v == v}


def _settings(cfg: Any) -> dict[str, Any]:
    return redact_tree(config.to_dict(cfg))


def _tensorboard(cfg: Any, folder: Path, done: int, memory: dict[str, Any]) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    # Points of steps that are done again after a restart are dropped by TensorBoard itself.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
    writer.add_text("config", f"```\n{config.dump(cfg)}```")

    def write(row: dict[str, Any]) -> None:
        for name, value in _numbers(row).items():
            writer.add_scalar(name, value, row["step"])

    return Sink(write, lambda failed: writer.close())


def _wandb(cfg: Any, folder: Path, done: int, memory: dict[str, Any]) -> Sink:
    import wandb

    run = wandb.init(
        project=cfg.log.project, name=cfg.log.name or folder.name, id=memory.get("wandb"), resume="allow",
        config=_settings(cfg), dir=str(folder),
    )  # fmt: skip
    run.define_metric("*", step_metric="step")
    memory["wandb"] = run.id
    return Sink(
        lambda row: run.log(_numbers(row) | {"step": row["step"]}),
        lambda failed: run.finish(exit_code=int(failed)),
    )


def _mlflow(cfg: Any, folder: Path, done: int, memory: dict[str, Any]) -> Sink:
    import mlflow

    mlflow.set_experiment(cfg.log.project)
    run = mlflow.start_run(run_id=memory.get("mlflow"), run_name=cfg.log.name or folder.name)
    if "mlflow" not in memory:
        mlflow.log_dict(_settings(cfg), "config.yaml")
    memory["mlflow"] = run.info.run_id
    return Sink(
        lambda row: mlflow.log_metrics(_numbers(row), step=row["step"]),
        lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED"),
    )
