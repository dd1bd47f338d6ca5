"""Finds SE gates in captured graphs by their operations, whoever wrote the module.

A gate is squeeze → FC → activation → FC → gate function → product with the map that was squeezed (equations 2–4). A
squeeze under a mask, a gate with an adapter on an FC, or a product with another map are other operations: they are left
as they are, and the reason is kept. Recognized gates become one node each, a call of ``excited``.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from senet.acceleration.operations import (
    Order,
    is_cast,
    is_shape,
    is_weight,
    kind_of,
    name_of,
    only_user,
    operation,
    take_out_empty_regions,
    value_of,
)
from senet.ops import reference

_GATES = {"sigmoid": "sigmoid", "tanh": "tanh", "relu": "relu", "hardsigmoid": "hard_sigmoid"}
_ACTIVATIONS = tuple(reference.ACTIVATIONS)


def excited(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gate: str,
    activation: str,
    norm: tuple[Any, ...] | None = None,
) -> Tensor:
    """A recognized gate by itself: ``x`` (N, C, *S) times the gate of its mean (equations 2–4).

    Args:
        x: the feature map.
        w1, b1, w2, b2: the FC layers, as linear layers or 1×1 convolutions.
        gate: a key of ``reference.GATES``.
        activation: a key of ``reference.ACTIVATIONS``.
        norm: running mean, running variance, weight, bias, and eps of a batch norm between the first FC layer and the
            activation, or None.
    """
    z = reference.squeeze(x)
    with reference.without_autocast(x.device.type):
        e = F.linear(z, *_as_table(w1, b1, z))
        if norm is not None:
            mean, var, weight, bias, eps = norm
            mean, var, weight, bias = (t if t is None else t.to(z.dtype) for t in (mean, var, weight, bias))
            e = F.batch_norm(e, mean, var, weight, bias, eps=eps)
        e = F.linear(reference.ACTIVATIONS[activation](e), *_as_table(w2, b2, z))
        return reference.scale(x, reference.GATES[gate](e))


def _as_table(w: Tensor, b: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor | None]:
    return w.flatten(1).to(z.dtype), None if b is None else b.to(z.dtype)


@dataclass(frozen=True)
class Gate:
    """A recognized gate; all tensors are nodes of the graph.

    Attributes:
        name: the path of its module.
        x: the map that it rescales.
        w1, b1, w2, b2: its FC layers.
        gate, activation: names of its functions, as in ``excited``.
        norm: the batch norm between, as in ``excited``.
    """

    name: str
    x: fx.Node
    w1: fx.Node
    b1: fx.Node | None
    w2: fx.Node
    b2: fx.Node | None
    gate: str
    activation: str
    norm: tuple[Any, ...] | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of ``excited`` after ``x``."""
        return self.w1, self.b1, self.w2, self.b2, self.gate, self.activation, self.norm


class UnknownGateError(Exception):
    """Why a product of feature maps is not a gate that is known."""


