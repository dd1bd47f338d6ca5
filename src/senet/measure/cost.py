"""What a network costs: parameters, and multiply-adds counted by PyTorch's own counter."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from senet.models.registry import create_model, model_spec


@dataclass(frozen=True)
class Cost:
    """The cost of one network.

    Attributes:
        params: trainable values.
        running_stats: batch norm's running means and variances; the paper's printed parameter counts include them.
        mult_adds: multiply-adds of convolutions and fully connected layers for one image (the paper's "FLOPs").
    """

    params: int
    running_stats: int
    mult_adds: int


def module_cost(model: nn.Module, input_size: int, in_chans: int = 3) -> Cost:
    """The cost of ``model`` for one image of ``in_chans`` × ``input_size`` × ``input_size``; changes nothing in it."""
    reference = next(model.parameters())
    x = torch.zeros(1, in_chans, input_size, input_size, device=reference.device, dtype=reference.dtype)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
    finally:
        model.train(training)
    running = sum(b.numel() for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var")))
    # The counter counts a multiplication and an addition as two operations.
    return Cost(sum(p.numel() for p in model.parameters()), running, counter.get_total_flops() // 2)


def model_cost(
    name: str, num_classes: int = 1000, in_chans: int = 3, input_size: int | None = None, **kwargs: Any
) -> Cost:
    """The cost of a registered network, without allocating it. ``input_size`` None is the network's own."""
    with torch.device("meta"):
        model = create_model(name, num_classes, in_chans, **kwargs)
        return module_cost(model, input_size or model_spec(name).input_size, in_chans)
