"""How ranks agree: values travel as JSON bytes (nothing is unpickled) and no rank fails alone."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException

from ftlib.errors import UserError


class Ranks(Protocol):
    """The part of a Run that saving and logging need. A process group exists even for one process."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool: ...


def wire_device(run: Ranks) -> torch.device:
    """Where small messages travel: the CPU group if there is one, else the run's device."""
    return torch.device("cpu") if "cpu" in str(dist.get_backend_config()) else run.device


def exchange(run: Ranks, value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """`value` (JSON-able) of every rank, in rank order. Collective; `group`: of all ranks, on the CPU."""
    if run.world == 1:
        # A thread of gloo's lets go of its tensors some time after a collective, and needs the interpreter for that:
        # where the process ends at once, as with an error at its start, it would be aborted.
        return [json.loads(json.dumps(value))]
    device = wire_device(run) if group is None else torch.device("cpu")
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(run.world)]
    dist.all_gather(sizes, torch.tensor([mine.numel()], dtype=torch.int64, device=device), group)
    lengths = [int(size) for size in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine
    parts = [torch.empty_like(padded) for _ in range(run.world)]
    dist.all_gather(parts, padded, group)
    return [json.loads(part[:n].cpu().numpy().tobytes()) for part, n in zip(parts, lengths, strict=True)]


@contextmanager
def together(run: Ranks, doing: str, group: ProcessGroup | None = None) -> Iterator[None]:
    """A phase that succeeds on every rank or raises on every rank, so that nobody waits for one that failed.

    A file system's refusal (disk full, no permission) and a `UserError` of any rank become a `UserError` everywhere.
    Any other exception is raised where it happened and as a `RuntimeError` naming that rank on the others.
    """
    error: Exception | None = None
    try:
        yield
    except CheckpointException as failure:  # not an Exception, and it buries what happened under tracebacks
        error = _root(failure)
    except Exception as failure:
        error = failure
    reports = exchange(run, _report(error), group)
    failed = next((rank for rank, report in enumerate(reports) if report), None)
    if failed is None:
        return
    report = reports[failed]
    if report["kind"] == "user":
        raise UserError(report["what"], where=report["where"], fix=report["fix"]) from error
    if report["kind"] == "os":
        raise UserError(f"{doing}: {report['what']}", where=report["where"]) from error
    if error is not None:
        raise error
    raise RuntimeError(f"rank {failed} failed while {doing}: {report['what']}")


def _report(error: Exception | None) -> dict[str, Any] | None:
    if error is None:
        return None
    if isinstance(error, UserError):
        return {"kind": "user", "what": error.what, "where": error.where, "fix": error.fix}
    if isinstance(error, OSError):
        where = None if error.filename is None else str(error.filename)
        return {"kind": "os", "what": error.strerror or str(error), "where": where}
    return {"kind": "other", "what": f"{type(error).__name__}: {error}"}


def _root(failure: CheckpointException) -> Exception:
    """The first rank's real exception inside torch's collective one."""
    cause = failure.failures[min(failure.failures)][0]
    return cause if isinstance(cause, Exception) else RuntimeError(str(cause))
