"""Two cores: one thread a worker keeps tests from fighting over them, and makes sums repeat to the bit."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `from parity.shrink import …`

import torch

torch.set_num_threads(1)
