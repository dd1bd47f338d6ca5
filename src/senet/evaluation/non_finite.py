"""Where numbers stop being numbers: the first layer of a network whose output is NaN or infinite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def first_not_finite(network: nn.Module, x: Tensor) -> str:
    """In words: which value is the first to be NaN or infinite when ``network`` is called with ``x``.

    The network is called once more, with a hook on every module; the innermost module is named.
    """
    if not x.isfinite().all():
        return "the normalized images hold NaN or infinity; look at mean and std of its transform"
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
    layer = f"of {found[0]}, before that of all other layers, " if found else ""
    return f"the output {layer}holds NaN or infinity; take another checkpoint"
