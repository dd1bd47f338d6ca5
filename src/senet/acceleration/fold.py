"""The inference pass: folded norms, early gates, and additions in epilogues, on a captured graph.

The pass decides on the operations of the graph once. What it replaces are calls of modules (``senet.acceleration.
modules``) that are made from the current weights, and made anew when the weights change.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet.acceleration.gates import Gate, excited, gate_at
from senet.acceleration.modules import ACTIVATIONS, FoldedConv2d, FoldedGate, FoldedLinear, FoldedSum, FoldedTail
from senet.acceleration.operations import (
    FRESH,
    Operation,
    Order,
    is_weight,
    kind_of,
    name_of,
    only_user,
    operation,
    value_of,
)
from senet.ops.conv import early_gate
from senet.ops.conv.native import PackedLinear
from senet.ops.reference import FullyConnected

EARLY, LATE = "early gate", "late gate, one sweep"
PROJECTED, ALONE = "in place, before the projection", "by itself"

Values = Callable[[Any], Any]  # from a node of a weight to its tensor
Maker = Callable[[Values], nn.Module]


@dataclass(frozen=True)
class Convolution:
    """A convolution as ``early_gate.fold_norm`` and ``FoldedConv2d`` read it: the arguments of ``F.conv2d``."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class FrozenNorm:
    """A batch norm with running statistics, as ``early_gate.fold_norm`` reads it."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class FC:
    """A fully connected layer: (out, c), and (out) or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass
class Folding:
    """What the pass has done to a graph.

    Attributes:
        module: the rewritten graph; its modules named in ``makers`` are missing until ``make`` is called.
        makers: module → what makes it from the weights.
        weights: the weights that the modules are made from, by the name of their placeholder.
        forms: path of a gate → one of the names of forms in this module.
    """

    module: fx.GraphModule
    makers: dict[str, Maker] = field(default_factory=dict)
    weights: dict[str, fx.Node] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)

    def make(self, values: Values) -> None:
        """Make the modules from the current weights."""
        for name, maker in self.makers.items():
            self.module.add_module(name, maker(values))


@dataclass
class _Chain:
    """Nodes that follow one another with no other reader between, and what they are."""

    conv: Operation
    nodes: list[fx.Node]
    norm: Operation | None = None
    inner: str | None = None  # the activation of the convolution itself
    gate: Gate | None = None
    shortcut: fx.Node | None = None
    relu: bool = False  # behind the gate or the sum


def fold(module: fx.GraphModule, backend: str) -> Folding:
    """Fold a captured graph in place; gates must have been lifted (``lift_gates``).

    Args:
        module: the graph; parameters and buffers are placeholders.
        backend: one of ``early_gate.BACKENDS``.
    """
    folding = _Fold(module, backend)
    folding.run()
    return folding.found


