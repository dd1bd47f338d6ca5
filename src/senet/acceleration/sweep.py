"""The training pass: norm, gate, shortcut, and ReLU become one call of ``tail``, which works in sweeps.

The pass only groups operations. Which form computes a group is decided at each call, by device, dtype, and size
(``senet.ops.tail.choice``); a small feature map takes the same operations as before.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from senet.acceleration.gates import Gate, gate_at, lift_gates
from senet.acceleration.operations import (
    Operation,
    Order,
    kind_of,
    name_of,
    only_user,
    operation,
    take_out_idle,
    value_of,
    with_private_writes,
    without_private_writes,
)
from senet.acceleration.report import AS_CAPTURED, Decision
from senet.ops.reference import FullyConnected
from senet.ops.tail.choice import Choice, foresee
from senet.ops.tail.norms import BatchNorm, GroupNorm, Norm
from senet.ops.tail.reasons import Reason
from senet.ops.tail.tail import tail

APART = "it does not follow a norm that only it reads"


def training_form(module: fx.GraphModule, backend: str) -> tuple[fx.GraphModule, list[Decision]]:
    """A copy of a captured graph that computes in sweeps, and what was decided for its gates and norms.

    Args:
        module: the captured graph; parameters and buffers are placeholders.
        backend: as for ``senet.ops.tail.choice.choose``; ``"traced"`` if a compiler gets the graph.
    """
    graph = copy.deepcopy(module.graph)
    work = fx.GraphModule(module, graph)
    take_out_idle(graph)
    without_private_writes(graph)
    left = lift_gates(graph)
    decisions = sweep(graph, backend)
    with_private_writes(graph)
    for name, part in module.named_children():
        if isinstance(part, fx.GraphModule):  # under checkpoint
            swept, inside = training_form(part, backend)
            setattr(work, name, swept)
            decisions += inside
    work.recompile()
    decisions += [Decision(name, "training", AS_CAPTURED, "torch", why) for name, why in left.items()]
    return work, decisions


@dataclass
class _Group:
    """A norm, or a gate without one, and what follows with no other reader between."""

    x: fx.Node
    norm: Operation | None
    nodes: list[fx.Node]
    gate: Gate | None = None
    shortcut: fx.Node | None = None
    shortcut_norm: Operation | None = None
    relu: bool = False
    also: list[fx.Node] = field(default_factory=list)  # the node of the shortcut's norm

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def name(self) -> str:
        return name_of(self.nodes[0]) if self.gate is None else self.gate.name


def sweep(graph: fx.Graph, backend: str) -> list[Decision]:
    """Group the operations of a captured graph in place, as they are after ``lift_gates``; see ``training_form``."""
    order, decisions = Order(graph), []
    groups = {node: group for node in graph.nodes if (group := _begin(node, backend)) is not None}
    for group in groups.values():
        _take_gate(group, order)
    taken = {group.end for group in groups.values()}
    groups |= {node: group for node in graph.nodes if node not in taken and (group := _begin_gate(node)) is not None}
    for node in [node for node in graph.nodes if kind_of(node) == "add"]:
        _take_sum(node, groups, order, backend)
    for group in groups.values():
        _take_relu(group, order)
    joined = {node for group in groups.values() for node in group.also}
    replaced: dict[fx.Node, fx.Node] = {}
    for node, group in groups.items():
        if node not in joined and _is_worth_it(group, backend):
            decisions.append(_replace(graph, group, backend, replaced))
    apart = (gate.name for node in graph.nodes if (gate := gate_at(node)) is not None)
    return decisions + [Decision(name, "training", AS_CAPTURED, "torch", APART) for name in apart]


def _begin(node: fx.Node, backend: str) -> _Group | None:
    """The group of a norm that sweeps can compute."""
    found = operation(node)
    if found is None or found.kind not in ("batch_norm", "group_norm"):
        return None
    u = value_of(found.x)
    if not isinstance(u, Tensor) or not 3 <= u.ndim <= 5 or value_of(node).dtype != u.dtype:
        return None
    if found.kind == "batch_norm":
        if found.training is False and (backend == "traced" or found.running_mean is None):
            return None
        if found.training is False and backend == "auto" and u.device.type == "cpu":
            return None  # PyTorch's operations are faster
        if not isinstance(found.training, bool) or not _updates_alone(found):
            return None
    return _Group(found.x, found, [node])


def _begin_gate(node: fx.Node) -> _Group | None:
    """The group of a gate that does not follow a norm, such as that of a pre-activation block."""
    gate = gate_at(node)
    if gate is None or gate.norm is not None or kind_of(gate.x) in ("batch_norm", "group_norm"):
        return None
    x, y = value_of(gate.x), value_of(node)
    return _Group(gate.x, None, [node], gate) if x.dtype == y.dtype else None


def _updates_alone(norm: Operation) -> bool:
    """Whether nobody else reads or updates the running statistics that the norm updates."""
    statistics = (norm.running_mean, norm.running_var) if norm.training else ()
    return all(not isinstance(node, fx.Node) or only_user(node) is norm.node for node in statistics)


def _next(group: _Group, order: Order) -> fx.Node | None:
    """The only reader of the group, if the group may run where that node does."""
    user = only_user(group.end)
    if user is None or user not in order.position:
        return None
    return user if order.may_run_late((*group.nodes, *group.also, user)) else None


def _take_gate(group: _Group, order: Order) -> None:
    user = _next(group, order)
    gate = gate_at(user)
    if user is None or gate is None or gate.x is not group.end or gate.norm is not None:
        return
    group.nodes.append(user)
    group.gate = gate


def _take_sum(node: fx.Node, groups: dict[fx.Node, _Group], order: Order, backend: str) -> None:
    """Append an addition of two maps to the group of one of them: the gated one, or the first."""
    found = operation(node)
    if found is None or found.writes or found.alpha != 1 or found.x is found.y:
        return
    ends = {group.end: group for group in groups.values()}
    pairs = [(ends[x], y) for x, y in ((found.x, found.y), (found.y, found.x)) if x in ends]
    for group, other in sorted(pairs, key=lambda pair: pair[0].gate is None):
        if group.shortcut is not None or _next(group, order) is not node or not _are_alike(group.x, other, node):
            continue
        group.nodes.append(node)
        group.shortcut = other
        projection = ends.get(other)
        alone = projection is not None and len(projection.nodes) == 1
        if projection is not None and alone and backend != "traced" and _may_join(group, projection, node, order):
            group.shortcut, group.shortcut_norm, group.also = projection.x, projection.norm, [other]
        return


def _may_join(group: _Group, projection: _Group, node: fx.Node, order: Order) -> bool:
    """Whether the norm of a projection shortcut may run in the same call."""
    both = (group.norm, projection.norm)
    if not all(norm is not None and norm.kind == "batch_norm" and norm.training for norm in both):
        return False
    return _next(projection, order) is node and order.may_run_late((*group.nodes, *projection.nodes))


def _are_alike(u: fx.Node, other: Any, total: fx.Node) -> bool:
    """Whether the sum of two maps has the shape and dtype of both."""
    values = [value_of(node) for node in (u, other, total)]
    if not all(isinstance(value, Tensor) and value.dtype == values[0].dtype for value in values):
        return False
    return all(
        value.ndim == values[0].ndim
        and all(statically_known_true(a == b) for a, b in zip(value.shape, values[0].shape, strict=True))
        and value.device == values[0].device
        for value in values
    )


def _take_relu(group: _Group, order: Order) -> None:
    user = _next(group, order)
    found = operation(user)
    if user is not None and found is not None and found.kind == "relu" and not found.writes:
        group.nodes.append(user)
        group.relu = True


def _is_worth_it(group: _Group, backend: str) -> bool:
    """Whether sweeps save anything: compilers fuse a norm and a ReLU themselves, and a gate with what follows."""
    if group.norm is None:
        return group.shortcut is not None and backend != "traced"
    if group.gate is not None or group.shortcut is not None:
        return True
    return group.relu and backend != "traced"


def _replace(graph: fx.Graph, group: _Group, backend: str, replaced: dict[fx.Node, fx.Node]) -> Decision:
    """Put a call of ``tail`` in the place of the group's last node; ``replaced`` are the ends of earlier groups."""
    arguments = torch.fx.node.map_arg(_arguments(group), lambda node: replaced.get(node, node))
    u, norm, gate, shortcut, relu, shortcut_norm = arguments
    with graph.inserting_after(group.end):
        new = graph.call_function(tail, (u, norm, gate, shortcut, relu, backend, shortcut_norm))
    new.meta = dict(group.end.meta)
    replaced[group.end] = new
    group.end.replace_all_uses_with(new)
    for node in (*reversed(group.nodes), *group.also):
        graph.erase_node(node)
    chosen = _foreseen(arguments, backend)
    reason = None if chosen.reason is Reason.FASTEST else str(chosen.reason)
    return Decision(group.name, "training", str(chosen.form), chosen.backend, reason)


