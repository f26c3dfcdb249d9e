"""Saving and resuming a run: the one object a recipe holds."""

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

import ftlib
from ftlib.checkpoint import changes, format, rng, tensors
from ftlib.checkpoint.agree import Ranks, exchange, together, wire_device
from ftlib.checkpoint.background import Background
from ftlib.checkpoint.verify import newest_good, read_state, verify
from ftlib.config.whose import recipe_of_run
from ftlib.errors import UserError
from ftlib.parallel.apply import reshard
from ftlib.parallel.run import reseed
from ftlib.sections import Checkpoint

FINISHED, LOCK = ".finished.json", ".lock"  # in output_dir; hidden, as neither is a result
OF_A_RECIPE = frozenset({"dpo", "reward", "rollout", "train", "diffusion"})  # a recipe lists them always or never
CONFIG = "config"  # in a fingerprint and beside it in what is saved
SAVE = "SAVE"  # a file of this name in output_dir asks for a checkpoint after the step that is running


class Position(Protocol):
    """Where the data is: plain integers, the same on every rank."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class State:
    """All that changes while training. Schedules are functions of the step and keep nothing."""

    model: nn.Module
    optimizer: Optimizer | Sequence[Optimizer]
    loader: Position
    extra: dict[str, Any] = field(default_factory=dict)  # JSON-able, the same on every rank; filled in place by resume

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        return [self.optimizer] if isinstance(self.optimizer, Optimizer) else self.optimizer


class Saver:
    """Checkpoints of one run in `<output_dir>/checkpoints`. Every method that touches files is collective.

    `fingerprint` is a flat dict of JSON values that must be equal for a run to be continued (model, data, seed,
    rows…; a `seed` in it also seeds the generators when the number of ranks changes). Its entry `config` is the whole
    config: what of that may change, and what is said then, is in changes.py.
    """

    def __init__(
        self,
        cfg: Checkpoint,
        output_dir: Path,
        run: Ranks,
        fingerprint: dict[str, Any],
        say: Callable[[str], None] = print,
    ) -> None:
        self.cfg, self.run = cfg, run
        self.root = Path(output_dir) / "checkpoints"
        self.final = Path(output_dir) / "final"
        self.marker = Path(output_dir) / FINISHED
        self._request = Path(output_dir) / SAVE
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self._config = self.fingerprint.pop(CONFIG, {})
        self._say = say if run.is_main else lambda text: None
        self._initial: list[dict[str, Any]] | None = None  # optimizer settings before the first step
        self._lock: TextIO | None = None
        self._unwanted: set[str] = set()  # damaged, or of a run that is started over: gone after the next save
        asked = cfg.background
        self._in_background = run.device.type == "cuda" if asked == "auto" else asked
        self._background: Background | None = None  # made after the first step
        self._state: State | None = None  # what `resume` was given
        self.goes_back = False  # whether `roll_back` may be asked for, so that stops leave what it goes back to

    def due(self, step: int, last_step: int) -> bool:
        """Whether to save after `step`: every `checkpoint.every` steps and at the end, never if that is 0, and when
        someone has made a file `<output_dir>/SAVE` (the save removes it). Collective.

        Raises what went wrong with a save in the background, on every rank after the same step."""
        asked = self.run.is_main and self._request.exists()
        failed = self._background is not None and self._background.failed
        if self.run.world > 1:
            flags = torch.tensor([asked, failed], dtype=torch.int32, device=wire_device(self.run))
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            asked, failed = map(bool, flags.tolist())
        if failed:
            self.wait()
        if self._in_background and self._background is None and self._state is not None and self.cfg.every:
            self._background = Background()
            self._background.reserve(self._everything(self._state)[0])
        return asked or (self.cfg.every > 0 and (step % self.cfg.every == 0 or step == last_step))

    def resume(self, state: State) -> int:
        """Fill `state` from the newest whole checkpoint; steps done, 0 for a fresh start.

        Call it last before the loop: the generators are restored last and anything random afterwards moves them.
        Raises UserError where nothing can be resumed but something should be, or where the settings differ.
        """
        self._state = state
        if self._initial is None:
            self._initial = tensors.groups(state.optimizers)
        choice: str | None = None
        processes = exchange(self.run, (platform.node(), os.getpid(), self._config))
        if apart := changes.apart([config for _, _, config in processes]):
            fix = "start every node with the same config and the same overrides"
            raise UserError("processes of one run have different configs:\n  " + "\n  ".join(apart), fix=fix)
        with together(self.run, "looking for checkpoints"):
            if self.run.is_main:
                self.root.mkdir(parents=True, exist_ok=True)
                self._hold_lock([(node, pid) for node, pid, _ in processes])
                choice = self._choose()
        name = exchange(self.run, choice)[0]
        if name is None:
            return 0
        with together(self.run, f"reading {name}"):
            saved = read_state(self.root / name)
            noted = self._compare(name, saved)
            numbers = saved["optimizer"]["state"]
            wanted = tensors.targets(self.root / name, state.model, state.optimizers, numbers)
        with together(self.run, f"reading {name}"):
            tensors.fill(self.root / name, wanted, state.model, state.optimizers, numbers)
            changed = tensors.restore_groups(state.optimizers, self._initial, saved["optimizer"]["groups"])
            state.loader.load_state_dict(saved["loader"])
            state.extra.update(saved["extra"])
        told = "; ".join(noted or dict.fromkeys(changed))
        self._say(f"resuming from {name}" + (f"; config changed {told}" if told else ""))
        self._restore_rng(saved)
        return saved["step"]

    def save(self, step: int, state: State) -> None:
        """Publish `step_N`, then drop what is over `checkpoint.keep`. A failure raises on every rank and leaves the
        checkpoints before it as they were.

        In the background (`checkpoint.background`) this returns as soon as there is a copy in host memory; `wait` for
        the rest. A second save waits for the first."""
        self.wait()
        name = format.step_name(step)
        temporary = self.root / f".tmp_{name}"
        with together(self.run, f"preparing {name}"):
            everything, numbers = self._everything(state)
            tensors.assert_plain(everything)
            if self.run.is_main:
                self._make_room(name, tensors.total_bytes(everything))
                temporary.mkdir()
                self._request.unlink(missing_ok=True)
        content = self._content(step, state, numbers, exchange(self.run, rng.capture(self.run.device)))
        also = self._planned(state)[-1:] if self.goes_back and step % max(1, self.cfg.every) else []
        also += filter(None, [self._best(state)])
        if not self._in_background:
            return self._write(step, everything, content, also)
        if self._background is None:
            self._background = Background()
        with together(self.run, f"copying {name}"):
            copies = self._background.copy(everything)
        content = json.loads(json.dumps(content))  # counters go on too
        self._background.start(lambda: self._write(step, copies, content, also, self._background.group))

    def _everything(self, state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All live tensors that a checkpoint holds, and the optimizer's plain numbers."""
        reshard(state.model)
        slots, numbers = tensors.optimizer_state(state.model, state.optimizers)
        return tensors.model_tensors(state.model) | slots, numbers

    def wait(self) -> None:
        """Until a save in the background is done; raises what went wrong with it. Collective in effect."""
        if self._background is not None:
            self._background.wait()

    def _write(
        self,
        step: int,
        everything: dict[str, Tensor],
        content: dict[str, Any],
        also: list[str],
        group: ProcessGroup | None = None,
    ) -> None:
        run, name = self.run, format.step_name(step)
        temporary = self.root / f".tmp_{name}"
        try:
            with together(run, f"preparing {name}", group):
                if not temporary.is_dir():
                    fix = "put output_dir on storage that all machines share"
                    raise UserError(f"process {run.rank} does not see {temporary}", fix=fix)
            with together(run, f"writing {name}", group):
                tensors.write(temporary, everything, run.world, group)
                mine = format.seal(temporary, f"shard-{run.rank + 1:05d}-")
            files = {file: entry for part in exchange(run, mine, group) for file, entry in part.items()}
            with together(run, f"publishing {name}", group):
                if run.is_main:
                    format.publish_step(self.root, step, content, files)
        except BaseException:
            if run.is_main:
                format.discard(temporary)
            raise
        with together(run, "removing old checkpoints", group):
            if run.is_main:
                format.prune(self.root, self.cfg.keep, step, self._unwanted - {name}, self._say, also)
        self._unwanted.clear()

    def roll_back(self, state: State) -> int:
        """Fill model and optimizer from the newest whole checkpoint of this run; data, counters and generators go on.
        Its step. One that only a signal or a request asked for serves if there is no other, so that a run that was
        stopped goes back to where one that never was would."""
        self.wait()
        name = None
        with together(self.run, "going back to a checkpoint"):
            if self.run.is_main:
                own, planned = self._own(), self._planned(state)
                name = newest_good(self.root, self._say, planned)[0] or newest_good(self.root, self._say, own)[0]
                if name is None:
                    fix = "lower checkpoint.every, or set optim.nonfinite or optim.spike to something else"
                    raise UserError("there is no checkpoint to go back to", where=str(self.root), fix=fix)
        return self._fill(exchange(self.run, name)[0], state)

    def _own(self) -> dict[str, int]:
        """Checkpoints of this run, and not of one that it started over, with their steps; lowest first."""
        return {name: step for name, step in format.listing(self.root).items() if name not in self._unwanted}

    def _planned(self, state: State) -> list[str]:
        """Those of `_own` that it would have if nobody had stopped it, or asked for one."""
        every, best = self.cfg.every, self._best(state)
        return [name for name, step in self._own().items() if name == best or (every and step % every == 0)]

    def load_best(self, state: State) -> int | None:
        """With `checkpoint.keep_best`: fill model and optimizer from the best evaluation's checkpoint. Its step."""
        self.wait()
        name = self._best(state)
        return None if name is None else self._fill(name, state)

    def _best(self, state: State) -> str | None:
        best = state.extra.get("best") if self.cfg.keep_best else None
        return None if best is None else format.step_name(best["step"])

    def _fill(self, name: str, state: State) -> int:
        reshard(state.model)
        with together(self.run, f"reading {name}"):
            broken = verify(self.root / name) if self.run.is_main else None
            if broken:
                raise UserError(f"{name} is damaged: {broken}", where=str(self.root))
            saved = read_state(self.root / name)
            numbers = saved["optimizer"]["state"]
            wanted = tensors.targets(self.root / name, state.model, state.optimizers, numbers)
        with together(self.run, f"reading {name}"):
            tensors.fill(self.root / name, wanted, state.model, state.optimizers, numbers)
        return saved["step"]

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of `step`. Collective."""
        return exchange(self.run, (self.root / format.step_name(step)).is_dir())[0]

    def finish(self, step: int) -> None:
        """Note that the run is over at `step` and its `final` folder published."""
        self.wait()
        with together(self.run, "marking the run as finished"):
            if self.run.is_main:
                temporary = self.marker.with_suffix(".tmp")
                format.write_json(temporary, {"step": step, "fingerprint": self.fingerprint, CONFIG: self._config})
                os.replace(temporary, self.marker)
                format.sync(self.marker.parent)

    def finished(self) -> int | None:
        """Step at which the run ended, if it did and `final` is there; None also with `checkpoint.resume: never`."""
        step: int | None = None
        with together(self.run, "looking for a finished run"):
            if self.run.is_main and self.cfg.resume != "never" and self.marker.is_file() and self.final.is_dir():
                content = _read_marker(self.marker)
                if content:
                    self._compare("the finished run", content)
                    step = content["step"]
        return exchange(self.run, step)[0]

    def _choose(self) -> str | None:
        """Rank 0: tidy the folder and pick what to resume from, by `checkpoint.resume`."""
        format.sweep(self.root, _intact, self._say)
        names = list(format.listing(self.root))
        if self.cfg.resume == "never":
            self.marker.unlink(missing_ok=True)
            self._unwanted = set(names)
            if names:
                self._say(f"starting over; the next save replaces {', '.join(names)}")
            return None
        name, damaged = newest_good(self.root, self._say)
        self._unwanted = {text.split(":")[0] for text in damaged}
        if name is None and damaged:
            raise UserError(
                "every checkpoint is damaged:\n    " + "\n    ".join(damaged),
                where=str(self.root),
                fix="restore one from a copy, or start over: checkpoint.resume=never",
            )
        if name is None and self.cfg.resume == "required":
            raise UserError(
                "there is no checkpoint to resume from",
                where=str(self.root),
                fix="check output_dir, or set checkpoint.resume=auto to start from the beginning",
            )
        return name

    def _hold_lock(self, processes: Sequence[tuple[str, int]]) -> None:
        """Until this process ends, however it ends: two runs in one folder would sweep away each other's saves. The
        file names all `processes` of the run, by host: those of a launcher that was killed train on."""
        if self._lock is not None:
            return
        handle = open(self.root.parent / LOCK, "a+")  # noqa: SIM115 - closing it would release the lock
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by data workers
        except (BlockingIOError, PermissionError):
            handle.seek(0)
            hosts = [line.split() for line in handle]
            handle.close()
            named = "; ".join(f"process{'es' * (len(pids) > 1)} {', '.join(pids)} on {host}" for host, *pids in hosts)
            stop = f"stop it (on {hosts[0][0]}: kill {hosts[0][1]}, which saves first)" if named else "stop it"
            what, fix = "another run is using this folder", f"wait for it or {stop}, or use a new output_dir"
            raise UserError(f"{what}: {named}" if named else what, where=str(self.root.parent), fix=fix) from None
        except OSError:
            pass  # some network file systems have no locks; then nothing guards against a second run
        handle.truncate(0)
        by_host = {host: [str(pid) for name, pid in processes if name == host] for host, _ in processes}
        handle.writelines(f"{host} {' '.join(pids)}\n" for host, pids in by_host.items())
        handle.flush()
        self._lock = handle

    def _compare(self, name: str, content: dict[str, Any]) -> list[str]:
        """What the config has changed since. UserError where that makes it another run."""
        saved, was = content["fingerprint"], content.get(CONFIG) or changes.config_of(self.root.parent)
        drift = changes.refused(saved, self.fingerprint, was, self._config)
        if drift:
            other = any(key.split(".")[0] in OF_A_RECIPE for key in saved.keys() ^ self.fingerprint.keys())
            recipe = recipe_of_run(self.root.parent) if other else None
            by = f", by {recipe}" if recipe else ""
            raise UserError(
                f"{name} was made with other settings{by}:\n    " + "\n    ".join(drift),
                where=str(self.root),
                fix="set them back, use a new output_dir, or start over: checkpoint.resume=never",
            )
        return changes.noted(was, self._config)

    def _make_room(self, name: str, size: int) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        format.sweep(self.root, _intact, self._say)
        need, free = int(1.02 * size) + (1 << 20), shutil.disk_usage(self.root).free
        if free < need:
            last = list(format.listing(self.root))[-1:]
            raise UserError(
                f"no room for {name}: it needs {need / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free",
                where=str(self.root),
                fix="free some space and run the same command again"
                + (f"; it continues from {last[0]}, which is kept" if last else ""),
            )

    def _content(
        self, step: int, state: State, numbers: dict[str, Any], generators: list[dict[str, Any]]
    ) -> dict[str, Any]:
        current = tensors.groups(state.optimizers)
        mesh = getattr(self.run, "data", None)
        return {
            "step": step,
            "loader": state.loader.state_dict(),
            "extra": state.extra,
            "optimizer": {"groups": {"initial": self._initial or current, "current": current}, "state": numbers},
            "rng": {str(rank): generator for rank, generator in enumerate(generators)},
            "world": self.run.world,
            "mesh": {} if mesh is None else dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)),
            "fingerprint": self.fingerprint,
            CONFIG: self._config,
            "versions": {"ftlib": ftlib.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def _restore_rng(self, saved: dict[str, Any]) -> None:
        if saved["world"] == self.run.world:
            rng.restore(saved["rng"][str(self.run.rank)], self.run.device)
            return
        self._say(f"saved by {saved['world']} processes, now {self.run.world}: random generators start anew")
        reseed(self.fingerprint.get("seed", 0), saved["step"], getattr(self.run, "stream", self.run.rank))


def _intact(folder: Path) -> bool:
    return verify(folder) is None


def _read_marker(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except ValueError:  # somebody edited it; the checkpoints still know how far the run came
        return None
