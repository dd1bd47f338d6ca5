"""From a network's graph to its inference form: norms folded, gates early, sums in the convolution before them."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from senet.errors import InputError
from senet.nn.folded import FoldedConv2d, FoldedGate, FoldedSum, FoldedTail
from senet.nn.squeeze_excite import SqueezeExcite

_ADDITIONS: tuple[Any, ...] = ("add", "add_", torch.add, operator.add, operator.iadd)
_RELUS: tuple[Any, ...] = ("relu", "relu_", torch.relu, torch.relu_, F.relu)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SqueezeExcite) or super().is_leaf_module(m, module_qualified_name)


def folded(model: nn.Module, backend: str) -> fx.GraphModule:
    """The evaluation form of ``model`` as a graph with modules of its own; ``model`` is in eval mode and not changed.

    Raises:
        InputError: the network cannot be traced by torch.fx.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"accelerate: torch.fx cannot trace {type(model).__name__}, whose path depends on its data: {reason}"
        ) from error
    module = fx.GraphModule(model, graph, type(model).__name__)
    _Folding(module, backend).run()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


class _Folding:
    """Walks the graph once; each convolution takes in what follows it as long as nobody else reads between."""

    def __init__(self, module: fx.GraphModule, backend: str) -> None:
        self.module, self.backend = module, backend
        self.modules = dict(module.named_modules())
        self.fresh: set[fx.Node] = set()  # nodes whose output is a map of their own, which a sum may overwrite

    def run(self) -> None:
        for node in list(self.module.graph.nodes):
            called = self._called(node)
            if isinstance(called, nn.Conv2d) and _is_plain(called):
                self._fold(node, called)
            elif isinstance(called, nn.MaxPool2d):
                self.fresh.add(node)
        for node in list(self.module.graph.nodes):
            called = self._called(node)
            if type(called) is SqueezeExcite and called.config.squeeze == "avg":
                self._replace([node], FoldedGate(called, called.fc1.weight.dtype, self.backend), node.args)

    def _fold(self, node: fx.Node, conv: nn.Conv2d) -> None:
        chain = [node]
        norm = self._take(chain, lambda m: isinstance(m, nn.BatchNorm2d) and m.running_mean is not None)
        se = self._take(chain, lambda m: type(m) is SqueezeExcite and m.config.squeeze == "avg")
        shortcut = self._take_sum(chain)
        activation = self._take_activation(chain, bounded=se is None and shortcut is None)
        source = node.args[0]
        inner = None if se is not None or shortcut is not None else activation
        folded_conv = FoldedConv2d(conv, norm, inner, self.backend)
        relu = activation is not None
        if se is not None:
            args = (source,) if shortcut is None else (source, shortcut)
            self._replace(chain, FoldedTail(folded_conv, se, relu, self.backend), args)
        elif shortcut is not None:
            overwrites = shortcut in self.fresh and self._is_last_reader(shortcut, chain)
            self._replace(chain, FoldedSum(folded_conv, relu, overwrites), (source, shortcut))
        else:
            self._replace(chain, folded_conv, (source,))

    def _called(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _next(self, chain: list[fx.Node]) -> fx.Node | None:
        users = list(chain[-1].users)
        return users[0] if len(users) == 1 else None

    def _take(self, chain: list[fx.Node], wanted: Callable[[nn.Module], bool]) -> Any:
        """Append the next node to the chain if it calls a module that is wanted; returns that module."""
        user = self._next(chain)
        called = None if user is None else self._called(user)
        if user is None or called is None or not wanted(called):
            return None
        chain.append(user)
        return called

    def _take_sum(self, chain: list[fx.Node]) -> fx.Node | None:
        """Append the addition of another map of the network, which it returns."""
        user = self._next(chain)
        if user is None or user.op not in ("call_method", "call_function") or user.target not in _ADDITIONS:
            return None
        others = [arg for arg in user.args if isinstance(arg, fx.Node) and arg is not chain[-1]]
        if len(others) != 1 or len(user.args) != 2 or user.kwargs:
            return None
        # The last of two branches takes the sum: the other one's map is there to be overwritten.
        if not any(node is others[0] for node in self._before(chain[0])):
            return None
        chain.append(user)
        return others[0]

    def _take_activation(self, chain: list[fx.Node], bounded: bool) -> nn.Module | None:
        user = self._next(chain)
        if user is None:
            return None
        if user.op in ("call_method", "call_function") and user.target in _RELUS:
            chain.append(user)
            return nn.ReLU(inplace=True)
        return self._take(chain, lambda m: type(m) is nn.ReLU or (bounded and type(m) is nn.ReLU6))

    def _before(self, node: fx.Node) -> list[fx.Node]:
        nodes = list(self.module.graph.nodes)
        return nodes[: nodes.index(node)]

    def _is_last_reader(self, shortcut: fx.Node, chain: list[fx.Node]) -> bool:
        """Whether all other readers of the shortcut have run before the end of the chain does."""
        order = {node: index for index, node in enumerate(self.module.graph.nodes)}
        return all(order[user] < order[chain[-1]] for user in shortcut.users if user is not chain[-1])

    def _replace(self, chain: list[fx.Node], module: nn.Module, args: tuple[Any, ...]) -> None:
        """Put ``module`` in place of the last node of the chain and take the chain out."""
        graph, last = self.module.graph, chain[-1]
        name = f"folded_{len(self.fresh)}_{str(chain[0].target).replace('.', '_')}"
        self.module.add_submodule(name, module)
        with graph.inserting_after(last):
            new = graph.call_module(name, args)
        last.replace_all_uses_with(new)
        for node in reversed(chain):
            graph.erase_node(node)
        self.fresh.add(new)


def _is_plain(conv: nn.Conv2d) -> bool:
    return type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