def gate_at(node: Any) -> Gate | None:
    """The gate of a node that ``lift_gates`` made, else None."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not excited:
        return None
    x, *arguments = node.args
    return Gate(node.meta["gate_name"], x, *arguments)  # type: ignore[arg-type]


def lift_gates(graph: fx.Graph) -> dict[str, str]:
    """Turn each recognized gate into one call of ``excited``; returns path → reason of the products that are left."""
    left: dict[str, str] = {}
    order = Order(graph)
    for node in list(graph.nodes):
        found = operation(node)
        if found is None or found.kind != "mul" or found.writes or not _is_map(node):
            continue
        pair = [value for value in (found.x, found.y) if isinstance(value, fx.Node)]
        if len(pair) != 2 or not all(isinstance(value_of(factor), Tensor) for factor in pair):
            continue
        reasons = []
        for x, factor in (pair, pair[::-1]):
            try:
                gate, inside = _gate(node, x, factor, order)
            except UnknownGateError as reason:
                reasons.append(str(reason))
                continue
            with graph.inserting_before(node):
                new = graph.call_function(excited, (x, *gate.arguments))
            new.meta = dict(node.meta) | {"gate_name": gate.name}
            order.replace(node, new)
            node.replace_all_uses_with(new)
            for each in inside:
                graph.erase_node(each)
            break
        else:
            why = next(filter(None, reasons), "")
            if why or all(_is_map(factor) for factor in pair):
                left.setdefault(name_of(node), why or "it multiplies feature maps, but not by a gate of their own")
    take_out_empty_regions(graph)
    return left


def _is_map(node: Any) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.ndim >= 3 and value.is_floating_point()


def _gate(product: fx.Node, x: fx.Node, factor: fx.Node, order: Order) -> tuple[Gate, list[fx.Node]]:
    """The gate that rescales ``x`` by ``factor``, and its nodes from the product up to the squeeze."""
    walk = _Walk(product, factor)
    walk.pass_shapes()
    gate = walk.gate_function()
    walk.pass_shapes()
    w2, b2 = walk.fully_connected("its gate function does not follow a fully connected layer")
    walk.pass_shapes()
    activation = kind_of(walk.node)
    if activation not in _ACTIVATIONS:
        raise UnknownGateError(
            "effective SE: its excitation is a single layer"
            if walk.is_squeeze()
            else f"the activation between its FCs is not one of {', '.join(_ACTIVATIONS)}"
        )
    walk.step()
    walk.pass_shapes()
    norm = walk.norm()
    walk.pass_shapes()
    w1, b1 = walk.fully_connected("its excitation is not FC, activation, FC")
    walk.pass_shapes()
    walk.squeeze(x)
    if not order.is_one_region((product, walk.inside[-1])):
        raise UnknownGateError("its squeeze and its product run under different autocast settings")
    _check_shapes(x, w1, w2)
    return Gate(name_of(product), x, w1, b1, w2, b2, gate, activation, norm), walk.inside


def _check_shapes(x: fx.Node, w1: fx.Node, w2: fx.Node) -> None:
    channels = value_of(x).shape[1]
    (r1, c1), (c2, r2) = (tuple(value_of(w).shape[:2]) for w in (w1, w2))
    if not (r1 == r2 and c1 == c2 == channels):
        raise UnknownGateError("its FCs do not lead from the channels back to the channels")


class _Walk:
    """Goes back from the product to the squeeze, over nodes that nobody else reads."""

    def __init__(self, product: fx.Node, node: fx.Node) -> None:
        self.inside, self.node = [product], node
        self._own_readers()

    def _own_readers(self) -> None:
        if not isinstance(self.node, fx.Node):
            raise UnknownGateError("")

    def step(self, back: Any = None) -> None:
        """Take the node in, and go on to its first argument, or to ``back``."""
        if only_user(self.node) is None:
            raise UnknownGateError("another module reads a value inside it")
        self.inside.append(self.node)
        self.node = self.node.args[0] if back is None else back  # type: ignore[assignment]
        self._own_readers()

    def pass_shapes(self) -> None:
        while is_shape(self.node) or is_cast(self.node):
            expands_like = self.node.op == "call_method" and self.node.target in ("expand_as", "type_as")
            if expands_like and len(self.node.args) != 2:
                raise UnknownGateError("")
            self.step()

    def gate_function(self) -> str:
        """The name of the gate function: a key of ``reference.GATES``."""
        shifted = self._scalar("mul", 2.0)
        found = operation(self.node)
        name = None if found is None else _GATES.get(found.kind)
        if name == "relu" and not shifted and self._reads_scalar("add", 1.0):
            self.step()
            self._scalar("add", 1.0)
            return "identity_relu"
        if name is not None:
            self.step()
            if shifted and name in ("tanh", "relu"):
                raise UnknownGateError("its gate function is not known")
            return ("identity_" if shifted else "") + name
        if not shifted and self._scalar("add", 1.0) and kind_of(self.node) == "tanh":
            self.step()
            return "identity_tanh"
        if (self._scalar("div", 6.0) or self._scalar("mul", 1 / 6)) and kind_of(self.node) == "relu6":
            self.step()
            if self._scalar("add", 3.0):
                return ("identity_" if shifted else "") + "hard_sigmoid"
        raise UnknownGateError("")  # most products of maps are none

    def _reads_scalar(self, kind: str, value: float) -> bool:
        before = self.node.args[0] if self.node.args else None
        found = operation(before)
        return found is not None and found.kind == kind and value in _scalars(found)

    def _scalar(self, kind: str, value: float) -> bool:
        """Take in a product or sum with a number, if there is one here."""
        found = operation(self.node)
        if found is None or found.kind != kind or value not in _scalars(found):
            return False
        if kind == "add" and found.alpha != 1:
            return False
        other = found.x if isinstance(found.x, fx.Node) else found.y
        if kind == "div" and not isinstance(found.x, fx.Node):
            return False
        self.step(other)
        return True

    def fully_connected(self, otherwise: str) -> tuple[fx.Node, fx.Node | None]:
        found = operation(self.node)
        if found is None or found.kind not in ("linear", "conv") or not _is_pointwise(found):
            raise UnknownGateError(otherwise)
        self.step()
        return _underlying(found.weight), found.bias

    def norm(self) -> tuple[Any, ...] | None:
        found = operation(self.node)
        if found is None or found.kind != "batch_norm":
            return None
        if found.training is not False or found.running_mean is None:
            raise UnknownGateError("the batch norm between its FCs uses the statistics of the batch")
        if not isinstance(found.eps, float):
            raise UnknownGateError("the eps of the batch norm between its FCs has changed between captures")
        self.step()
        return found.running_mean, found.running_var, found.weight, found.bias, found.eps

    def is_squeeze(self) -> bool:
        return kind_of(self.node) in ("mean", "pool")

    def squeeze(self, x: fx.Node) -> None:
        """Check the global average pooling of ``x``."""
        found, value = operation(self.node), value_of(x)
        if found is None or found.kind not in ("mean", "pool"):
            raise UnknownGateError("its squeeze is not global average pooling")
        if found.kind == "pool" and found.size not in (1, (1, 1), [1, 1]):
            raise UnknownGateError("it pools to more than one position")
        if found.kind == "mean":
            given = found.dim if isinstance(found.dim, (tuple, list)) else (found.dim,)
            if None in given or {int(d) % value.ndim for d in given} != set(range(2, value.ndim)):
                raise UnknownGateError("its squeeze is not the mean over all positions")
        if found.x is not x:
            raise UnknownGateError("it squeezes another map than the one it rescales")
        if only_user(self.node) is None:
            raise UnknownGateError("another module reads its squeeze")
        self.inside.append(self.node)


def _underlying(weight: fx.Node) -> fx.Node:
    """The parameter that is reshaped to a weight; ``excited`` reshapes it, too."""
    node: Any = weight
    while isinstance(node, fx.Node) and (is_shape(node) or is_cast(node)):
        node = node.args[0]
    alike = is_weight(node) and value_of(node).shape[:2] == value_of(weight).shape[:2]
    return node if alike else weight


def _scalars(found: Any) -> list[Any]:
    return [value for value in (found.x, found.y) if isinstance(value, (int, float)) and not isinstance(value, bool)]


def _is_pointwise(found: Any) -> bool:
    if found.kind == "linear":
        return True
    weight = value_of(found.weight)
    alone = weight is not None and all(size == 1 for size in weight.shape[2:])
    ones = all(_every(found.values[name], 1) for name in ("stride", "groups")) and _every(found.padding, 0)
    return alone and ones


def _every(value: Any, wanted: int) -> bool:
    return all(v == wanted for v in value) if isinstance(value, (tuple, list)) else value == wanted
