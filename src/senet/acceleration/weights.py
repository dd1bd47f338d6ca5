"""Notices when the weights change that folded and packed forms were made from.

PyTorch counts in-place writes to a tensor in its version, which is compared at each call, together with the tensor's
identity and address. Some writes are not counted:

- Steps of fused optimizers: they are counted here, by a hook on all optimizers.
- Running statistics that a batch norm updates: graphs that do so are counted here, and the statistics are compared
  afterwards. Their versions must stay: the backward pass checks them.
- Writes through ``tensor.data`` and by other libraries: on the CPU, one element of each weight is compared, which
  notices whatever changes a whole tensor, but not a write to a few elements.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from senet.acceleration.operations import operation

_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.cache
def count_optimizer_steps() -> None:
    """Let all optimizers count their steps in the versions of the parameters, from now on, as most do by themselves."""
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    increment_version(
        [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None and not p.is_inference()]
    )


class _Updates:
    """How often graphs of this process that update running statistics have run."""

    count = 0


def counting_updates(run: Callable[..., Any], graph: fx.Graph) -> Callable[..., Any]:
    """``run``, which runs ``graph``; if that updates running statistics, it is counted."""
    norms = [found for node in graph.nodes if (found := operation(node)) is not None and found.kind == "batch_norm"]
    if not any(found.training is not False and found.running_mean is not None for found in norms):
        return run

    def counted(*given: Any) -> Any:
        _Updates.count += 1
        return run(*given)

    return counted


def why_not(weights: Sequence[Tensor]) -> str | None:
    """Why changes of these weights could not be noticed, or None."""
    if any(weight.is_inference() for weight in weights):
        return "its weights were created in inference mode, where PyTorch does not count changes"
    if any(weight.device.type == "cpu" and weight.is_shared() for weight in weights):
        return "its weights are in shared memory, where another process may change them"
    return None


class Followed:
    """Parameters and buffers as they were when a form was made from them."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = list(weights)
        self._addresses = [weight.data_ptr() for weight in weights]
        self._versions = [weight._version for weight in weights]
        self._elements = [element for weight in weights for element in _element(weight)]
        self._values = [element.item() for element in self._elements]
        self._statistics = [(w, w.clone()) for w in weights if not isinstance(w, nn.Parameter)]
        self._updates = _Updates.count

    def are(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the same weights, unchanged."""
        for given, known in zip(weights, self._weights, strict=True):
            if given is not known:
                return False
        if [weight._version for weight in weights] != self._versions:
            return False
        if [weight.data_ptr() for weight in weights] != self._addresses:
            return False
        if self._updates != _Updates.count:
            self._updates = _Updates.count
            if not all(torch.equal(now, then) for now, then in self._statistics):
                return False
        return [element.item() for element in self._elements] == self._values


def _element(weight: Tensor) -> list[Any]:
    """The middle element of a tensor on the CPU, as an integer that NumPy reads from its memory."""
    if not weight.is_cpu or not weight.numel() or weight.layout is not torch.strided:
        return []
    middle = sum(stride * (size // 2) for stride, size in zip(weight.stride(), weight.shape, strict=True))
    place = weight.detach().as_strided((), (), weight.storage_offset() + middle)
    return [place.view(_AS_INTEGER[weight.element_size()]).numpy()]
