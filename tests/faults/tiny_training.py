"""A whole training run in small: what the fault tests kill. `python tiny_training.py OUT STEPS EVERY [PAUSE]`."""

import hashlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

from ftlib.checkpoint import Saver, State, StopFlag, publish, staging, stop_agreed
from ftlib.observe import Meter, MetricsFile
from ftlib.sections import Checkpoint

CPU = torch.device("cpu")


class Loader:
    """Integers in, batch out: the position is one number."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return torch.randn(4, 16, generator=torch.Generator().manual_seed(self.position))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def one_process():
    """A process group of one, and the run that goes with it."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return SimpleNamespace(rank=0, world=1, device=CPU, is_main=True)


def fresh(dtype=torch.float32, frozen=False, seed=0):
    """A model with dropout and a persistent buffer, its AdamW and loader, all from `seed`."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.1), nn.BatchNorm1d(32), nn.Linear(32, 16)).to(dtype)
    if frozen:
        model[0].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return State(model, torch.optim.AdamW(trained, lr=1e-2), Loader(), {"tokens": 0})


def train_step(state):
    """One optimizer step; loss and gradient norm exactly as computed."""
    x = next(state.loader).to(next(state.model.parameters()).dtype)
    loss = state.model(x).float().square().mean()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.extra["tokens"] += x.numel()
    return loss.item(), norm.item()


def main(out, steps, every, pause=0.0):
    run = one_process()
    state, meter, metrics = fresh(), Meter(run), MetricsFile(out)
    saver = Saver(Checkpoint(every=every), out, run, {"seed": 0})
    if saver.finished() == steps:
        print("already finished")
        return 0
    done = saver.resume(state)
    metrics.truncate_after(done or -1)
    with StopFlag() as stop:
        for step in range(done + 1, steps + 1):
            meter.start()
            time.sleep(pause)  # a run that is met while it runs must not be over before
            metrics.write(meter.row(step, *train_step(state), lr=1e-2, tokens=64))
            stopping = stop_agreed(run, stop)
            if saver.due(step, steps) or stopping:
                saver.save(step, state)
            if stopping:
                print(f"stopped at {step} by {stop.by}")
                return 75
    temporary = staging(out / "final")
    weights = b"".join(p.detach().numpy().tobytes() for p in state.model.state_dict().values())
    (temporary / "weights.sha256").write_text(hashlib.sha256(weights).hexdigest())
    publish(temporary, out / "final")
    saver.finish(steps)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *map(float, sys.argv[4:])))
