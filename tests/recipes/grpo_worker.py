"""One of the processes of test_grpo_processes.py: `grpo_worker.py RANK WORLD REPORT CONFIG…`.

Completions of a prompt are the same whoever draws them, so that runs of any number of processes can be compared."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from ftlib import config, plugins
from ftlib.launch import leave_group
from ftlib.rl import scoring
from ftlib.rl.rollouts import Rollouts

torch.set_num_threads(1)
FIGURES = ("loss", "grad_norm", "reward", "entropy", "tokens", "length/mean", "frac_zero_std")


def main(rank, world, report, configs):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    store = dist.FileStore(f"{report}_store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    draw, weigh, learners, found = Rollouts.__call__, scoring.give_weights, [], []

    def by_prompt(self, prompts, n, place, greedy=False):
        samples = []
        for group, prompt in enumerate(prompts):
            own = draw(self, [prompt], n, (*place[:2], prompt.columns["number"], 0), greedy)
            for sample in own:
                sample.group = group
            samples += own
        return samples

    def counted(*args):
        trained, tokens = weigh(*args)
        learners.append(len(trained))
        return trained, tokens

    Rollouts.__call__, scoring.give_weights = by_prompt, counted
    recipe = plugins.load_file(Path(__file__).parents[2] / "recipes/grpo.py")
    for file in configs:
        rows = recipe.main(config.load(recipe.Config, ["--config", file]))
        found += [[row[key] for key in FIGURES] for row in rows if "loss" in row]
    Path(f"{report}_{rank}").write_text(json.dumps({"rows": found, "learners": learners}))
    leave_group()


if __name__ == "__main__":
    rank, world, report, *configs = sys.argv[1:]
    main(int(rank), int(world), report, configs)
