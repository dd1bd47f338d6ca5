"""Activation memory of one image, summed over storages. On the ``meta`` device, nothing is allocated.

The count covers the network as PyTorch runs it eagerly, with the reference form of SE. It is a property of the
network, not of a machine. The fast forms keep less; ``senet bench`` measures them.
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
    """Bytes of feature maps for one image, without parameters and buffers. They scale with the batch size.

    Attributes:
        saved: bytes of distinct storages that autograd keeps for the backward pass, by the qualified name of the module
            whose forward pass first keeps them; ``""`` is the whole network. Feature maps and gates count. The batch
            statistics of batch norm and the masks of dropout do not.
        peak: the most bytes alive at one time during inference, including the image.
    """

    saved: dict[str, int]
    peak: int


def activation_memory(model: nn.Module, input_size: int, in_chans: int = 3) -> Memory:
    """Count the feature maps of ``model`` for one image (``in_chans``, ``input_size``, ``input_size``)."""
    model = plain_network(model)
    with evaluating(model):
        return Memory(_saved(model, input_size, in_chans), _peak(model, input_size, in_chans))


@dataclass(frozen=True)
class SavedMap:
    """A storage that autograd keeps: its bytes, the number of axes of the tensor, and the innermost running module."""

    size: int
    axes: int
    module: str


@contextmanager
def saved_storages(model: nn.Module, running: Sequence[str] = ("",)) -> Iterator[dict[int, SavedMap]]:
    """Collect the distinct storages that autograd keeps while the context is open.

    Parameters and buffers of ``model`` are excluded. Storages are identified by address, so the graph must stay alive
    until the context closes. ``running`` is the call stack from ``running_modules``.
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
        if kept.axes > 1:  # else one value per channel: batch statistics, which only some devices keep
            for name in lineage(kept.module):
                by_module[name] += kept.size
    del output  # frees the graph
    return dict(by_module)


def _peak(model: nn.Module, input_size: int, in_chans: int) -> int:
    x = one_image(model, input_size, in_chans)
    with torch.no_grad(), running_modules(model), _LiveMaps() as live:
        live.add(x)
        model(x)
    return live.peak


class _LiveMaps(TorchDispatchMode):
    """Tracks the total size of live storages that operations create."""

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
