"""Two cores: one thread a worker keeps tests from fighting over them, and makes sums repeat to the bit."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `from parity.shrink import …`

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def process_group():
    """A group of this process alone, left as it was found."""
    from faults.tiny_training import one_process  # imports the library

    started = not dist.is_initialized()
    one_process()
    yield
    if started:
        dist.destroy_process_group()
