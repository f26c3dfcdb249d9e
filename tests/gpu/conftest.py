"""What one test leaves in a process must not reach the next: the order of files and the number of workers vary."""

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    """A function keeps what was compiled of it: eight cases of one function are torch's limit, past which whole graphs
    are refused, and memory settings that only the compiler reads would meet code of the setting before."""
    torch.compiler.reset()


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left():
    """What trains as a recipe does joins a group and stays in it; the next file may want one of its own."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
