"""A description of this machine: what a measured time depends on."""

import platform
from pathlib import Path
from typing import Any

import torch

from senet._version import __version__


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if "model name" in line:
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Processor, threads, GPU (None without one), and the versions that affect speed."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "senet": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
