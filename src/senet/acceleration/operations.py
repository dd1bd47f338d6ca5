"""Reads the nodes of captured graphs as operations, whichever way they were written.

A convolution in a graph may be ``torch.conv2d`` (captured by Dynamo) or ``aten.conv2d.default`` (by torch.export); a
ReLU may be a function, a method, or in place. The passes ask only for the *kind* of an operation and its arguments by
name. What is not listed here has no kind, and stays as it was captured.
"""

import inspect
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from senet.acceleration.checkpoints import checkpointed

_aten = torch.ops.aten
_NONE: dict[str, Any] = {}
_INPLACE = {"inplace": False}
# kind → its arguments in order; those with a default follow those without.
_ARGUMENTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "conv": (("x", "weight"), {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}),
    "batch_norm": (
        ("x", "running_mean", "running_var"),
        {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5},
    ),
    "aten_batch_norm": (
        ("x", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn"),
        _NONE,
    ),
    "group_norm": (("x", "num_groups"), {"weight": None, "bias": None, "eps": 1e-5, "cudnn": True}),
    "linear": (("x", "weight"), {"bias": None}),
    "hardtanh": (("x",), {"min_val": -1.0, "max_val": 1.0, **_INPLACE}),
    "clamp": (("x",), {"min": None, "max": None}),
    "mean": (("x",), {"dim": None, "keepdim": False, "dtype": None}),
    "pool": (("x", "size"), _NONE),
    "add": (("x", "y"), {"alpha": 1}),
    "mul": (("x", "y"), _NONE),
    "div": (("x", "y"), {"rounding_mode": None}),
    "dropout": (("x",), {"p": 0.5, "training": True, **_INPLACE}),
    **dict.fromkeys(("relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh"), (("x",), _INPLACE)),
}
_KINDS: dict[Any, str] = {
    **dict.fromkeys((torch.conv2d, _aten.conv2d.default), "conv"),
    **dict.fromkeys((F.batch_norm,), "batch_norm"),
    **dict.fromkeys((torch.batch_norm, _aten.batch_norm.default), "aten_batch_norm"),
    **dict.fromkeys((F.group_norm, torch.group_norm, _aten.group_norm.default), "group_norm"),
    **dict.fromkeys((F.linear, torch._C._nn.linear, _aten.linear.default), "linear"),
    **dict.fromkeys((F.adaptive_avg_pool2d, _aten.adaptive_avg_pool2d.default), "pool"),
    **dict.fromkeys((operator.add, torch.add, "add", _aten.add.Tensor, _aten.add.Scalar), "add"),
    **dict.fromkeys((operator.mul, torch.mul, torch.multiply, "mul", "multiply", _aten.mul.Tensor), "mul"),
    **dict.fromkeys((operator.truediv, torch.div, "div", _aten.div.Tensor), "div"),
    **dict.fromkeys((torch.mean, "mean", _aten.mean.dim), "mean"),
    **dict.fromkeys((F.dropout, torch.dropout, _aten.dropout.default), "dropout"),
    **dict.fromkeys((torch.clamp, "clamp", torch.clip, "clip", _aten.clamp.default), "clamp"),
    **dict.fromkeys((F.relu, torch.relu, "relu", _aten.relu.default), "relu"),
    **dict.fromkeys((F.relu6, _aten.relu6.default), "relu6"),
    **dict.fromkeys((F.hardtanh, _aten.hardtanh.default), "hardtanh"),
    **dict.fromkeys((F.silu, _aten.silu.default), "silu"),
    **dict.fromkeys((F.hardswish, _aten.hardswish.default), "hardswish"),
    **dict.fromkeys((F.hardsigmoid, _aten.hardsigmoid.default), "hardsigmoid"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid", _aten.sigmoid.default), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh", _aten.tanh.default), "tanh"),
}
_WRITING: dict[Any, str] = {  # these overwrite their first argument
    **dict.fromkeys((operator.iadd, "add_", _aten.add_.Tensor, _aten.add_.Scalar), "add"),
    **dict.fromkeys((operator.imul, "mul_", _aten.mul_.Tensor), "mul"),
    **dict.fromkeys((operator.itruediv, "div_", _aten.div_.Tensor), "div"),
    **dict.fromkeys((torch.clamp_, "clamp_", _aten.clamp_.default), "clamp"),
    **dict.fromkeys((F.relu_, torch.relu_, "relu_", _aten.relu_.default), "relu"),
    **dict.fromkeys((_aten.relu6_.default,), "relu6"),
    **dict.fromkeys((F.hardtanh_, _aten.hardtanh_.default), "hardtanh"),
    **dict.fromkeys((torch.dropout_, _aten.dropout_.default), "dropout"),
    **dict.fromkeys((_aten.silu_.default,), "silu"),
    **dict.fromkeys((_aten.hardswish_.default,), "hardswish"),
    **dict.fromkeys((_aten.hardsigmoid_.default,), "hardsigmoid"),
    **dict.fromkeys((torch.sigmoid_, "sigmoid_", _aten.sigmoid_.default), "sigmoid"),
    **dict.fromkeys((torch.tanh_, "tanh_", _aten.tanh_.default), "tanh"),
}
# The same without the write.
_PURE: dict[str, Callable[..., Any]] = {
    "add": torch.add, "mul": torch.mul, "div": torch.div, "clamp": torch.clamp, "relu": torch.relu, "relu6": F.relu6,
    "hardtanh": F.hardtanh, "silu": F.silu, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh,
}  # fmt: skip
_AGREED = {"input": "x", "self": "x", "other": "y", "output_size": "size", "axis": "dim"}

