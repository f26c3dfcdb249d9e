"""The table of completions that a run of grpo prints."""

from types import SimpleNamespace

import torch

from ftlib.rl import pages


def completion(**more):
    prompt = SimpleNamespace(messages=[{"role": "user", "content": "2+2?"}])
    terms = {"reward": 0.5, "length": 3, "finish": "stop", "prompt": prompt, "advantages": None}
    return SimpleNamespace(messages=[{"role": "assistant", "content": "4"}], **(terms | more))


def test_what_nothing_is_learned_from_has_no_advantage():
    still, moved = completion(), completion(advantages=torch.tensor([-1.0, 0.5]))
    _, *rows = pages.lines([still, moved, still], 2)
    assert [row.split()[:4] for row in rows] == [["0.5", "-", "3", "stop"], ["0.5", "-0.25", "3", "stop"]]