class _Fold:
    """Walks the graph once; each convolution takes in what follows it as long as nobody else reads between."""

    def __init__(self, module: fx.GraphModule, backend: str) -> None:
        self.found, self.graph, self.backend = Folding(module), module.graph, backend
        self.order = Order(module.graph)
        self.fresh: set[fx.Node] = set()  # nodes whose output is a map of their own, which may be overwritten

    def run(self) -> None:
        for node in list(self.graph.nodes):
            found = operation(node)
            if found is None:
                if _pools(node):
                    self.fresh.add(node)
            elif found.kind == "conv" and _is_foldable(found):
                self._fold(self._chain(found))
            elif found.kind == "batch_norm":
                self.fresh.add(node)
            elif found.kind == "linear" and self._is_packed(found):
                self._replace([node], _linear(found.weight, found.bias), (found.x,), (found.weight, found.bias))
        for node in list(self.graph.nodes):
            gate = gate_at(node)
            if gate is not None:
                self._fold_gate(node, gate)

    def _is_packed(self, linear: Operation) -> bool:
        """Whether a linear layer is faster packed, and may be."""
        if self.backend != "native" or not is_weight(linear.weight) or not _is_constant(linear.bias):
            return False
        return PackedLinear.why_not(value_of(linear.weight)) is None

    def _chain(self, conv: Operation) -> _Chain:
        chain = _Chain(conv, [conv.node])
        norm = operation(self._next(chain))
        if norm is not None and _is_frozen(norm) and norm.x is conv.node:
            chain.nodes.append(norm.node)
            chain.norm = norm
        chain.inner = self._take_activation(chain)
        # Behind an activation a gate that nothing is added to is left to `_fold_gate`.
        if self._take_gate(chain) or chain.inner is None:
            self._take_sum(chain)
            if chain.gate is not None or chain.shortcut is not None:
                chain.relu = self._take_activation(chain, only="relu") is not None
        return chain

    def _next(self, chain: _Chain) -> fx.Node | None:
        """The only reader of the chain, if it may join it: the chain then runs where that node does."""
        user = only_user(chain.nodes[-1])
        return user if user is not None and self._may_join(chain, user) else None

    def _may_join(self, chain: _Chain, user: fx.Node) -> bool:
        return user in self.order.position and self.order.may_run_late((*chain.nodes, user))

    def _take_gate(self, chain: _Chain) -> bool:
        user = self._next(chain)
        gate = gate_at(user)
        if user is None or gate is None or not _is_constant_gate(gate):
            return False
        after = only_user(user)
        if chain.inner is not None and (after is None or _added_to(after, user) is None):
            return False
        chain.nodes.append(user)
        chain.gate = gate
        return True

    def _take_sum(self, chain: _Chain) -> None:
        """Append the addition of another map of the network."""
        user = self._next(chain)
        other = None if user is None else _added_to(user, chain.nodes[-1])
        if user is None or other is None:
            return
        # A gated branch takes its sum. Of two others the last does: the first one's map is there to be overwritten.
        position = self.order.position
        if chain.gate is None and (position[other] > position[chain.nodes[0]] or gate_at(other) is not None):
            return
        chain.nodes.append(user)
        chain.shortcut = other

    def _take_activation(self, chain: _Chain, only: str | None = None) -> str | None:
        user = self._next(chain)
        found = operation(user)
        if user is None or found is None or found.writes or found.kind not in ACTIVATIONS:
            return None
        if only is not None and found.kind != only:
            return None
        chain.nodes.append(user)
        return found.kind

    def _fold(self, chain: _Chain) -> None:
        backend, relu, overwrites, gate = self.backend, chain.relu, self._may_overwrite(chain), chain.gate
        conv = _convolution(chain, backend)
        weights = [chain.conv.weight, chain.conv.bias]
        if chain.norm is not None:
            weights += [chain.norm.values[name] for name in ("running_mean", "running_var", "weight", "bias")]
        source: tuple[Any, ...] = (chain.conv.x,) if chain.shortcut is None else (chain.conv.x, chain.shortcut)
        maker: Maker = conv
        if gate is not None:
            maker = _tail(conv, gate, relu, overwrites, backend)
            weights += _weights_of(gate)
            pointwise = _is_pointwise(chain.conv) and chain.inner is None
            self.found.forms[gate.name] = EARLY if pointwise else LATE
        elif chain.shortcut is not None:
            maker = _sum(conv, relu, overwrites)
        self._replace(chain.nodes, maker, source, weights)

    def _may_overwrite(self, chain: _Chain) -> bool:
        """Whether the chain may write its result over its shortcut, which its convolution must not read meanwhile."""
        shortcut = chain.shortcut
        if shortcut is None or shortcut not in self.fresh or shortcut is chain.conv.x:
            return False
        return self._is_last_reader(shortcut, chain.nodes)

    def _fold_gate(self, node: fx.Node, gate: Gate) -> None:
        if not _is_constant_gate(gate):
            self.found.forms[gate.name] = ALONE
            return
        user = only_user(node)
        maker = None if user is None else self.found.makers.get(str(user.target))
        projected = maker is not None and user is not None and user.meta.get("pointwise", False)
        self.found.forms[gate.name] = PROJECTED if projected else ALONE
        overwrites = gate.x in self.fresh and self._is_last_reader(gate.x, [node])
        backend = self.backend

        def alone(values: Values) -> nn.Module:
            excitation = _excitation(gate, values)
            return FoldedGate(excitation, excitation.w1.dtype, overwrites, backend)

        self._replace([node], alone, (gate.x,), _weights_of(gate))

    def _is_last_reader(self, map_node: fx.Node, chain: list[fx.Node]) -> bool:
        """Whether all readers of a map outside of the chain run before its end does, and keep no view of it."""
        position = self.order.position
        others = [user for user in map_node.users if user not in chain]
        return all(position.get(user, len(position)) < position[chain[-1]] and self._makes_new(user) for user in others)

    def _makes_new(self, node: fx.Node) -> bool:
        return node.target in self.found.makers or kind_of(node) in FRESH or node.target is excited or _pools(node)

    def _replace(self, chain: list[fx.Node], maker: Maker, args: tuple[Any, ...], weights: Any) -> None:
        """Put a module in place of the last node of the chain and take the chain out."""
        last, first = chain[-1], operation(chain[0])
        name = f"folded_{len(self.found.makers)}"
        self.found.makers[name] = maker
        self.found.module.add_module(name, nn.Module())  # until it is made
        self.found.weights |= {node.name: node for node in weights if isinstance(node, fx.Node)}
        with self.graph.inserting_after(last):
            new = self.graph.call_module(name, args)
        new.meta = dict(last.meta) | {"site": name_of(chain[0])}
        new.meta["pointwise"] = len(chain) < 3 and first is not None and first.kind == "conv" and _is_pointwise(first)
        self.order.replace(last, new)
        last.replace_all_uses_with(new)
        for node in reversed(chain):
            self.graph.erase_node(node)
        self.fresh.add(new)