# Kinds whose result is always new memory.
FRESH = frozenset(_ARGUMENTS) - {"dropout"}
_NEW = (torch.empty, torch.zeros, torch.ones, "new_empty", "new_zeros", "new_ones", "clone")
_SHAPE_METHODS = ("view", "reshape", "unsqueeze", "squeeze", "flatten", "expand", "expand_as", "contiguous")
_SHAPE_FUNCTIONS = (
    *(torch.reshape, torch.unsqueeze, torch.squeeze, torch.flatten, _aten.view.default, _aten.reshape.default),
    *(_aten.unsqueeze.default, _aten.flatten.using_ints, _aten.expand.default, _aten.squeeze.dims, _aten.squeeze.dim),
    *(_aten.expand_as.default, _aten.contiguous.default),
)
_DTYPE_METHODS = ("to", "float", "type_as", "half", "bfloat16", "double")
_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
_GRAD_MODE = torch._C._set_grad_enabled


@dataclass(frozen=True)
class Operation:
    """One node, read as an operation.

    Attributes:
        kind: ``"conv"``, ``"batch_norm"``, ``"relu"``, …
        node: the node.
        values: its arguments by name, with defaults: nodes and constants. ``x`` is the first tensor.
        writes: whether it overwrites ``x``.
    """

    kind: str
    node: fx.Node
    values: dict[str, Any]
    writes: bool

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None


def operation(node: Any) -> Operation | None:
    """The node as an operation, or None if it is none of the known kinds."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    writes = node.target in _WRITING
    kind = _WRITING.get(node.target) if writes else _KINDS.get(node.target)
    if kind is None:
        return None
    names, defaults = _ARGUMENTS[kind]
    order = (*names, *defaults)
    if len(node.args) > len(order):
        return None
    values = dict(zip(order, node.args, strict=False))
    for name, value in node.kwargs.items():
        name = _AGREED.get(name, name)
        if name not in order or name in values:
            return None
        values[name] = value
    if any(name not in values for name in names):
        return None
    if not isinstance(values["x"], fx.Node) and kind not in ("add", "mul"):  # a number times a tensor
        return None
    values = {**defaults, **values}
    writes |= bool(values.pop("inplace", False))
    if kind == "aten_batch_norm":
        kind = "batch_norm"
    if kind == "hardtanh" and (values["min_val"], values["max_val"]) == (0, 6):
        kind = "relu6"
    if kind == "clamp" and (values["min"], values["max"]) == (0, 6):
        kind = "relu6"
    return Operation(kind, node, values, writes)


def kind_of(node: Any) -> str | None:
    """The kind of a node, or None."""
    found = operation(node)
    return None if found is None else found.kind


def is_shape(node: fx.Node) -> bool:
    """Whether the node only views, reshapes, or broadcasts its first argument, keeping the order of the elements."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.op == "call_function" and node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(i is None or i is Ellipsis or i == slice(None) for i in index)
    return node.op == "call_function" and node.target in _SHAPE_FUNCTIONS


