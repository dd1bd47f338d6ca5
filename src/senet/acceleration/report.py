"""The gates that the fast forms support, and the report of ``senet.accelerate``."""

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from senet.acceleration.foreign import NOT_PLAIN, ForeignGate, UnknownGateError
from senet.nn.attachment import CHILD, INPUT, attached
from senet.nn.plain import has_own_hooks, is_plain_fc
from senet.nn.squeeze_excite import SqueezeExcite
from senet.surgery.find_gates import find_gates

Known = SqueezeExcite | ForeignGate
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")


@dataclass(frozen=True)
class Acceleration:
    """What was replaced and what was left unchanged, by the path of the gate's module.

    Attributes:
        inference: path → form of the gate in eval mode.
        training: the gates that are computed in the sweeps of their norm in training mode.
        left: path → reason why it is unchanged. Besides gates, it lists other products of two feature maps.
        ordinary_training: why training runs the ordinary network; None if it computes gates in sweeps.
    """

    inference: dict[str, str]
    training: tuple[str, ...]
    left: dict[str, str]
    ordinary_training: str | None

    def __str__(self) -> str:
        width = max(map(len, (*self.inference, *self.left)), default=0)
        lines = [
            f"{name:{width}}  {form}; training: {'fused with its norm' if name in self.training else 'unchanged'}"
            for name, form in self.inference.items()
        ]
        lines += [f"{name:{width}}  unchanged: {reason}" for name, reason in self.left.items()]
        counts = f"{len(self.inference)} gates replaced, {len(self.left)} unchanged"
        lines.append(f"{counts}; {len(self.training)} fused with their norms in training")
        return "\n".join(lines)


def known_gates(model: nn.Module) -> tuple[dict[str, Known], dict[str, str]]:
    """The gates of ``model`` whose function is known, by path, and path → reason for those that are not."""
    known: dict[str, Known] = {}
    left: dict[str, str] = {}
    for gate in find_gates(model):
        if isinstance(gate.module, SqueezeExcite):
            reason = _why_left(gate.module)
            if reason is None:
                known[gate.name] = gate.module
            else:
                left[gate.name] = reason
        elif gate.kind != "two-fc":
            left[gate.name] = "effective SE: its excitation is a single layer"
        else:
            try:
                known[gate.name] = ForeignGate(gate)
            except UnknownGateError as error:
                left[gate.name] = str(error)
    return known, left


def _why_left(gate: SqueezeExcite) -> str | None:
    if gate.config.squeeze != "avg":
        return f"its squeeze is {gate.config.squeeze!r}"
    if type(gate) is not SqueezeExcite:
        return "it is a subclass of SE"
    return None if is_plain_fc(gate.fc1) and is_plain_fc(gate.fc2) and not has_own_hooks(gate) else NOT_PLAIN


def own_names(model: nn.Module) -> dict[str, str]:
    """Path in ``in_line(model)`` → path in ``model``, of the gates that are attached."""
    names = {}
    for site in attached(model):
        path = site.removesuffix(INPUT)
        names[f"{path}.{0 if site.endswith(INPUT) else 1}"] = f"{path}.{CHILD}"
    return names


def products(graph: fx.Graph) -> dict[str, str]:
    """Path of a module → that it multiplies maps, for all that is left in a traced graph."""
    found = {}
    for node in graph.nodes:
        factors = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if node.op in ("call_function", "call_method") and node.target in _PRODUCTS and len(factors) == 2:
            path = next(reversed(node.meta.get("nn_module_stack") or {"": None}))
            found[path or "forward"] = "it multiplies feature maps, but not with a supported gate"
    return found