def _arguments(group: _Group) -> tuple[Any, ...]:
    """The arguments of ``tail`` but for the backend, as nodes and constants."""
    gate = group.gate
    excitation = None
    if gate is not None:
        excitation = FullyConnected(gate.w1, gate.b1, gate.w2, gate.b2, gate.gate, gate.activation)  # type: ignore[arg-type]
    other = None if group.shortcut_norm is None else _norm(group.shortcut_norm)
    norm = None if group.norm is None else _norm(group.norm)
    return group.x, norm, excitation, group.shortcut, group.relu, other


def _norm(found: Operation) -> Norm:
    if found.kind == "group_norm":
        return GroupNorm(found.weight, found.bias, found.num_groups, found.eps)
    statistics = found.running_mean, found.running_var
    return BatchNorm(found.weight, found.bias, *statistics, found.training, found.momentum, found.eps)


def _foreseen(arguments: tuple[Any, ...], backend: str) -> Choice:
    """The form for feature maps like the captured ones."""
    with FakeTensorMode():
        u, norm, gate, shortcut, relu, shortcut_norm = torch.fx.node.map_arg(arguments, _like)
        return foresee(u, norm, gate, shortcut, relu, backend, shortcut_norm)


def _like(node: fx.Node) -> Any:
    """A tensor without memory like the one that the node returned; symbolic sizes take the values that were seen."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return value

    def plain(numbers: Any) -> list[int]:
        return [n if isinstance(n, int) else n.node.hint for n in numbers]

    return torch.empty_strided(plain(value.shape), plain(value.stride()), dtype=value.dtype, device=value.device)
