"""Consecutive convolutions in one library call, with a memory plan that is made once."""

import ctypes
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from senet.ops.border import UnsuitedMapError, is_map
from senet.ops.conv.native import OwnConv2d
from senet.ops.csrc import arguments
from senet.ops.csrc.calls import fail, operation
from senet.ops.layout import is_last

_LINE = 64  # bytes in a cache line; feature maps are aligned to it


@dataclass(frozen=True)
class Step:
    """One convolution: y = δ(gate·(convolution(x) + bias) + shortcut). Keys name the feature maps.

    Attributes:
        own: the convolution.
        x, shortcut, y: keys of feature maps; the shortcut may be None.
        shape: shape of y.
        relu, gated: see ``OwnConv2d``.
        overwrites: whether y is written to the memory of the shortcut.
    """

    own: OwnConv2d
    x: Hashable
    shortcut: Hashable | None
    y: Hashable
    shape: torch.Size
    relu: bool
    gated: bool
    overwrites: bool


class Run(nn.Module):
    """A sequence of convolutions of float32 feature maps in channels_last.

    Args:
        steps: the convolutions, in order.
        shapes: key → shape of each feature map that a step reads but no step computes.
        wanted: keys of the results.

    Attributes:
        inputs, outputs: keys of the arguments and of the results of ``forward``.
        workspace: memory of all other feature maps, in bytes.
    """

    def __init__(self, steps: Sequence[Step], shapes: dict[Hashable, torch.Size], wanted: Sequence[Hashable]) -> None:
        super().__init__()
        self.inputs, self.outputs = list(shapes), list(wanted)
        self._shapes, self._list = list(shapes.values()), list(steps)
        homes: dict[Hashable, Hashable] = {key: key for key in self.inputs}  # key → key of the map whose memory it uses
        for step in steps:
            homes[step.y] = homes[step.shortcut] if step.overwrites else step.y
        kept = dict.fromkeys(homes[key] for key in wanted)
        sizes = {step.y: step.shape for step in steps}
        self._new = [key for key in kept if key in sizes]  # homes that are allocated at each call
        known = shapes | sizes
        self._new_shapes = [sizes[key] for key in self._new]
        inside = {key: sizes[key] for key in dict.fromkeys(homes.values()) if key in sizes and key not in kept}
        offsets, self.workspace = _placed(inside, steps, homes)
        bases = {key: 1 + index for index, key in enumerate([*self.inputs, *self._new])}
        self._results = [bases[homes[key]] for key in wanted]
        threads = torch.get_num_threads()
        self._calls = [step.own.call_for(known[step.x], threads)[0] for step in steps]

        def place(key: Hashable) -> tuple[int, int]:
            return bases.get(homes[key], 0), offsets.get(homes[key], 0)

        self._steps = (arguments.Step * len(steps))()
        for told, step, call in zip(self._steps, steps, self._calls, strict=True):
            told.convolution, told.gate = ctypes.addressof(call), step.own.gate_address(step.gated)
            told.relu = step.relu
            (told.x, told.x_at), (told.y, told.y_at) = place(step.x), place(step.y)
            told.id, told.id_at = (-1, 0) if step.shortcut is None else place(step.shortcut)
        self._free: list[Tensor] = []  # workspaces that no thread is using
        self._run = operation("run")
        self._pointers = ctypes.c_void_p * (1 + len(bases))

    def forward(self, *inputs: Tensor) -> Any:
        """The results: one feature map, or a tuple of several."""
        for x, shape in zip(inputs, self._shapes, strict=True):
            if x.shape != shape or not is_map(x, shape[1], torch.float32) or not is_last(x):
                return self.one_by_one(*inputs)
        new = [torch.empty(shape, device="cpu", memory_format=torch.channels_last) for shape in self._new_shapes]
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = torch.empty(self.workspace + _LINE, dtype=torch.uint8, device="cpu")
        first = -(-workspace.data_ptr() // _LINE) * _LINE
        bases = self._pointers(first, *(t.data_ptr() for t in inputs), *(t.data_ptr() for t in new))
        given = arguments.Run.pack(ctypes.addressof(self._steps), len(self._steps), ctypes.addressof(bases))
        error = self._run(given)
        if error:
            fail(error)
        self._free.append(workspace)
        maps = (None, *inputs, *new)
        results = [maps[index] for index in self._results]
        return results[0] if len(results) == 1 else tuple(results)

    def one_by_one(self, *inputs: Tensor) -> Any:
        """The same for feature maps of any size, with newly allocated tensors."""
        last = torch.channels_last
        maps: dict[Hashable | None, Tensor | None] = {None: None}
        for key, given, (_, channels, *_) in zip(self.inputs, inputs, self._shapes, strict=True):
            if given.ndim != 4 or not is_map(given, channels, torch.float32):
                what = f"{given.dtype} feature map of shape {tuple(given.shape)} on {given.device}"
                raise UnsuitedMapError(f"these convolutions do not support a {what}")
            maps[key] = given.contiguous(memory_format=last)
        for step in self._list:
            x, shortcut = maps[step.x], maps[step.shortcut]
            assert x is not None
            maps[step.y] = step.own(x, shortcut, step.relu, shortcut if step.overwrites else None, step.gated)
        results = [maps[key] for key in self.outputs]
        return results[0] if len(results) == 1 else tuple(results)


def _placed(
    shapes: dict[Hashable, torch.Size], steps: Sequence[Step], homes: dict[Hashable, Hashable]
) -> tuple[dict[Hashable, int], int]:
    """Byte offsets in the workspace such that feature maps that are live together do not overlap, and its size."""
    lives: dict[Hashable, tuple[int, int]] = {}
    for index, step in enumerate(steps):
        for key in (step.x, step.y, step.shortcut):
            if key is not None and homes[key] in shapes:
                first, _ = lives.get(homes[key], (index, index))
                lives[homes[key]] = first, index
    bytes_of = {key: -(-4 * shape.numel() // _LINE) * _LINE for key, shape in shapes.items()}
    offsets: dict[Hashable, int] = {}
    for key in sorted(shapes, key=lambda key: -bytes_of[key]):
        first, end = lives[key]
        others = [other for other in offsets if lives[other][0] <= end and first <= lives[other][1]]
        offset = 0
        for other in sorted(others, key=lambda other: offsets[other]):
            if offset + bytes_of[key] <= offsets[other]:
                break
            offset = max(offset, offsets[other] + bytes_of[other])
        offsets[key] = offset
    return offsets, max((offsets[key] + bytes_of[key] for key in shapes), default=0)
