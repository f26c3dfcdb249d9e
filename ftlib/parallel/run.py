"""Where a run runs: process group, device, meshes. One process is just the mesh of size one."""

import hashlib
import math
import os
import random
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ftlib import world as launched
from ftlib.errors import UserError
from ftlib.layers.batch import MULTIPLE, Batch
from ftlib.parallel import context, logs, pulse
from ftlib.sections import Parallel
from ftlib.world import world_size


@dataclass(frozen=True)
class Run:
    """What a recipe knows about its processes.

    `dense` (dp_replicate, fsdp, tp) places parameters; `data` (dp_replicate, dp_shard, cp, tp) places rows.
    """

    device: torch.device
    rank: int
    world: int
    dense: DeviceMesh
    data: DeviceMesh
    cp_style: str = "ulysses"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_ranks(self) -> int:
        """Processes that read different rows."""
        return self.data["dp_replicate"].size() * self.data["dp_shard"].size()

    @property
    def data_rank(self) -> int:
        return self.data["dp_replicate"].get_local_rank() * self.data["dp_shard"].size() + self.data[
            "dp_shard"
        ].get_local_rank()

    @property
    def multiple(self) -> int:
        """What the length of a row that is not `data.seq_len` is a multiple of: of 64, and of the pieces that cp and tp
        make of it, whichever the style."""
        return math.lcm(MULTIPLE, 2 * self.data["cp"].size() * self.data["tp"].size())

    @property
    def stream(self) -> int:
        """Which random numbers are this process's own: alike only where processes share matrices (tp), as their
        parts of a dropout mask must fit; 0 on the first."""
        return self.data_rank * self.data["cp"].size() + self.data["cp"].get_local_rank()

    def share(self, batch: Batch) -> Batch:
        """The part of a batch that this process computes: all of it unless rows lie on several processes."""
        cp = self.data["cp"]
        return batch if cp.size() == 1 else context.share(batch, cp.get_group(), self.cp_style)

    def total(self, x: Tensor) -> Tensor:
        """`x` summed over the processes that hold different tokens."""
        x = x.detach().clone()
        for axis in ("dp_replicate", "dp_shard", "cp"):
            if self.data[axis].size() > 1:
                dist.all_reduce(x, group=self.data[axis].get_group())
        return x

    def wait_for_all(self) -> None:
        """Until every process is here, however long it takes them: one of each machine prepares data for the others."""
        if self.world > 1:
            group = pulse.patient_group()
            dist.barrier(group=group)
            dist.destroy_process_group(group)


def sizes(cfg: Parallel, world: int) -> tuple[int, int, int, int]:
    """(dp_replicate, dp_shard, cp, tp) for `world` processes; UserError naming the keys when they do not fit."""
    fixed = cfg.dp_replicate * cfg.cp * cfg.tp
    shard = cfg.dp_shard if cfg.dp_shard != -1 else max(1, world // fixed)
    if fixed * shard != world:
        product = f"dp_replicate {cfg.dp_replicate} x dp_shard {shard} x cp {cfg.cp} x tp {cfg.tp} = {fixed * shard}"
        raise UserError(
            f"{product}, but there {'is 1 process' if world == 1 else f'are {world} processes'}",
            where="parallel",
            fix=f"start {fixed * shard} processes (tune run --nproc-per-node {fixed * shard} …) or change parallel.*",
        )
    return cfg.dp_replicate, shard, cfg.cp, cfg.tp


def note(cfg: Parallel, world: int) -> list[str]:
    """How many processes there are and what they share, for the user; nothing of one."""
    axes = zip(("dp_replicate", "dp_shard", "cp", "tp"), sizes(cfg, world), strict=True)
    shared = " x ".join(f"{name} {size}" for name, size in axes if size > 1)
    return [f"processes: {world} ({shared})"] if world > 1 else []


def start(cfg: Parallel, seed: int, deterministic: bool | str = False) -> Run:
    """Join the process group, pick the device, build the meshes, seed the generators (see `Run.stream`)."""
    world, rank = world_size(), launched.rank()
    shape = sizes(cfg, world)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        launched.check()
        pulse.prepare()
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        # One process needs no rendezvous, so it opens no port.
        store = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world == 1 else {}
        dist.init_process_group(backend, timeout=timedelta(seconds=cfg.timeout_s), **store)
    if world > 1 and logs.folder() is not None:
        pulse.start(logs.folder(), rank, world, logs.end)
    torch.manual_seed(seed)
    random.seed(seed)
    if deterministic:
        make_deterministic()
    dense = init_device_mesh(
        device.type, (shape[0], shape[1] * shape[2], shape[3]), mesh_dim_names=("dp_replicate", "fsdp", "tp")
    )
    data = init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard", "cp", "tp"))
    run = Run(device=device, rank=rank, world=world, dense=dense, data=data, cp_style=cfg.cp_style)
    if run.stream:
        reseed(seed, 0, run.stream)
    return run


def reseed(seed: int, step: int, stream: int) -> None:
    """Fresh generators, of a rank above 0 at the start and of all when a run goes on with another number of ranks: a
    function of its arguments alone."""
    number = int.from_bytes(hashlib.sha256(f"{seed}:{step}:{stream}".encode()).digest()[:8], "little") >> 1
    torch.manual_seed(number)  # every device
    random.seed(number)


def make_deterministic() -> None:
    """Equal runs give equal bits on one machine; slower on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