def _convolution(chain: _Chain, backend: str) -> Callable[[Values], FoldedConv2d]:
    """What makes the folded convolution of a chain from the weights."""
    c, norm, inner = chain.conv, chain.norm, chain.inner

    def maker(values: Values) -> FoldedConv2d:
        stride, padding, dilation = (_pair(c.values[name]) for name in ("stride", "padding", "dilation"))
        conv: Any = Convolution(values(c.weight).detach(), values(c.bias), stride, padding, dilation, c.groups)
        frozen = None if norm is None else _frozen_norm(norm.values, values)
        return FoldedConv2d(conv, frozen, inner, backend)

    return maker


def _tail(conv: Callable[[Values], FoldedConv2d], gate: Gate, relu: bool, overwrites: bool, backend: str) -> Maker:
    return lambda values: FoldedTail(conv(values), _excitation(gate, values), relu, overwrites, backend)


def _sum(conv: Callable[[Values], FoldedConv2d], relu: bool, overwrites: bool) -> Maker:
    return lambda values: FoldedSum(conv(values), relu, overwrites)


def _frozen_norm(of: dict[str, Any], values: Values) -> Any:
    mean, var, weight, bias = (values(of[name]) for name in ("running_mean", "running_var", "weight", "bias"))
    return FrozenNorm(mean, var, weight, bias, of["eps"])


def _linear(weight: Any, bias: Any) -> Maker:
    def maker(values: Values) -> nn.Module:
        fc: Any = FC(values(weight), values(bias))
        return FoldedLinear(fc)

    return maker


def _excitation(gate: Gate, values: Values) -> FullyConnected:
    """The excitation of a gate with the current weights, its norm folded in."""
    w1, b1 = values(gate.w1).detach(), values(gate.b1)
    if gate.norm is not None:
        mean, var, weight, bias, eps = gate.norm
        norm = FrozenNorm(values(mean), values(var), values(weight), values(bias), eps)
        fc: Any = FC(w1, b1)
        w1, b1 = early_gate.fold_norm(fc, norm)
    return FullyConnected(w1, b1, values(gate.w2), values(gate.b2), gate.gate, gate.activation)


def _weights_of(gate: Gate) -> list[Any]:
    return [gate.w1, gate.b1, gate.w2, gate.b2, *(() if gate.norm is None else gate.norm[:4])]


def _is_constant(node: Any) -> bool:
    return node is None or is_weight(node)


def _is_number(value: Any) -> bool:
    """Whether a number, or each of several, is known: Dynamo makes those that have changed inputs of the graph."""
    several = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(each, (int, float)) for each in several)


def _is_constant_gate(gate: Gate) -> bool:
    """Whether its weights are those of the network, and not computed (by a parametrization, say)."""
    return all(map(_is_constant, _weights_of(gate))) and (gate.norm is None or _is_number(gate.norm[-1]))


def _is_foldable(conv: Operation) -> bool:
    weight, x = value_of(conv.weight), value_of(conv.x)
    if not is_weight(conv.weight) or not _is_constant(conv.bias) or not isinstance(x, Tensor) or x.ndim != 4:
        return False
    if not all(_is_number(conv.values[name]) for name in ("stride", "padding", "dilation", "groups")):
        return False
    return isinstance(weight, Tensor) and weight.is_floating_point()


def _is_frozen(norm: Operation) -> bool:
    """Whether it is a batch norm with running statistics."""
    if norm.kind != "batch_norm" or norm.training is not False or norm.running_mean is None:
        return False
    if not _is_number(norm.eps):
        return False
    return all(_is_constant(norm.values[name]) for name in ("running_mean", "running_var", "weight", "bias"))


def _is_pointwise(conv: Operation) -> bool:
    ones = all(_pair(conv.values[name]) == (1, 1) for name in ("stride",)) and conv.groups == 1
    return tuple(value_of(conv.weight).shape[2:]) == (1, 1) and ones and _pair(conv.padding) == (0, 0)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, *rest = value
    return int(first), int(rest[0] if rest else first)


def _added_to(addition: Any, branch: fx.Node) -> fx.Node | None:
    """The other map of an addition of two; None for other nodes."""
    found = operation(addition)
    if found is None or found.kind != "add" or found.writes or found.alpha != 1:
        return None
    pair = (found.x, found.y)
    others = [value for value in pair if value is not branch]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or not isinstance(value_of(others[0]), Tensor):
        return None
    return others[0]


def _pools(node: fx.Node) -> bool:
    """Whether the node is a pooling, which makes a map of its own."""
    target: Any = node.target
    functional = torch.nn.functional
    known = (torch.max_pool2d, functional.max_pool2d, functional.avg_pool2d, torch.ops.aten.max_pool2d.default)
    return node.op == "call_function" and target in known
