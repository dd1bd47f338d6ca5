"""Plans where the factors of a constant gate go: along the data flow, into weights before or after the gate.

One factor per channel moves through operations that are linear within each channel (sums, average pooling, zero
padding, interpolation). A nonnegative factor also moves through ReLU and max pooling. Before the gate, the factors go
into the output channels of a norm, convolution, or linear layer (weight and bias). After the gate, they go into the
input channels of convolutions and linear layers, where zero padding stays zero. Whether a module can take them is
tested, not derived from its class: a convolution with weight standardization cannot; a norm with its own ReLU can.
"""

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from senet.nn.carriers import gate_of_output
from senet.surgery.dataflow import PRODUCTS, RESHAPES, Flow, Node
from senet.surgery.find_gates import Gate

Side = Literal["output", "input"]

_LINEAR = frozenset(
    {
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "mean", "sum"),
        *("constant_pad_nd", "reflection_pad2d", "replication_pad2d", "slice", "contiguous", "_to_copy", "detach"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "permute"),
        *("transpose", "native_dropout", "dropout", "div", "mul", "neg"),
    }
)
_POSITIVE = frozenset(
    {
        *("relu", "leaky_relu", "_prelu_kernel", "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d"),
        *("adaptive_max_pool2d", "amax", "max"),
    }
)
_SUMS = frozenset({"add", "sub", "lerp"})
_STEPS = 64  # operations that factors may pass; longer paths run through the whole network
_RELATIVE = 1e-9  # float64: exact except for rounding


class CannotFold(Exception):  # noqa: N818 - a reason, not a failure
    """Why factors cannot be moved, as part of a sentence."""


@dataclass(frozen=True)
class Factor:
    """Scales the output or input channels of a module by ``by``, one float64 factor per channel of that side."""

    path: str
    side: Side
    by: Tensor

    def apply(self, model: nn.Module) -> None:
        """Multiply the weight and bias of the module in ``model``, in place, each in its own dtype."""
        scale_module(model.get_submodule(self.path), self.side, self.by)


@torch.no_grad()
def scale_module(module: nn.Module, side: Side, by: Tensor) -> None:
    """Scale a module's output channels, or the columns of its weight that read its input channels, in place."""
    weight, bias = _weight(module), _own_tensor(module, "bias")
    if side == "input":
        groups = getattr(module, "groups", 1)
        columns = by.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
        _multiply(weight, columns.reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2)))
        return
    _multiply(weight, by.reshape(-1, *(1,) * (weight.ndim - 1)))
    if bias is not None:
        _multiply(bias, by)


def _multiply(tensor: Tensor, by: Tensor) -> None:
    # In float64 on the CPU, so that each weight is rounded only once.
    wide = tensor.detach().cpu().double() * by.cpu()
    tensor.copy_(wide)


def _own_tensor(module: nn.Module, name: str) -> Tensor | None:
    tensor = module._parameters.get(name)
    return tensor if tensor is not None else module._buffers.get(name)


def _weight(module: nn.Module) -> Tensor:
    weight = _own_tensor(module, "weight")
    if weight is None:
        raise CannotFold("it has no weight of its own")
    return weight


