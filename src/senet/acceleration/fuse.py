"""Turns the graph of a network into its inference form: folded norms, early gates, and additions in epilogues."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from senet.acceleration.foreign import norm_and_activation
from senet.acceleration.modules import FoldedConv2d, FoldedGate, FoldedLinear, FoldedSum, FoldedTail
from senet.acceleration.trace import (
    RELUS,
    SUMS,
    added_to,
    called_module,
    only_user,
    order_of,
    take_out_identities,
    traced,
)
from senet.nn.plain import is_plain
from senet.ops.conv.native import PackedLinear
from senet.ops.reference import FullyConnected

EARLY, LATE = "early gate", "late gate, one sweep"
PROJECTED, ALONE = "in place, before the projection", "by itself"

_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys(RELUS, "relu"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_MODULES: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}

# What returns memory of its own and no view of what it reads.
_NEW_MAPS = (FoldedConv2d, FoldedSum, FoldedTail, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)


def folded(
    model: nn.Module, backend: str, excitations: dict[str, FullyConnected]
) -> tuple[fx.GraphModule, dict[str, str]]:
    """The evaluation form of ``model``, and the form of each gate in it; ``model`` is in eval mode and not changed.

    Args:
        model: what is traced.
        backend: one of ``early_gate.BACKENDS``.
        excitations: path of a gate's module → what it computes, for the gates that are replaced.

    Returns:
        A graph with modules of its own, and path → one of this module's names of forms.

    Raises:
        InputError: the network cannot be traced by torch.fx.
    """
    module = traced(model, set(excitations))
    take_out_identities(module)
    folding = _Folding(module, backend, excitations)
    folding.run()
    module.delete_all_unused_submodules()
    module.recompile()
    return module, folding.forms


@dataclass
class _Chain:
    """Nodes that follow one another with no other reader between, and what they are."""

    nodes: list[fx.Node]
    norm: nn.Module | None = None
    inner: str | None = None  # the activation of the convolution itself
    gate: str | None = None
    shortcut: fx.Node | None = None
    relu: bool = False  # behind the gate or the sum


class _Folding:
    """Walks the graph once; each convolution takes in what follows it as long as nobody else reads between."""

    def __init__(self, module: fx.GraphModule, backend: str, excitations: dict[str, FullyConnected]) -> None:
        self.module, self.backend, self.excitations = module, backend, excitations
        self.modules = dict(module.named_modules())
        self.fresh: set[fx.Node] = set()  # nodes whose output is a map of their own, which may be overwritten
        self.forms: dict[str, str] = {}

    def run(self) -> None:
        for node in list(self.module.graph.nodes):
            called = self._called(node)
            if isinstance(called, nn.Conv2d) and _is_plain(called):
                self._fold(self._chain(node), called)
            elif type(called) is nn.Linear and self._is_packed(called):
                self._replace([node], FoldedLinear(called), node.args)
            elif isinstance(called, (nn.MaxPool2d, nn.BatchNorm2d)):
                self.fresh.add(node)
        for node in list(self.module.graph.nodes):
            if node.op == "call_module" and node.target in self.excitations:
                self._fold_gate(node)

    def _is_packed(self, linear: nn.Linear) -> bool:
        """Whether a linear layer is faster packed, and may be."""
        return self.backend == "native" and is_plain(linear) and PackedLinear.why_not(linear.weight) is None

    def _called(self, node: fx.Node | None) -> nn.Module | None:
        return called_module(self.modules, node)

    def _chain(self, node: fx.Node) -> _Chain:
        chain = _Chain([node])
        user = only_user(node)
        found = norm_and_activation(self._called(user))
        if user is not None and found is not None:
            chain.nodes.append(user)
            chain.norm, chain.inner = found
        if chain.inner is None:
            chain.inner = self._take_activation(chain)
        # Behind an activation a gate that nothing is added to is left to `_fold_gate`.
        if self._take_gate(chain) or chain.inner is None:
            self._take_sum(chain)
            if chain.gate is not None or chain.shortcut is not None:
                chain.relu = self._take_activation(chain, only="relu") is not None
        return chain

    def _take_gate(self, chain: _Chain) -> bool:
        user = only_user(chain.nodes[-1])
        if user is None or not self._is_gated(user):
            return False
        after = only_user(user)
        if chain.inner is not None and (after is None or added_to(after, user) is None):
            return False
        chain.nodes.append(user)
        chain.gate = str(user.target)
        return True

    def _take_sum(self, chain: _Chain) -> None:
        """Append the addition of another map of the network."""
        user = only_user(chain.nodes[-1])
        other = None if user is None else added_to(user, chain.nodes[-1])
        if user is None or other is None:
            return
        # A gated branch takes its sum. Of two others the last does: the first one's map is there to be overwritten.
        order = order_of(self.module)
        if chain.gate is None and (order[other] > order[chain.nodes[0]] or self._is_gated(other)):
            return
        chain.nodes.append(user)
        chain.shortcut = other

    def _is_gated(self, node: fx.Node) -> bool:
        return node.op == "call_module" and node.target in self.excitations

    def _take_activation(self, chain: _Chain, only: str | None = None) -> str | None:
        user = only_user(chain.nodes[-1])
        if user is None:
            return None
        if user.op == "call_module":
            name = _MODULES.get(type(self._called(user)))
        else:
            others = (*user.args[1:], *user.kwargs.values())
            name = _FUNCTIONS.get(user.target) if all(isinstance(value, bool) for value in others) else None
        if name is not None and only in (None, name):
            chain.nodes.append(user)
            return name
        return None

    def _fold(self, chain: _Chain, conv: nn.Conv2d) -> None:
        source, relu = chain.nodes[0].args[0], chain.relu
        overwrites = self._may_overwrite(chain)
        folded_conv = FoldedConv2d(conv, chain.norm, chain.inner, self.backend)
        if chain.gate is not None:
            tail = FoldedTail(folded_conv, self.excitations[chain.gate], relu, overwrites, self.backend)
            self.forms[chain.gate] = EARLY if tail.early else LATE
            self._replace(chain.nodes, tail, (source,) if chain.shortcut is None else (source, chain.shortcut))
        elif chain.shortcut is not None:
            self._replace(chain.nodes, FoldedSum(folded_conv, relu, overwrites), (source, chain.shortcut))
        else:
            self._replace(chain.nodes, folded_conv, (source,))

    def _may_overwrite(self, chain: _Chain) -> bool:
        """Whether the chain may write its result over its shortcut, which its convolution must not read meanwhile."""
        shortcut = chain.shortcut
        if shortcut is None or shortcut not in self.fresh or shortcut is chain.nodes[0].args[0]:
            return False
        return self._is_last_reader(shortcut, chain.nodes)

    def _fold_gate(self, node: fx.Node) -> None:
        name, (source, *_) = str(node.target), node.args
        excitation = self.excitations[name]
        user = only_user(node)
        conv = getattr(self._called(user), "conv", self._called(user))
        self.forms[name] = PROJECTED if isinstance(conv, FoldedConv2d) and conv.is_pointwise else ALONE
        overwrites = isinstance(source, fx.Node) and source in self.fresh and self._is_last_reader(source, [node])
        gate = FoldedGate(excitation, excitation.w1.dtype, overwrites, self.backend)
        self._replace([node], gate, node.args)

    def _is_last_reader(self, map_node: fx.Node, chain: list[fx.Node]) -> bool:
        """Whether all readers of a map outside of the chain run before its end does, and keep no view of it."""
        order = order_of(self.module)
        others = [user for user in map_node.users if user not in chain]
        return all(order[user] < order[chain[-1]] and self._makes_new(user) for user in others)

    def _makes_new(self, node: fx.Node) -> bool:
        called = self._called(node)
        return isinstance(called, _NEW_MAPS) or (called is None and node.target in SUMS)

    def _replace(self, chain: list[fx.Node], module: nn.Module, args: tuple[Any, ...]) -> None:
        """Put ``module`` in place of the last node of the chain and take the chain out."""
        graph, last = self.module.graph, chain[-1]
        name = f"folded_{len(self.fresh)}_{str(chain[0].target).replace('.', '_')}"
        self.module.add_submodule(name, module)
        self.modules[name] = module
        with graph.inserting_after(last):
            new = graph.call_module(name, args)
        last.replace_all_uses_with(new)
        for node in reversed(chain):
            graph.erase_node(node)
        self.fresh.add(new)


def _is_plain(conv: nn.Conv2d) -> bool:
    return is_plain(conv) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
