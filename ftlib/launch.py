"""What a recipe's last line calls: parse the config, run `main(cfg)`, end with one message and an exit code.

Exit codes: 0 done, 2 the user's mistake, 75 saved after a signal (run the same command to go on), 76 no progress.
Anything else is a bug and keeps its traceback.
"""

import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from ftlib import config, world
from ftlib.errors import Hung, Problems, Stopped, UserError, of_system, plain_warning
from ftlib.parallel import logs
from ftlib.world import rank, world_size

Schema = TypeVar("Schema")
INTERRUPTED = 130  # 128 + SIGINT, as a shell has it
LET_GO_S = 0.1  # what threads of gloo's are given to let go of what they exchanged
WORKERS = "FTLIB_WORKERS"  # folder in which the workers of one `tune run` leave their process ids and last messages


def launch(schema: type[Schema], main: Callable[[Schema], object], argv: Sequence[str] | None = None) -> None:
    """Run a recipe: `main` with an instance of `schema` made from the command line. Exits unless the code is 0.

    Works alone, under torchrun and inside `tune run`. Only rank 0 prints a message; the others exit with the same code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in argv):
        print(usage(schema))
        return
    try:
        world.check()
    except UserError as error:
        print(message(error), file=sys.stderr)
        sys.exit(error.exit_code)
    if rank() > 0:  # breakpoint() stops rank 0, which has the terminal; the others wait at their next exchange
        sys.breakpointhook = lambda *args, **kwargs: None
    _leave_note(f"pid.{os.getpid()}")
    warnings.formatwarning = plain_warning
    cfg = None
    try:
        cfg, places = config.read(schema, argv)
        folder = getattr(cfg, "output_dir", None)
        if world_size() > 1 and folder is not None:
            logs.begin(Path(folder) / "logs", rank(), end)
            _leave_note("logs", str(Path(folder).absolute() / "logs"))
        with places.told():
            main(cfg)
    except (UserError, Stopped) as error:
        code = _report(error)
    except Hung as error:
        end(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException as error:
        if world_size() > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, to who survives a lost process: they explain it
        known = _explained(error, cfg)
        if known is not None:
            code = _report(known, everyone=True)
        if world_size() == 1:  # with others waiting in a collective, leaving it could block and hide the traceback
            _close()
        if known is None:
            if logs.terminal() is not sys.stderr:  # which is this rank's log
                traceback.print_exception(error, file=logs.terminal())
            raise
        sys.exit(code)
    else:
        code = 0
    _close()
    if code:
        sys.exit(code)


def end(error: Hung) -> NoReturn:
    """End this process at once, from any thread: the main one may be stuck in a collective for ever."""
    _report(error, everyone=True)
    sys.stdout.flush()
    os._exit(error.exit_code)


def usage(schema: type) -> str:
    """How a recipe is called, and every key of its config."""
    lines = ["--config FILE [--config FILE …] [key=value …] [~key …]", ""]
    for doc in config.describe(schema):
        lines.append(f"{doc.key}: {doc.type} [{doc.default}]" if doc.default else f"{doc.key}: {doc.type}")
        if doc.meaning:
            lines.append(f"    {doc.meaning}")
    return "\n".join(lines)


def message(error: Exception) -> str:
    """What the user reads about an error."""
    if isinstance(error, Problems) and len(error.problems) > 1:
        listed = "\n".join(error.problems).replace("\n", "\n  ")
        return f"error: {len(error.problems)} problems\n  {listed}"
    return f"error: {error}" if isinstance(error, UserError) else str(error)


def script(file: str) -> str:
    """How a command names a recipe's file: from here if it lies below, `recipes/…` if it ships."""
    path = Path(file).resolve()
    if path.parent == Path(__file__).parent / "recipes":  # of the installed package
        return f"recipes/{path.name}"
    if path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    return f"recipes/{path.name}" if path.parent.name == "recipes" else str(path)


def _explained(error: BaseException, cfg: object) -> UserError | None:
    if (refused := of_system(error)) is not None:
        return refused
    if cfg is None or not isinstance(error, Exception):
        return None
    from ftlib.observe.diagnose import explain  # imports torch, which a recipe that failed has done already

    return explain(error, cfg)


def _report(error: UserError | Stopped | Hung, everyone: bool = False) -> int:
    text = config.redact(message(error))
    if rank() == 0 or everyone:
        print(text, file=logs.terminal(), flush=True)
    _leave_note(f"message.{rank()}", text)
    return error.exit_code


def _leave_note(name: str, text: str = "") -> None:
    """Tell the `tune run` that started this worker that it is there, and how it ended."""
    folder = os.environ.get(WORKERS)
    if folder and Path(folder).is_dir():
        Path(folder, name).write_text(text)


def leave_group() -> None:
    """Leave the process group, as a process that ends does."""
    from torch import distributed

    several = distributed.get_world_size() > 1
    distributed.destroy_process_group()
    if several:  # a thread of gloo's that lets go of tensors while the interpreter ends aborts the process
        time.sleep(LET_GO_S)


def _close() -> None:
    """Leave the process group, if the recipe has entered one (torch is not imported only to find that it has not).

    Meanwhile a Ctrl-C ends the process at once, and a late SIGTERM (torchrun sends one as soon as one rank has left)
    does not turn an orderly end into a death by signal.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_DFL)
        handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from ftlib.parallel import pulse

    pulse.stop()
    leave_group()
    for number, handler in handlers.items():
        signal.signal(number, handler)
