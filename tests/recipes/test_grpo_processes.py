"""recipes/grpo.py on several processes: the losses and gradients of one, however tokens are averaged."""

import functools
import json
from pathlib import Path

import pytest
import rl_toys
import torch
from parallel import spawn
from safetensors.torch import load_file

WAYS = ("token", "seq", "const", "group")
REWARD = '''
def some(completions, completion_ids, number, **columns):
    """Longer is better for the first two prompts; answers to the others earn the same: nothing is learned from them."""
    return [len(ids) / 12 if n < 2 else 1.0 for ids, n in zip(completion_ids, number)]
'''


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """`reports(name, world, settings)`: what each process says of runs one after the other, whose results lie in
    `reports.folder`."""
    folder = tmp_path_factory.mktemp("processes")
    toy = rl_toys.write_toy(folder / "model")
    (folder / "own.py").write_text(REWARD)
    rows = [{"prompt": f"{i}{i}=", "number": i} for i in range(4)]
    file = str(folder / "rows.jsonl")
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(name, world, settings):
        configs = []
        for i, sections in enumerate(settings):
            values = rl_toys.settings(
                toy, "length", folder / f"{name}{i}", seed=3, batch={"micro_rows": 2},
                rollout={"prompts": 4, "group": 4}, data={"sources": [{"path": file}], "eval": [{"path": file}]},
                rewards=[{"fn": f"{folder}/own.py:some"}], **sections,
            )  # fmt: skip
            configs.append(folder / f"{name}{i}.yaml")
            configs[-1].write_text(json.dumps(values))
        (logs := folder / f"{name}_logs").mkdir()
        spawn.processes(Path(__file__).parent / "grpo_worker.py", world, [folder / name, *configs], logs)
        return [json.loads((folder / f"{name}_{rank}").read_text()) for rank in range(world)]

    start.folder = folder
    return start


@pytest.fixture(scope="module")
def run(reports):
    """`run(ways, world, **mesh)`: numbers of the steps of each way of averaging, and how many completions each process
    learned from."""

    def start(ways, world, **mesh):
        name = f"{'_'.join(ways)}_{world}_{mesh.get('dp_shard', 1)}"
        settings = [{"steps": 3, "parallel": mesh, "algorithm": {"aggregation": how}} for how in ways]
        found = reports(name, world, settings)
        return found[0]["rows"], [report["learners"] for report in found]

    return functools.cache(start)


@pytest.mark.parametrize(
    ("ways", "world", "mesh"),
    [
        (("seq", "group"), 2, {"dp_shard": 2}),
        pytest.param(WAYS, 2, {"dp_replicate": 2, "dp_shard": 1}, marks=pytest.mark.slow),
        pytest.param(WAYS, 2, {"dp_shard": 2}, marks=pytest.mark.slow),
        pytest.param(WAYS, 4, {"dp_replicate": 4, "dp_shard": 1}, marks=pytest.mark.slow),
    ],
    ids=["shared", "two copies", "shared, all ways", "four copies"],
)
def test_any_number_of_processes_learns_alike(run, ways, world, mesh):
    """In some steps a process has nothing to learn from. Slow cases: last passed 2026-11-22."""
    (alone, [whole]), (found, learners) = run(ways, 1), run(ways, world, **mesh)
    assert [sum(parts) for parts in zip(*learners, strict=True)] == whole and min(whole) > 0
    assert any(0 in parts for parts in zip(*learners, strict=True))
    assert len(found) == len(alone) == 3 * len(ways) and len({row[1] for row in alone}) > len(ways)
    for one, other in zip(alone, found, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_averages_are_evaluated_and_kept_but_not_drawn_with(reports):
    """Schedule-free learning by processes that share a model and draw with whole copies of it: an evaluation between
    two steps changes nothing, and final/ is that of one process."""
    averaging = {"optim": {"name": "schedule_free", "lr": 3e-3}, "schedule": {"name": "constant"}, "steps": 4}
    often, shard = averaging | {"eval": {"every": 1}}, {"parallel": {"dp_shard": 2}}
    shared, alone = reports("shared", 2, [often | shard, averaging | shard])[0], reports("alone", 1, [often])[0]
    assert shared["rows"][:4] == shared["rows"][4:]
    assert shared["rows"][3] == pytest.approx(alone["rows"][3], rel=1e-4)
    kept = [load_file(reports.folder / name / "final" / "model.safetensors") for name in ("shared0", "alone0")]
    torch.testing.assert_close(*kept, rtol=1e-4, atol=1e-5)