def is_cast(node: fx.Node) -> bool:
    """Whether the node converts the dtype of its first argument, and nothing else."""
    if node.op == "call_method" and node.target == "to":
        others = (*node.args[1:], *node.kwargs.values())
        return bool(others) and all(isinstance(value, torch.dtype) for value in others)
    if node.op == "call_method":
        return node.target in _DTYPE_METHODS
    return node.op == "call_function" and node.target is _aten.to.dtype


def value_of(node: Any) -> Any:
    """What the node returned when it was captured: a fake tensor with shape, dtype, and device, or None."""
    return None if not isinstance(node, fx.Node) else node.meta.get("example_value", node.meta.get("val"))


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that reads ``node``, if there is exactly one that does."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def name_of(node: fx.Node) -> str:
    """The path of the module that the node was captured in, as users know it; the node's own name outside of any."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values()))), "")
    path = re.sub(r"^[LG]\['\w+'\](\.__self__)?\.?", "", path)  # the variable that held the network
    path = re.sub(r"\.?_modules\['([^']*)'\]", r".\1", path).removeprefix(".")
    return ".".join(part for part in (node.meta.get("root"), path) if part) or node.name


def is_weight(node: Any) -> bool:
    """Whether a node is a parameter or buffer of the network, not an input of the call."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "get_attr":
        return True
    return node.op == "placeholder" and "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or ())


def writes_in_place(node: fx.Node) -> bool:
    """Whether the node may write to a tensor that it was given. Higher-order operators may do anything."""
    if node.op not in ("call_function", "call_method"):
        return False
    found = operation(node)
    if found is not None:
        return found.writes and not (found.kind == "dropout" and found.training is False)
    if "out" in node.kwargs or node.kwargs.get("inplace") is True:
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.HigherOrderOperator) or node.target in (operator.setitem, checkpointed):
        return True
    name = getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    if name.startswith("i") and getattr(operator, name, None) is node.target:
        return name in ("iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor", "ifloordiv", "ipow", "imod")
    return _asks_for_inplace(node)


_DRAWING = ("rand", "normal", "bernoulli", "multinomial", "dropout", "uniform", "poisson", "exponential")


def is_repeatable(graph: fx.Graph) -> bool:
    """Whether the graph may be run twice, or on parts of a batch: it writes nothing, and draws no random numbers."""
    for node in graph.nodes:
        found = operation(node)
        name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
        if found is not None and found.kind == "batch_norm" and found.training is not False:
            return False
        if node.op.startswith("call") and any(word in name for word in _DRAWING):
            return False
        if writes_in_place(node) and not _is_private(node.args[0] if node.args else None):
            return False
    return True


