"""Show versions, devices and memory, what does not fit together, and what to install. Paste it into a bug report.

    tune env

Exit code 0 when all fits, 1 when something is missing or does not fit.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import ftlib
from ftlib.cli import assets
from ftlib.cli.arguments import Parser

# The newest CUDA that a driver says it can run -> the index with torch's wheels; newest first.
WHEELS = (((13, 0), "cu130"), ((12, 8), "cu128"), ((12, 6), "cu126"))
INDEX = "https://download.pytorch.org/whl/"


def main(argv: Sequence[str]) -> int:
    """`tune env`"""
    Parser("env", __doc__).parse(argv)
    driver = driver_cuda()
    problems = [*packages(), *torch_problems(driver)]
    print("\n".join(facts(driver)))
    print("\nto do:" if problems else "\nall fits together")
    for what, fix in problems:
        print(f"  {what}\n    {fix}")
    return 1 if problems else 0


def facts(driver: tuple[int, int] | None) -> list[str]:
    """Versions and hardware, a line each; nothing about the user."""
    lines = [f"ftlib {ftlib.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"]
    found = {name: _version(name) for name in _names()}
    lines += [f"  {name:<16} {version or 'not installed'}" for name, version in found.items()]
    shown = ".".join(map(str, driver)) if driver else "no NVIDIA driver"
    lines.append(f"CPUs: {os.cpu_count()}; driver's CUDA: {shown}")
    if found.get("torch"):
        import torch

        from ftlib import preflight
        from ftlib.kernels.capability import bf16_note, without_bf16
        from ftlib.models.remote import size

        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            lines.append(f"GPU {i}: {gpu.name}, {size(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}")
            if old := without_bf16(i):
                lines.append(f"  {bf16_note(old)}")
        where, total, _ = preflight.available()
        lines.append(f"memory of {where}: {size(total)}; torch is built for {torch.version.cuda or 'the CPU'}")
        lines.append(f"room here: {size(shutil.disk_usage(Path.cwd()).free)}")
    return lines


def packages() -> list[tuple[str, str]]:
    """Declared packages that are missing or of another version than is supported, each with the line that mends it."""
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, requirements()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            found.append((f"{requirement.name} is not installed", f"pip install '{requirement}'"))
        elif not requirement.specifier.contains(version, prereleases=True):
            what = f"{requirement.name} {version} is not among the supported versions, {requirement.specifier}"
            found.append((what, f"pip install '{requirement.name}{requirement.specifier}'"))
    return found


def torch_problems(driver: tuple[int, int] | None) -> list[tuple[str, str]]:
    """Whether torch can use the GPU that the driver sees, with the install line for this driver."""
    if driver is None or _version("torch") is None:
        return []
    import torch

    if torch.cuda.is_available():
        return []
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    shown = ".".join(map(str, driver))
    line = install_line(driver)
    if line is None:
        return [(f"the NVIDIA driver runs CUDA {shown} at most", "update the driver: torch needs 12.6 or newer")]
    return [(f"torch {torch.__version__} is {built}, the driver runs CUDA {shown}: the GPU is not used", line)]


def install_line(driver: tuple[int, int]) -> str | None:
    """How to install torch for a driver that runs at most this CUDA; None for one that is too old."""
    wheel = next((name for version, name in WHEELS if version <= driver), None)
    return f"pip install --force-reinstall torch --index-url {INDEX}{wheel}" if wheel else None


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA the NVIDIA driver runs, as nvidia-smi has it; None without a driver."""
    try:
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else None


def requirements() -> list[str]:
    """What ftlib declares: from its installed metadata, or from pyproject.toml in a source tree."""
    root = assets.source_root()
    if root is None:
        return metadata.requires("ftlib") or []
    listed = re.search(r"^dependencies = \[(.*?)^\]", (root / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(r'"([^"]+)"', listed[1])


def _names() -> list[str]:
    found = [re.match(r"[\w.-]+", text).group() for text in requirements() if "extra ==" not in text]
    return [*found, "flash-attn-4", "vllm"]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
