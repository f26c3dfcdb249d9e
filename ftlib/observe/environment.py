"""What a result was made with: versions and hardware, nothing about the user (no variables, no host names)."""

import os
import platform
from importlib import metadata
from typing import Any

import torch

import ftlib

PACKAGES = ("triton", "torchao", "safetensors", "tokenizers", "datasets", "numpy")


def environment() -> dict[str, Any]:
    """Versions of Python, ftlib, torch and packages (null: not installed), CPU count and GPU names. JSON-able."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "ftlib": ftlib.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "cpus": os.cpu_count(),
        "gpus": gpus,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
