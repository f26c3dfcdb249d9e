"""`tune run --nproc-per-node N`: check here, start the processes with torchrun's code, return their exit code."""

import argparse
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import determine_local_world_size, get_args_parser
from torch.distributed.run import run as torchrun

from ftlib.cli import assets, meeting, recipe
from ftlib.errors import UserError
from ftlib.launch import INTERRUPTED, WORKERS
from ftlib.parallel import pulse

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 3.0  # seconds in which Python hears of a signal, unless it waits in other code


def main(argv: Sequence[str]) -> int:
    """Parse torchrun's options and the recipe after them, check everything, run."""
    args, local, world = parse("run", argv)
    path = recipe.find(args.training_script)
    args.training_script = str(path)
    args.training_script_args = recipe.with_shipped_configs(args.training_script_args)
    where = meeting.address(args)
    _set_environment(local)
    if not any(word in ("-h", "--help") for word in args.training_script_args):
        with sharing(local), warnings.catch_warnings(action="ignore"):  # rank 0 checks again, and says them
            recipe.check(path, args.training_script_args, world)
    if where is not None:
        print(f"{args.nnodes} nodes meet at {where}", flush=True)
    with tempfile.TemporaryDirectory(prefix="ftlib-workers-") as folder, _forwarding(Path(folder)):
        os.environ[WORKERS] = folder
        return _run(args, Path(folder))


def parse(verb: str, argv: Sequence[str]) -> tuple[argparse.Namespace, int, int]:
    """torchrun's options and the recipe after them; the processes of this node, and of all."""
    parser = get_args_parser()
    options = parser._get_option_tuples  # `--nproc` begins two spellings of one option, which is no ambiguity
    parser._get_option_tuples = lambda word: list({id(found[0]): found for found in options(word)}.values())

    def error(message: str) -> NoReturn:
        fix = f"tune {verb} --nproc-per-node N RECIPE --config FILE …; the options are those of torchrun"
        raise UserError(f"tune {verb}: {message}", fix=fix)

    parser.error = error
    args = parser.parse_args(list(argv))
    if args.module or args.no_python:
        raise UserError(f"tune {verb}: a recipe is a file; -m and --no-python have no use here")
    alone = args.nnodes in ("1", "1:1") and not args.rdzv_endpoint and "MASTER_PORT" not in os.environ
    if alone and args.master_port == parser.get_default("master_port"):
        args.standalone = True  # a free port, so that two runs on one machine do not meet
    if hasattr(args, "signals_to_handle"):
        args.signals_to_handle = "SIGHUP,SIGQUIT"  # the others are ours: torchrun would kill 30 s after a SIGTERM
    try:
        local = determine_local_world_size(args.nproc_per_node)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--nproc-per-node {args.nproc_per_node}: {error}") from None
    if local < 1:
        raise UserError(f"--nproc-per-node {args.nproc_per_node}: at least 1 process is needed")
    nodes = args.nnodes.partition(":")[0]  # `MIN:MAX`: it has to work with the fewest
    return args, local, local * int(nodes) if nodes.isdecimal() else local


@contextmanager
def sharing(local: int) -> Iterator[None]:
    """While open, what is checked here knows how many processes this machine will have; torchrun tells each worker."""
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    try:
        yield
    finally:
        os.environ.pop("LOCAL_WORLD_SIZE") if before is None else os.environ.update(LOCAL_WORLD_SIZE=before)


def _set_environment(local: int) -> None:
    """Workers import what this process could: the working directory and, in a source tree, ftlib itself."""
    root = assets.source_root()
    paths = [os.getcwd(), *([str(root)] if root else []), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local)))


def _run(args: argparse.Namespace, folder: Path) -> int:
    if "LOGLEVEL" not in os.environ:  # the workers have said what there is to say
        logging.disable(logging.ERROR)
    try:
        torchrun(args)
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        notes = sorted(folder.glob("message.*"))
        killed = failure.exitcode < 0
        if notes and not (folder / "message.0").exists():  # the rank that speaks for all had nothing to say
            print(notes[0].read_text(), file=sys.stderr)
        if killed or (not notes and failure.exitcode != INTERRUPTED):
            how = f"died of {failure.signal_name()}" if killed else f"ended with code {failure.exitcode}"
            print(f"rank {rank} {how}{_place(folder, rank)}; the other processes were stopped", file=sys.stderr)
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except DistNetworkError as error:
        what = f"the processes cannot meet at that address: {str(error).splitlines()[0]}"
        fix = "another --master-port, if this one is taken; on several nodes check --rdzv-endpoint and --master-addr"
        raise UserError(what, where="--master-port, --master-addr, --rdzv-endpoint", fix=fix) from None
    except RendezvousError as error:
        fix = "check --nnodes, --node-rank, --rdzv-endpoint and --master-addr on every node"
        raise UserError(f"the nodes did not find each other: {error}", fix=fix) from None
    finally:
        logging.disable(logging.NOTSET)


def _place(folder: Path, rank: int) -> str:
    """How far a worker was, and where its log is."""
    note = folder / "logs"
    if not note.exists():
        return ""
    logs = Path(note.read_text())
    return pulse.last_words(logs, rank) + (f" (its log: {logs}/rank_{rank}.log)" if rank else "")


@contextmanager
def _forwarding(folder: Path) -> Iterator[None]:
    """While open, signals go to the workers, which save and end by themselves; before there are any, they end this."""
    heard = threading.Event()

    def forward(number: int, frame: FrameType | None) -> None:
        heard.set()
        workers = [int(note.name.partition(".")[2]) for note in folder.glob("pid.*")]
        if not workers and number != signal.SIGUSR1:
            raise SystemExit(128 + number)
        for pid in workers:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # it has ended already

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    with _unheard(heard, folder):
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _unheard(heard: threading.Event, folder: Path) -> Iterator[None]:
    """While open, end this process where Python hears no signal: it is in torch's code, which waits for other nodes."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def listen() -> None:
        while number := reader.recv(1):
            if number[0] in (signal.SIGINT, signal.SIGTERM) and not heard.wait(PATIENCE):
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(128 + number[0])
            heard.clear()

    before = signal.set_wakeup_fd(writer.fileno())  # is told when a signal comes, not when Python gets to it
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join()
        reader.close()
