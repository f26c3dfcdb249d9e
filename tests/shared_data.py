"""Real files beside the project, where they are there. They are never part of it; our own fixtures carry CI."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "shared" / "data"


def shared(path: str) -> Path:
    """A file or folder of the shared data; the test skips, saying so, where it is missing."""
    found = ROOT / path
    if not found.exists():
        pytest.skip(f"{path} of the shared data is not on this machine")
    return found
