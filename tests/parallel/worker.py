"""One of the processes of tests/parallel/test_equality.py: `worker.py RANK WORLD STORE MODELS OUT JSON_CASES`."""

import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def main(rank, world, store, models, out, cases):
    from parallel import training
    from parallel.grid import Case

    from ftlib.launch import leave_group

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(
        backend, store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    work, report = [(Case(**settings), leg) for settings, leg in cases], []
    wanted = references(work, models, out, rank, world)
    for case, leg in work:
        try:
            if leg is None:
                found = training.train(case, models, training.start(case))
            else:
                found = training.leg(case, models, training.start(case), Path(leg[0]), *leg[1:])
            alone = torch.load(wanted[reference(case, leg)], "cuda" if gpus else "cpu", weights_only=True)
            result = training.compare(found, alone)
        except Exception:
            result = {"error": traceback.format_exc()}
        report.append(result)
        print(rank, case.mesh, "|", case.work, result, flush=True)
        if "error" in result:
            break  # the others may be waiting in a collective
    (out / f"report_{rank}.json").write_text(json.dumps(report))
    leave_group()


def reference(case, leg):
    """What one process does instead: the case, and from and to which step."""
    from parallel import training

    return training.one_process(case), tuple(leg[1:]) if leg else (0, training.STEPS)


def references(work, models, out, rank, world):
    """The numbers of one process in files, each made by one of the processes for all."""
    from parallel import training

    keys = list(dict.fromkeys(reference(case, leg) for case, leg in work))
    files = {key: out / f"alone_{i}.pt" for i, key in enumerate(keys)}
    for case, steps in keys[rank::world]:
        torch.save(training.train(case, models, training.alone(), *steps), files[case, steps])
    dist.barrier()
    return files


if __name__ == "__main__":
    rank, world, store, models, out, cases = sys.argv[1:]
    main(int(rank), int(world), store, Path(models), Path(out), json.loads(cases))
