"""The data flow of one run of a network: which operation made each map, from which maps, inside which module.

The run is recorded, not traced: torch.fx and torch.export give up where the path depends on the data (detectors) or on
Python they do not know, while any network runs on an example. Recorded are the ATen operations, by identity of their
tensors (``TorchDispatchMode``), and which tensors each module returned, so that a node of the graph is known both by
what it computes and by the module at which it can be changed.
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
    """One tensor that depends on the network's input, and the operation that made it.

    Attributes:
        op: the name of the ATen operation without the underscore of in-place forms; ``"input"`` for the input.
        inputs: the nodes it was computed from; parameters and constants are not among them.
        shape: of the tensor.
        channel: the axis of its channels, followed from the convolutions on; None where that is not known.
        kernel: of a convolution, its longest side; 0 for other operations.
        groups: of a convolution, 1 for a full one.
        upsamples: a transposed convolution or an interpolation.
        owner: the path of the module in whose ``forward`` the operation ran.
        returned_by: the modules that made it and returned it, innermost first.
        passed_by: the modules that took it and returned it as it is (identities; dropout in evaluation).
        taken_by: the modules that it is the first argument of, by place and not by keyword.
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
    origin: "Node | None" = None  # of a reshape, or a norm behind one, the map before the first of them
    ancestors: int = 0  # bit i: node i, itself included

    def comes_from(self, other: "Node") -> bool:
        """Whether ``other`` is this node or among its ancestors."""
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
        """Whether every spatial axis has length 1, as those of a gate have."""
        return len(self.shape) >= 3 and math.prod(self.shape[2:]) == 1


@dataclass
class Flow:
    """What ``record`` saw: the nodes in order, the calls of each module, the cost, shapes and number of the images."""

    nodes: list[Node]
    calls: Counter[str]
    mult_adds: int
    inputs: tuple[tuple[int, ...], ...]
    images: int


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.stack: list[tuple[str, int]] = []  # path of each module being called, and the number of nodes before it
        self.calls: Counter[str] = Counter()
        self._known: Any = WeakIdKeyDictionary()

    def node_of(self, tensor: Tensor) -> Node | None:
        return self._known.get(tensor)

    def add_input(self, tensor: Tensor) -> None:
        # An image has its channels where a convolution wants them; anything else says so itself.
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
        # Noise takes its shape alone. (What new_zeros and its like take is kept: a batch is often copied into one.)
        if inputs and not name.startswith("rand"):
            # A tuple is a map and what else came of it (statistics, indices); a list is of maps.
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
            node.origin = inputs[0].origin  # an instance norm reshapes there and back around it
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
    """The axis of the channels of an operation's result."""
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
    alike = (node.channel for node in inputs if node.channel is not None and len(node.shape) == len(shape))
    return next(alike, None)


def _channel_of_reshape(source: Node, shape: tuple[int, ...]) -> int | None:
    origin = source.origin or source
    if shape == origin.shape:
        return origin.channel  # there and back: a channel shuffle
    if source.channel is None or len(shape) < 2:
        return None
    if source.channel == 1 and len(source.shape) >= 2 and shape[:2] == source.shape[:2]:
        return 1
    if source.channel == len(source.shape) - 1 and shape[-1] == source.shape[-1]:
        return len(shape) - 1
    return None


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
    """Run ``model(*args, **kwargs)`` in evaluation mode and record its data flow; afterwards it is as it was.

    Modes, statistics and other buffers, gradients and random generators are as before; so are the model's hooks and
    the arguments. (A buffer that the run has replaced by one of another shape stays: it is a cache.)
    """
    with torch.inference_mode(False), torch.no_grad():  # in inference mode operations come undecomposed
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        return _recorded(model, args, kwargs)


def _recorded(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    recorder = _Recorder()
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # its inner calls run no hooks
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
        return len(first)  # as detectors take them
    return len(first) if isinstance(first, Tensor) and first.ndim > 1 else 1


def _entering(recorder: _Recorder, path: str) -> Any:
    return lambda module, args: recorder.enter(path, args)


def _leaving(recorder: _Recorder, path: str) -> Any:
    return lambda module, args, output: recorder.leave(path, output)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, after which the model and the random generators are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    held = [
        (module, name, buffer)
        for module, _ in modes
        if not isinstance(module, torch.jit.ScriptModule)
        for name, buffer in module.named_buffers(recurse=False)
    ]
    buffers = [(buffer, _version(buffer), buffer.clone()) for buffer in model.buffers()]
    devices = sorted({t.device.index or 0 for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"})
    # The counter of multiply-adds asks what requires a gradient for its history, which a view made here does not have.
    learning = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    with torch.random.fork_rng(devices=devices):
        try:
            for parameter in learning:
                parameter.requires_grad = False
            for module, _ in modes:
                module.training = False  # not eval(): a class may do more there than to switch
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
    """How often a tensor was written to; of one from inference mode it is unknown, and it cannot be here."""
    return 0 if buffer.is_inference() else buffer._version
