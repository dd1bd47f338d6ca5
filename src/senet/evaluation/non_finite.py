"""Finds the first layer of a network whose output is NaN or infinite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def first_not_finite(network: nn.Module, x: Tensor) -> str:
    """Describe the first value that is NaN or infinite when ``network`` is called with ``x``.

    Calls the network again with a hook on every module, and names the innermost module.
    """
    if not x.isfinite().all():
        return "the normalized images contain NaN or infinity; check mean and std of its transform"
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"{name!r} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in network.named_modules() if name]
    try:
        with torch.inference_mode():
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    layer = f"of {found[0]}, the first such layer, " if found else ""
    return f"the output {layer}contains NaN or infinity; use another checkpoint"
