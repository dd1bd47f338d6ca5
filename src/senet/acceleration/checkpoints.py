"""Runs the parts of captured graphs that are under ``torch.utils.checkpoint``.

Dynamo captures a checkpointed part as one call of an operator, whose first argument is the graph of that part. Run as
it is, the operator saves all inputs of the part, buffers that the part writes among them, and its backward pass fails.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

_CAPTURED: Any = torch.ops.higher_order.tag_activation_checkpoint


def checkpointed(body: Any, *args: Any, **kwargs: Any) -> Any:
    """``checkpoint(body, *args)``, which saves only those inputs that require a gradient."""
    options, own = _CAPTURED.divide_kwargs(kwargs)
    differentiable = [isinstance(arg, Tensor) and arg.requires_grad for arg in args]

    def run(*given: Any) -> Any:
        rest = iter(given)
        return body(*(next(rest) if of else arg for of, arg in zip(differentiable, args, strict=True)), **own)

    return checkpoint(run, *(arg for of, arg in zip(differentiable, args, strict=True) if of), **options)


def run_checkpoints(module: fx.GraphModule) -> None:
    """Let a graph that is run with gradients, and the graphs in it, call ``checkpointed``."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            found = part.graph.find_nodes(op="call_function", target=_CAPTURED)
            for node in found:
                node.target = checkpointed
            if found:
                part.recompile()


def take_in_checkpoints(module: fx.GraphModule) -> None:
    """Put the nodes of checkpointed parts into a graph that is run without gradients, where nothing is saved."""
    while found := module.graph.find_nodes(op="call_function", target=_CAPTURED):
        taken = [_taken_in(module, node) for node in found]  # all of them, whatever the first says
        if not all(taken):
            break
    module.recompile()


def _taken_in(module: fx.GraphModule, node: fx.Node) -> bool:
    name: Any = node.args[0]
    body = module.get_submodule(str(name.target))
    _, own = _CAPTURED.divide_kwargs(node.kwargs)
    if own or not isinstance(body, fx.GraphModule) or any(user.target is not operator.getitem for user in node.users):
        return False
    copies: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True))
    with module.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "get_attr":
                inner_name = f"{name.target}_{inner.target}".replace(".", "_")
                setattr(module, inner_name, operator.attrgetter(str(inner.target))(body))
                copies[inner] = module.graph.get_attr(inner_name)
            elif inner.op not in ("placeholder", "output"):
                copies[inner] = module.graph.node_copy(inner, copies.__getitem__)
    results: Any = fx.map_arg(body.graph.output_node().args[0], copies.__getitem__)
    for user in list(node.users):
        index: Any = user.args[1]
        user.replace_all_uses_with(results[index])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    return True
