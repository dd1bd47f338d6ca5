"""The data flow of one run of a network: the operation, the inputs, and the module of each feature map ("map").

The run is recorded, not traced: torch.fx and torch.export fail on data-dependent control flow (detectors) and on
unsupported Python, but any network runs on an example. The recorder sees the ATen operations and identifies tensors
by object identity (``TorchDispatchMode``). It also notes which tensors each module takes and returns. Each node of the
graph is therefore known by its operation, and by the module at which its output can be changed.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from senet.ops.dispatch import use_backend

RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "clone", "t", "alias"})
PRODUCTS = frozenset({"addmm", "mm", "bmm", "matmul", "linear", "baddbmm"})

NORMS = frozenset(
    {
        *("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit_no_training"),
        *("_native_batch_norm_legit", "_batch_norm_with_update", "native_group_norm", "native_layer_norm"),
    }
)


@dataclass(eq=False)
class Node:
    """A tensor that depends on the network's input, and the operation that computed it.

    Attributes:
        op: the name of the ATen operation, without the underscore of in-place variants; ``"input"`` for the input.
        inputs: the nodes it was computed from, without parameters and constants.
        shape: the shape of the tensor.
        channel: the channel axis, propagated from the convolutions; None if unknown.
        kernel: the longest side of a convolution's kernel; 0 for other operations.
        groups: the number of groups of a convolution.
        upsamples: whether it is a transposed convolution or an interpolation.
        owner: the path of the module whose ``forward`` ran the operation.
        returned_by: the modules that computed and returned it, innermost first.
        passed_by: the modules that took it and returned it unchanged (identities; dropout in evaluation).
        taken_by: the modules that took it as their first positional argument.
    """

    index: int
    op: str
    inputs: tuple["Node", ...]
    shape: tuple[int, ...]
    channel: int | None
    owner: str
    dtype: torch.dtype
    device: torch.device
    kernel: int = 0
    groups: int = 1
    upsamples: bool = False
    users: list["Node"] = field(default_factory=list)
    returned_by: list[str] = field(default_factory=list)
    passed_by: list[str] = field(default_factory=list)
    taken_by: list[str] = field(default_factory=list)
    origin: "Node | None" = None  # for a reshape, or a norm after one: the map before the first reshape
    ancestors: int = 0  # bit i stands for node i; includes the node itself

    def comes_from(self, other: "Node") -> bool:
        """Whether ``other`` is this node or one of its ancestors."""
        return bool(self.ancestors >> other.index & 1)

    @property
    def is_map(self) -> bool:
        """Whether it is (N, C, *spatial) with one to three spatial axes."""
        return self.channel == 1 and 3 <= len(self.shape) <= 5 and self.dtype.is_floating_point

    @property
    def spatial(self) -> tuple[int, ...]:
        """The spatial axes of a map."""
        return self.shape[2:]

    @property
    def is_flat(self) -> bool:
        """Whether every spatial axis has length 1, as in a gate."""
        return len(self.shape) >= 3 and math.prod(self.shape[2:]) == 1


@dataclass
class Flow:
    """The result of ``record``: nodes in order, calls per module, multiply-adds, input shapes, number of images."""

    nodes: list[Node]
    calls: Counter[str]
    mult_adds: int
    inputs: tuple[tuple[int, ...], ...]
    images: int


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.stack: list[tuple[str, int]] = []  # for each active call: path of the module, number of nodes before it
        self.calls: Counter[str] = Counter()
        self._known: Any = WeakIdKeyDictionary()

    def node_of(self, tensor: Tensor) -> Node | None:
        return self._known.get(tensor)

    def add_input(self, tensor: Tensor) -> None:
        # Images have their channels in axis 1; for other inputs, the axis becomes known at the first convolution.
        channel = 1 if 3 <= tensor.ndim <= 5 else None
        self._add(tensor, "input", (), channel, ())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [self._known.get(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        inputs = tuple(dict.fromkeys(node for node in read if node is not None))
        shapes = tuple(node.shape for node in inputs)
        result = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        name = name if name.startswith("_") or not name.endswith("_") else name[:-1]
        # Noise depends only on the shape. (Results of new_zeros and the like are kept: batches are copied into them.)
        if inputs and not name.startswith("rand"):
            # A tuple starts with a map, followed by statistics or indices; a list contains only maps.
            for tensor in result[:1] if isinstance(result, tuple) else tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._add(tensor, name, inputs, _channel(name, inputs, shapes, tuple(tensor.shape), args), args)
        return result

    def _add(self, tensor: Tensor, op: str, inputs: tuple[Node, ...], channel: int | None, args: Any) -> None:
        owner = self.stack[-1][0] if self.stack else ""
        node = Node(len(self.nodes), op, inputs, tuple(tensor.shape), channel, owner, tensor.dtype, tensor.device)
        node.ancestors = 1 << node.index
        for each in inputs:
            node.ancestors |= each.ancestors
            each.users.append(node)
        if op == "convolution":
            node.kernel, node.groups, node.upsamples = max(args[1].shape[2:]), args[8], bool(args[6])
        node.upsamples |= op.startswith("upsample")
        if op in RESHAPES or op in ("permute", "transpose"):
            node.origin = inputs[0].origin or inputs[0]
        elif op in NORMS:
            node.origin = inputs[0].origin  # an instance norm is surrounded by two inverse reshapes
        self.nodes.append(node)
        self._known[tensor] = node

    def enter(self, path: str, args: tuple[Any, ...]) -> None:
        self.calls[path] += 1
        self.stack.append((path, len(self.nodes)))
        node = self.node_of(args[0]) if args and isinstance(args[0], Tensor) else None
        if node is not None:
            node.taken_by.append(path)

    def leave(self, path: str, output: Any) -> None:
        _, before = self.stack.pop()
        node = self.node_of(output) if isinstance(output, Tensor) else None
        if node is not None:
            (node.returned_by if node.index >= before else node.passed_by).append(path)


def _channel(op: str, inputs: tuple[Node, ...], shapes: Any, shape: tuple[int, ...], args: Any) -> int | None:
    """The channel axis of the result of an operation."""
    source, last = inputs[0], len(shape) - 1
    if op == "convolution":
        return 1
    if op in PRODUCTS:
        return last if source.channel == len(source.shape) - 1 else None
    if op in RESHAPES:
        return _channel_of_reshape(source, shape)
    if op in ("permute", "transpose"):
        if source.channel is None:
            return None
        order = list(range(len(source.shape)))
        if op == "permute":
            order = [axis % len(order) for axis in args[1]]
        else:
            order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
        return order.index(source.channel)
    known = (node.channel for node in inputs if node.channel is not None and len(node.shape) == len(shape))
    return next(known, None)


def _channel_of_reshape(source: Node, shape: tuple[int, ...]) -> int | None:
    origin = source.origin or source
    if shape == origin.shape:
        return origin.channel  # reshaped and back, as in a channel shuffle
    if source.channel is None or len(shape) < 2:
        return None
    if source.channel == 1 and len(source.shape) >= 2 and shape[:2] == source.shape[:2]:
        return 1
    if source.channel == len(source.shape) - 1 and shape[-1] == source.shape[-1]:
        return len(shape) - 1
    return None


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
    """Run ``model(*args, **kwargs)`` in evaluation mode and record its data flow. The model does not change.

    Modes, buffers (such as statistics), gradients, hooks, random generators, and the arguments are restored. Only a
    buffer that the run replaced with one of a different shape is kept: it is a cache.
    """
    with torch.inference_mode(False), torch.no_grad():  # inference mode does not decompose operations
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        return _recorded(model, args, kwargs)


def _recorded(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    recorder = _Recorder()
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # calls inside TorchScript do not run hooks
        handles += [
            module.register_forward_pre_hook(_entering(recorder, path)),
            module.register_forward_hook(_leaving(recorder, path)),
        ]
    try:
        with _untouched(model), use_backend("reference"), FlopCounterMode(display=False) as counter:
            for tensor in tensors:
                recorder.add_input(tensor)
            with recorder:
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    shapes = tuple(tuple(t.shape) for t in tensors)
    return Flow(recorder.nodes, recorder.calls, counter.get_total_flops() // 2, shapes, max(_images(args, kwargs), 1))


def _images(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    first = next(iter((*args, *kwargs.values())), None)
    if isinstance(first, (list, tuple)):
        return len(first)  # a detector's list of images
    return len(first) if isinstance(first, Tensor) and first.ndim > 1 else 1


def _entering(recorder: _Recorder, path: str) -> Any:
    return lambda module, args: recorder.enter(path, args)


def _leaving(recorder: _Recorder, path: str) -> Any:
    return lambda module, args, output: recorder.leave(path, output)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; restores the model and the random generators afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    held = [
        (module, name, buffer)
        for module, _ in modes
        if not isinstance(module, torch.jit.ScriptModule)
        for name, buffer in module.named_buffers(recurse=False)
    ]
    buffers = [(buffer, _version(buffer), buffer.clone()) for buffer in model.buffers()]
    devices = sorted({t.device.index or 0 for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"})
    # FlopCounterMode reads the grad_fn of tensors that require a gradient; views created without gradients have none.
    learning = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    with torch.random.fork_rng(devices=devices):
        try:
            for parameter in learning:
                parameter.requires_grad = False
            for module, _ in modes:
                module.training = False  # not eval(), which some classes override
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad = True
            for module, mode in modes:
                module.training = mode
            for module, name, buffer in held:
                now = module._buffers.get(name)
                if now is not None and now is not buffer and now.shape == buffer.shape:
                    module._buffers[name] = buffer
            for buffer, version, before in buffers:
                if _version(buffer) != version:
                    buffer.copy_(before)


def _version(buffer: Tensor) -> int:
    """The version counter of a tensor. Inference tensors have none, and cannot be written to here."""
    return 0 if buffer.is_inference() else buffer._version
