"""The device that a network runs on."""

import torch

from senet.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device with that name; "auto" selects the best available one."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if name not in available:
        raise InputError(f"no device {name!r}; choose auto, cpu, cuda or mps")
    if not available[name]:
        raise InputError(f"no {name} device is available here; use --device cpu or auto")
    return torch.device(name)
