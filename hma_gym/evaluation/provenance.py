"""Where a figure comes from: commit, versions, hardware, time. Every benchmark writes this beside its results."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import hma_gym

PACKAGES = ("torch", "numpy", "gymnasium", "h5py", "safetensors", "mujoco", "robosuite")


def _commit() -> str:
    """The commit of the source tree, ``+changes`` if files differ from it; "unknown" outside a git checkout."""
    folder = Path(hma_gym.__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(("git", "-C", str(folder), *arguments), capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no") else commit


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance(device: torch.device) -> dict[str, Any]:
    """Plain JSON facts about this run.

    Args:
        device: where the model runs.
    """
    versions = {package: _version(package) for package in PACKAGES}
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hma_gym": hma_gym.__version__,
        "python": platform.python_version(),
        "packages": {package: version for package, version in versions.items() if version is not None},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
