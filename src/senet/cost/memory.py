"""Activation memory of one image, counted storage by storage; on the ``meta`` device nothing is allocated.

What is counted is the network operation by operation, as PyTorch runs it eagerly with the reference form of SE: a
property of the network, not of a machine. The fast forms keep less; ``senet bench`` measures those.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from senet.cost.count import lineage, one_image, running_modules
from senet.nn.modes import evaluating
from senet.surgery.find_gates import plain_network


@dataclass(frozen=True)
class Memory:
    """Bytes of maps for one image, parameters and buffers excluded; they grow with the images in proportion.

    Attributes:
        saved: distinct storages that autograd keeps for a backward pass, by the qualified name of the module in whose
            forward pass they are first kept; ``""`` is the whole network. Maps and gates count; batch norm's
            statistics of a training batch and dropout's masks do not.
        peak: the most that is alive at one time in an inference pass, the image included.
    """

    saved: dict[str, int]
    peak: int


def activation_memory(model: nn.Module, input_size: int, in_chans: int = 3) -> Memory:
    """Count the maps of ``model`` for one image of ``in_chans`` × ``input_size`` × ``input_size``; changes nothing."""
    model = plain_network(model)
    with evaluating(model):
        return Memory(_saved(model, input_size, in_chans), _peak(model, input_size, in_chans))


@dataclass(frozen=True)
class SavedMap:
    """A storage that autograd keeps: its bytes, the axes of the tensor, the innermost module that was running."""

    size: int
    axes: int
    module: str


@contextmanager
def saved_storages(model: nn.Module, running: Sequence[str] = ("",)) -> Iterator[dict[int, SavedMap]]:
    """The distinct storages that autograd keeps of what is computed while this is open; filled as it goes.

    Parameters and buffers of ``model`` are left out. The graph must live until the last one is in: storages are told
    apart by their addresses. ``running`` are the modules that are running, see ``running_modules``.
    """
    own = {t.untyped_storage()._cdata for group in (model.parameters(), model.buffers()) for t in group}
    found: dict[int, SavedMap] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in found:
            found[storage._cdata] = SavedMap(storage.nbytes(), tensor.ndim, running[-1])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _saved(model: nn.Module, input_size: int, in_chans: int) -> dict[str, int]:
    with torch.inference_mode(mode=False), torch.enable_grad():
        x = one_image(model, input_size, in_chans)
        with running_modules(model) as running, saved_storages(model, running) as found:
            output = model(x)
    by_module: Counter[str] = Counter({"": 0})
    for kept in found.values():
        if kept.axes > 1:  # else a value a channel: batch norm's statistics, which only some devices keep here
            for name in lineage(kept.module):
                by_module[name] += kept.size
    del output  # with it goes the graph
    return dict(by_module)


def _peak(model: nn.Module, input_size: int, in_chans: int) -> int:
    x = one_image(model, input_size, in_chans)
    with torch.no_grad(), running_modules(model), _LiveMaps() as live:
        live.add(x)
        model(x)
    return live.peak


class _LiveMaps(TorchDispatchMode):
    """Adds up the storages that operations make while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._now = 0
        self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.ndim > 1 and storage not in self._known:
            self._known.add(storage)
            weakref.finalize(storage, self._drop, storage.nbytes()).atexit = False
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)

    def _drop(self, size: int) -> None:
        self._now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in arguments:
                self.add(tensor)
        return out
