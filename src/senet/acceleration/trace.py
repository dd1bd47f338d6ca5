"""Tracing of a network with torch.fx, for both forms of an accelerated network, and helpers for graph nodes."""

import inspect
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from senet.errors import InputError
from senet.nn.squeeze_excite import SqueezeExcite
from senet.text import first_line

SUMS: tuple[Any, ...] = ("add", torch.add, operator.add)  # a new map
ADDITIONS = (*SUMS, "add_", operator.iadd)
RELUS: tuple[Any, ...] = ("relu", "relu_", torch.relu, torch.relu_, F.relu)
_DROPS = ("dropout", "feature_dropout", "dropout2d", "dropout3d", "alpha_dropout", "stochastic_depth")


class _Tracer(fx.Tracer):
    """Does not look into gates, nor into what derives from a convolution or a norm; in training into no drop either."""

    def __init__(self, gates: set[str], training: bool) -> None:
        super().__init__()
        self.gates, self.training = gates, training

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (SqueezeExcite, nn.Conv2d, nn.BatchNorm2d)) or module_qualified_name in self.gates:
            return True
        draws = self.training and not any(m.children()) and not any(True for _ in m.parameters(recurse=False))
        return draws or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Only what a call must give is a symbol: to a symbol, ``if mask is not None`` is always true."""
        names = required(root_fn)
        if names is None:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names[1:])]


def required(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """The arguments without a default; None where there is no telling by the signature."""
    names = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL or parameter.kind is parameter.VAR_KEYWORD:
            return None
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                return None
            names.append(parameter.name)
    return tuple(names)


@contextmanager
def _leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Modules that keep a map of their last run do not keep a symbol; random generators are as they were.

    Raises:
        ValueError: random numbers were drawn, which would be the same ones in each run of a graph.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        for now, then in before:  # key by key: other threads may be running the network
            for key in [key for key in now if key not in then]:
                del now[key]
            now.update({key: value for key, value in then.items() if now.get(key) is not value})
        drawn = not torch.equal(states[0], torch.get_rng_state()) or states[1] != random.getstate()
        torch.set_rng_state(states[0])
        random.setstate(states[1])
    if drawn:
        raise ValueError("it draws random numbers outside of modules such as nn.Dropout")


def traced(model: nn.Module, gates: set[str]) -> fx.GraphModule:
    """The graph of ``model`` in the mode that it is in, on its own modules; ``gates`` are modules to keep whole.

    Raises:
        InputError: the network cannot be traced by torch.fx.
    """
    try:
        with _leaving_no_trace(model):
            graph = _Tracer(gates, model.training).trace(model)
            # Within, while the network still has the constants that tracing gave it.
            module = fx.GraphModule(model, graph, type(model).__name__)
    except Exception as error:
        kind = type(model).__name__
        raise InputError(
            f"accelerate: torch.fx cannot trace {kind} (data-dependent control flow?): {first_line(error)}"
        ) from error
    _call_by_position(module)
    return module


def _call_by_position(module: fx.GraphModule) -> None:
    """``norm(input=x)`` as ``norm(x)``, so that what a module takes is found in one place."""
    modules = dict(module.named_modules())
    for node in module.graph.nodes:
        called = called_module(modules, node)
        if called is not None and node.kwargs:
            bound = inspect.signature(called.forward).bind(*node.args, **node.kwargs)
            node.args, node.kwargs = bound.args, bound.kwargs


def take_out_identities(module: fx.GraphModule) -> None:
    """Take out what returns its input as it is: identities, and whatever drops in training when that is over."""
    modules = dict(module.named_modules())
    for node in list(module.graph.nodes):
        if _is_identity(node, called_module(modules, node)):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _is_identity(node: fx.Node, called: nn.Module | None) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if called is not None:
        drops = isinstance(called, nn.modules.dropout._DropoutNd) and not called.training
        return type(called) is nn.Identity or drops
    if node.op != "call_function" or getattr(node.target, "__name__", "") not in _DROPS:
        return False
    return node.kwargs.get("training", node.args[-1]) is False


def called_module(modules: dict[str, nn.Module], node: fx.Node | None) -> nn.Module | None:
    """The module that a node calls, None for other nodes."""
    return modules.get(str(node.target)) if node is not None and node.op == "call_module" else None


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that reads ``node``, where there is one alone."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def added_to(addition: fx.Node, branch: fx.Node) -> fx.Node | None:
    """The other map of an addition of two; None for other nodes."""
    if addition.op not in ("call_method", "call_function") or addition.target not in ADDITIONS:
        return None
    others = [arg for arg in addition.args if isinstance(arg, fx.Node) and arg is not branch]
    return others[0] if len(others) == 1 and len(addition.args) == 2 and not addition.kwargs else None


def order_of(module: fx.GraphModule) -> dict[fx.Node, int]:
    """Where each node stands in the run."""
    return {node: index for index, node in enumerate(module.graph.nodes)}
