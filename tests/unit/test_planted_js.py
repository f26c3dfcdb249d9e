"""Jensen-Shannon distillation where both models give a token no chance that float32 can hold."""

import pytest
import torch

from ftlib.losses.distillation import Teacher, distillation_loss
from ftlib.sections import Distill


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_tokens_that_nobody_expects_are_no_nan(beta):
    """exp(-120) is 0 in float32, and log 0 times 0 no number; low temperatures make such logits of usual ones."""
    cfg = Distill(teacher="t", divergence="js", beta=beta, temperature=0.25)
    theirs, mine = torch.tensor([[10.0, 0.0, -30.0]]), torch.tensor([[9.0, 1.0, -28.0]])
    found = {}
    for dtype in (torch.float64, torch.float32):
        hidden, head = mine.to(dtype).requires_grad_(), torch.eye(3, dtype=dtype)
        loss = distillation_loss(hidden, head, Teacher(theirs.to(dtype), head), torch.tensor([0]), cfg)
        loss.backward()
        found[dtype] = torch.cat((loss.detach()[None], hidden.grad[0])).double()
    torch.testing.assert_close(found[torch.float32], found[torch.float64], rtol=1e-3, atol=1e-9)