class Planner:
    """Finds the factors of each gate in one recorded run of the network."""

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        self.flow = flow
        self.modules = dict(model.named_modules())
        self.owned: dict[str, list[Node]] = {}
        for node in flow.nodes:
            path = node.owner
            while path:
                self.owned.setdefault(path, []).append(node)
                path = path.rpartition(".")[0]
        tensors = (t for m in self.modules.values() for t in (*m._parameters.values(), *m._buffers.values()))
        self.shared = Counter(id(tensor) for tensor in tensors if tensor is not None)

    def ends(self, gate: Gate) -> tuple[Node, Node]:
        """The input and the output of a gate; CannotFold unless there is exactly one of each."""
        inside = self.owned.get(gate.name, [])
        if self.flow.calls[gate.name] != 1 or not inside:
            raise CannotFold(f"it is called {self.flow.calls[gate.name]} times in a forward pass")
        entry = self._entry(gate.name)
        last = [node for node in inside if gate.name in node.returned_by]
        leaks = [node for node in inside if node not in last and any(user not in inside for user in node.users)]
        if entry is None or len(last) != 1 or leaks:
            raise CannotFold("its module does more than rescale one feature map")
        if len(entry.shape) < 2 or entry.shape[1] != gate.channels or entry.shape != last[0].shape:
            raise CannotFold(f"it rescales {entry.shape}, where {gate.channels} channels are expected")
        return entry, last[0]

    def plan(self, gate: Gate, by: Tensor) -> list[Factor]:
        """Place the factors ``by`` (C,) of a gate in the weights before it or, failing that, in those after it.

        Raises:
            CannotFold: neither is possible; the message says why.
        """
        entry, last = self.ends(gate)
        try:
            return self._backward(entry, 1, by, self.owned[gate.name], 0)
        except CannotFold as problem:
            before = problem
        try:
            return self._forward(last, 1, by, 0)
        except CannotFold as behind:
            raise CannotFold(f"before it, {before}; after it, {behind}") from None

    def _backward(self, node: Node, axis: int, by: Tensor, readers: list[Node], steps: int) -> list[Factor]:
        """Scale the output of ``node``, which only ``readers`` may read."""
        if any(user not in readers for user in node.users):
            raise CannotFold("the feature map is also read elsewhere")
        for path in self._makers(node):
            if self._scales(path, "output", by):
                return [Factor(path, "output", by)]
        if steps > _STEPS or not node.inputs:
            raise CannotFold("no weight was found")
        if node.op == "cat" and all(len(each.shape) == len(node.shape) for each in node.inputs):
            sizes = [each.shape[axis] for each in node.inputs]
            if sum(sizes) == len(by):
                parts = zip(node.inputs, by.split(sizes), strict=True)
                return [f for each, part in parts for f in self._backward(each, axis, part, [node], steps + 1)]
        passes = node.op in _SUMS and len(node.inputs) > 1
        if not passes and not self._lets_through(node, by):
            raise CannotFold(f"it follows {_name(node)}, which blocks the factors")
        for each in node.inputs:
            if each.shape[axis : axis + 1] != (len(by),) or len(each.shape) != len(node.shape):
                raise CannotFold(f"it follows {_name(node)}, which mixes channels")
        return [factor for each in node.inputs for factor in self._backward(each, axis, by, [node], steps + 1)]

    def _makers(self, node: Node) -> list[str]:
        """The modules that return the feature map; a module with an attached gate returns it to the gate."""
        holder = self.modules.get(node.owner)
        attached = [node.owner] if holder is not None and gate_of_output(holder) is not None else []
        return [*attached, *node.returned_by]

    def _forward(self, node: Node, axis: int, by: Tensor, steps: int) -> list[Factor]:
        """Move the factors into every operation that reads ``node``."""
        if not node.users:
            raise CannotFold("the feature map is the network's output")
        return [factor for user in node.users for factor in self._reader(node, user, axis, by, steps)]

    def _reader(self, node: Node, user: Node, axis: int, by: Tensor, steps: int) -> list[Factor]:
        if steps > _STEPS:
            raise CannotFold("no weight was found")
        if user.op == "convolution" or user.op in PRODUCTS:
            if user.inputs == (node,) and self._scales(user.owner, "input", by):
                return [Factor(user.owner, "input", by)]
            raise CannotFold(f"{_name(user)} has no weight that takes the factors")
        if user.op == "cat":
            ones = [torch.ones(each.shape[axis], dtype=torch.float64) for each in user.inputs]
            parts = [by if each is node else one for each, one in zip(user.inputs, ones, strict=True)]
            if user.shape[axis] == sum(map(len, parts)):
                return self._forward(user, axis, torch.cat(parts), steps + 1)
        if user.op in _SUMS and len(user.inputs) > 1:
            raise CannotFold("the feature map is added to another")
        moved = _moved(node, user, axis, by) if self._lets_through(user, by) else None
        if moved is None:
            raise CannotFold(f"it is read by {_name(user)}, which blocks the factors")
        return self._forward(user, *moved, steps + 1)

    def _lets_through(self, node: Node, by: Tensor) -> bool:
        if len(node.inputs) != 1:
            return False
        return node.op in _LINEAR | RESHAPES or (node.op in _POSITIVE and bool((by >= 0).all()))

    def _entry(self, path: str) -> Node | None:
        """The only tensor that the operations inside a module read from outside; None if there is not exactly one."""
        inside = self.owned.get(path, [])
        known = set(map(id, inside))
        outside = {id(each): each for node in inside for each in node.inputs if id(each) not in known}
        return next(iter(outside.values())) if len(outside) == 1 else None

    def _scales(self, path: str, side: Side, by: Tensor) -> bool:
        """Whether the module's weights can take the factors: one call, no shared weights, and an exact result."""
        module, entry = self.modules.get(path), self._entry(path)
        if module is None or entry is None or self.flow.calls[path] != 1:
            return False
        weight = _own_tensor(module, "weight")
        if weight is None or weight.numel() == 0 or not weight.is_floating_point():
            return False
        tensors = (weight, _own_tensor(module, "bias"))
        if any(tensor is not None and self.shared[id(tensor)] > 1 for tensor in tensors):
            return False
        return _is_exact(module, side, by, entry.shape)


