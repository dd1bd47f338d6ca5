"""Notices when the weights change that folded and packed forms were made from.

PyTorch counts in-place writes to a tensor in its version, which is compared at each call, together with the tensor's
identity and address. Two kinds of writes are not counted. Fused optimizers: their steps are counted here, by a hook on
all optimizers. Writes through ``tensor.data``: a few elements of each weight are compared, too, which notices whatever
changes a whole tensor, but not a write to a few elements.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook


@functools.cache
def count_optimizer_steps() -> None:
    """Let all optimizers count their steps in the versions of the parameters, from now on, as most do by themselves."""
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    increment_version(
        [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None and not p.is_inference()]
    )


def why_not(weights: Sequence[Tensor]) -> str | None:
    """Why changes of these weights could not be noticed, or None."""
    if any(weight.is_inference() for weight in weights):
        return "its weights were created in inference mode, where PyTorch does not count changes"
    if any(weight.device.type == "cpu" and weight.is_shared() for weight in weights):
        return "its weights are in shared memory, where another process may change them"
    return None


class Followed:
    """Weights as they were when a form was made from them."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = list(weights)
        self._addresses = [weight.data_ptr() for weight in weights]
        self._versions = [weight._version for weight in weights]

    def are(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the same weights, unchanged."""
        for given, known in zip(weights, self._weights, strict=True):
            if given is not known:
                return False
        if [weight._version for weight in weights] != self._versions:
            return False
        return [weight.data_ptr() for weight in weights] == self._addresses