def _asks_for_inplace(node: fx.Node) -> bool:
    """``F.leaky_relu(x, 0.1, True)``: an ``inplace`` given by position."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return bound.arguments.get("inplace") is True


def without_private_writes(graph: fx.Graph) -> None:
    """Turn in-place operations into ordinary ones where nobody else reads the overwritten tensor."""
    for node in list(graph.nodes):
        found = operation(node)
        if found is None or not found.writes or found.kind not in _PURE or not _is_private(found.x):
            continue
        if not _keeps_dtype(found):
            continue
        values = {name: value for name, value in found.values.items() if name not in ("x", "y")}
        args = tuple(found.values[name] for name in ("x", "y") if name in found.values)
        defaults = _ARGUMENTS[found.kind][1] if found.kind in _ARGUMENTS else {}
        if found.kind == "relu6":
            values = {}
        kwargs = {name: value for name, value in values.items() if value != defaults.get(name)}
        with graph.inserting_before(node):
            pure = graph.call_function(_PURE[found.kind], args, kwargs)
        pure.meta = dict(node.meta) | {"wrote": True}
        node.replace_all_uses_with(pure)
        graph.erase_node(node)


def _keeps_dtype(found: Operation) -> bool:
    """Whether the result of the operation has the dtype of ``x`` even if it is not written there."""
    x, y = value_of(found.x), value_of(found.values.get("y"))
    return not isinstance(x, Tensor) or not isinstance(y, Tensor) or torch.result_type(x, y) == x.dtype


def with_private_writes(graph: fx.Graph) -> None:
    """Let operations write in place again that did before ``without_private_writes``, which saves memory."""
    again = {torch.add: operator.iadd, torch.mul: operator.imul, torch.relu: torch.relu_}
    for node in graph.nodes:
        if node.meta.get("wrote") and node.target in again and not node.kwargs and _is_private(node.args[0]):
            node.target = again[node.target]


def _is_private(node: Any) -> bool:
    """Whether a tensor is memory that was made for this node, and has one reader."""
    if not isinstance(node, fx.Node) or only_user(node) is None:
        return False
    found = operation(node)
    if found is not None and found.writes:
        return _is_private(found.x)
    if found is None and writes_in_place(node):
        return bool(node.args) and _is_private(node.args[0])
    return (found is not None and found.kind in FRESH) or node.target in _NEW


class Order:
    """What runs in which order and under which settings: whether a chain of nodes may run as one.

    Built once for a graph; a node that a pass inserts must take the place of another (``replace``).
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self._settings: dict[fx.Node, tuple[Any, ...]] = {}
        self._writes: list[int] = []
        casts: list[tuple[fx.Node, Any]] = []
        grad: Any = None
        for node in graph.nodes:
            if node.op == "call_function" and node.target is _ENTER:
                casts.append((node, node.args))
            elif node.op == "call_function" and node.target is _EXIT:
                casts = [cast for cast in casts if cast[0] is not node.args[0]]
            elif node.op == "call_function" and node.target is _GRAD_MODE:
                grad = node.args[0]
            elif writes_in_place(node) and not _is_harmless(node):
                self._writes.append(self.position[node])
            self._settings[node] = (grad, *(settings for _, settings in casts))

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Let ``new`` stand where ``node`` does."""
        self.position[new], self._settings[new] = self.position[node], self._settings[node]

    def is_free_of_writes(self) -> bool:
        """Whether nothing writes to a map that others may read."""
        return not self._writes

    def is_one_region(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether all nodes run under the same autocast and gradient settings."""
        return len({self._settings[node] for node in nodes}) <= 1

    def may_run_late(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether the nodes may all run where the last of them does: same settings, and no write in between."""
        nodes = list(nodes)
        places = sorted(self.position[node] for node in nodes)
        inside = set(places)
        between = (w for w in self._writes if places[0] < w < places[-1] and w not in inside)
        return self.is_one_region(nodes) and not any(True for _ in between)


def _is_harmless(node: fx.Node) -> bool:
    """Whether a write is to memory that no feature map shares: a counter of the network, or a tensor of its own."""
    target = node.args[0] if node.args else None
    if is_weight(target):
        value = value_of(target)
        return isinstance(value, Tensor) and not value.is_floating_point()
    return _is_private(target)


def take_out_empty_regions(graph: fx.Graph) -> None:
    """Take out autocast regions that a pass has emptied."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is _EXIT and node.prev is node.args[0]:
            entered = node.prev
            graph.erase_node(node)
            if not entered.users:
                graph.erase_node(entered)


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def take_out_idle(graph: fx.Graph) -> None:
    """Take out what returns its input as it is, dropout outside of training, and sizes that nobody reads."""
    for node in reversed(list(graph.nodes)):
        if node.op.startswith("call") and not node.users and isinstance(value_of(node), (int, *_SYMBOLS)):
            graph.erase_node(node)
    for node in list(graph.nodes):
        found = operation(node)
        if found is not None and found.kind == "dropout" and found.training is False:
            node.replace_all_uses_with(found.x)
            graph.erase_node(node)