def _is_exact(module: nn.Module, side: Side, by: Tensor, shape: tuple[int, ...]) -> bool:
    """Test the scaling in float64, on random input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    twin = copy.deepcopy(module).cpu().double().eval()
    axes = [axis for axis, size in enumerate(shape) if axis > 0 and size == len(by)]
    axis = 1 if 1 in axes and len(shape) != 2 else (axes or [0])[-1]
    try:
        with torch.no_grad():
            # forward, not a call: an attached gate is a hook
            wanted = twin.forward(_along(x, by, axis)) if side == "input" else twin.forward(x)
            scale_module(twin, side, by)
            found = twin.forward(x)
            if side == "output":
                place = 1 if wanted.shape[1] == len(by) else wanted.ndim - 1
                wanted = _along(wanted, by, place)
    except (RuntimeError, TypeError, CannotFold):
        return False
    return torch.allclose(found, wanted, rtol=_RELATIVE, atol=_RELATIVE * float(wanted.abs().max()))


def _along(x: Tensor, by: Tensor, axis: int) -> Tensor:
    return x * by.reshape(-1, *(1,) * (x.ndim - axis - 1))


def _moved(node: Node, user: Node, axis: int, by: Tensor) -> tuple[int, Tensor] | None:
    """The channel axis and the factors in the output of ``user``, which reads ``node``; None if channels mix."""
    shape, before = user.shape, node.shape
    if user.op in ("permute", "transpose"):
        return (user.channel, by) if user.channel is not None and node.channel == axis else None
    if len(shape) == len(before) and shape[axis] == len(by):
        return axis, by
    if axis == 1 and len(shape) == 2 and shape[1] == len(by):
        return 1, by  # pooled, or flattened from a single pixel
    if axis == 1 and len(shape) == 2 and user.op in RESHAPES and shape[1] == math.prod(before[1:]):
        return 1, by.repeat_interleave(shape[1] // len(by))  # flattened: the pixels of a channel are adjacent
    if user.channel is not None and node.channel == axis and shape[user.channel] == len(by):
        return user.channel, by
    return None


def _name(node: Node) -> str:
    where = f" in {node.owner}" if node.owner else ""
    return node.op.strip("_").removesuffix("_with_indices").removesuffix("_kernel") + where
