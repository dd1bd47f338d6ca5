"""Recognizes modules of other libraries: gates as an excitation, norms as a norm and its activation.

``find_gates`` finds candidates by their parts. Here, they are verified: a copy with random weights, in float64, must
return the same as equation 3 with these weights. So a gate that also uses a max pool, divides by something, or drops
channels is never mistaken for one that does not, whatever the name of its class. Subclasses of batch norm are
verified in the same way, as batch norm followed by an activation.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from senet.acceleration.modules import ACTIVATIONS
from senet.nn.plain import has_own_hooks, is_plain_fc
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite
from senet.ops import reference
from senet.ops.conv.early_gate import fold_norm
from senet.ops.reference import FullyConnected
from senet.surgery.find_gates import Gate
from senet.text import first_line

NOT_PLAIN = "its FCs are not plain layers, or have hooks, so they must be called"
_SAME = 1e-10  # relative, in float64


class UnknownGateError(Exception):
    """Why a gate has no fast form, in a few words."""


class ForeignGate:
    """A gate of another library whose function is known: two FCs, ``activation`` between them, ``gate_name`` behind.

    Args:
        gate: a gate of kind ``"two-fc"`` from ``find_gates``.

    Raises:
        UnknownGateError: it computes something else.
    """

    def __init__(self, gate: Gate) -> None:
        self.fc1, self.fc2, self.norm = _parts(gate.module)
        if any(map(has_own_hooks, gate.module.modules())) or not (is_plain_fc(self.fc1) and is_plain_fc(self.fc2)):
            raise UnknownGateError(NOT_PLAIN)
        probe, x = _randomised(gate.module), _probe(gate.channels)
        self.gate_name, self.activation = self._functions(probe, x)
        self.trains = self.norm is None and self.activation == "relu" and self._agrees(probe.train(), x)

    def _functions(self, probe: nn.Module, x: Tensor) -> tuple[str, str]:
        for self.activation in reference.ACTIVATIONS:
            for self.gate_name in reference.GATES:
                if self._agrees(probe, x):
                    return self.gate_name, self.activation
        raise UnknownGateError("it is not gate(FC(activation(FC(average)))) with supported functions")

    def _agrees(self, probe: nn.Module, x: Tensor) -> bool:
        expected = reference.scale(x, _fully_connected(*_parts(probe), self.gate_name, self.activation)(x.mean((2, 3))))
        return _same(_called(probe, x), expected)

    def fully_connected(self) -> FullyConnected:
        """The excitation of the evaluated gate, its norm folded in."""
        return _fully_connected(self.fc1, self.fc2, self.norm, self.gate_name, self.activation)

    def as_block(self) -> SqueezeExcite | None:
        """This package's block on the very same FCs, for training; None where it is not what it was then."""
        if not self.trains or not (is_plain_fc(self.fc1) and is_plain_fc(self.fc2)):
            return None
        weight: Any = self.fc1.weight
        config = SEConfig(hidden=weight.shape[0], gate=self.gate_name.removeprefix("identity_"))
        with torch.device("meta"):
            block = SqueezeExcite(weight.shape[1], config)
        block.fc1, block.fc2, block.gate_name = self.fc1, self.fc2, self.gate_name  # type: ignore[assignment] # foreign layers
        return block


def norm_and_activation(module: nn.Module | None) -> tuple[nn.Module, str | None] | None:
    """What a subclass of ``nn.BatchNorm2d`` is when evaluated: the norm, and the activation that it calls behind it.

    None where it computes something else, or with an activation that is not known.
    """
    if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None or module.training:
        return None
    if type(module) is nn.BatchNorm2d:
        return module, None
    probe, x = _randomised(module), _probe(module.num_features)
    y = nn.BatchNorm2d.forward(probe, x)  # type: ignore[arg-type] # a subclass at run time
    try:
        got = _called(probe, x)
    except UnknownGateError:
        return None
    if _same(got, y):
        return module, None
    return next(((module, name) for name, (f, *_) in ACTIVATIONS.items() if _same(got, f(y.clone()))), None)


def _parts(module: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """The two FCs, in the order in which they are called, and the norm between them."""
    weighted = [part for part in module.modules() if not any(part.children()) and any(True for _ in part.parameters())]
    fcs: list[Any] = [part for part in weighted if isinstance(part, (nn.Linear, nn.Conv2d))]
    norms = [part for part in weighted if part not in fcs]
    if len(fcs) != 2 or len(norms) > 1:
        raise UnknownGateError("its excitation does not consist of two fully connected layers on a 2-D feature map")
    if norms and not isinstance(norms[0], nn.modules.batchnorm._BatchNorm):
        raise UnknownGateError(f"its excitation contains a {type(norms[0]).__name__}")
    fcs.sort(key=lambda fc: fc.weight.shape[0])  # C → R comes before R → C; where R is C, as they are registered
    return fcs[0], fcs[1], norms[0] if norms else None


def _fully_connected(fc1: Any, fc2: Any, norm: Any, gate: str, activation: str) -> FullyConnected:
    w1, b1 = fc1.weight, fc1.bias
    if norm is not None:
        w1, b1 = fold_norm(fc1, norm)
    return FullyConnected(w1, b1, fc2.weight, fc2.bias, gate, activation)


def _randomised(module: nn.Module) -> nn.Module:
    """A copy on the CPU in float64, with weights that hide nothing: a last FC of zeros would agree with anything."""
    twin: Any = copy.deepcopy(module).to("cpu", torch.float64).eval()
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            if not tensor.is_floating_point():
                continue
            scale = 2 / math.sqrt(max(1, tensor[0].numel())) if tensor.ndim > 1 else 1.0
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu") * scale)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return twin


def _probe(channels: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(2, channels, 3, 2, generator=generator, dtype=torch.float64, device="cpu")
    return 4 * x  # its averages are of size 1 or so


def _called(module: nn.Module, x: Tensor) -> Any:
    try:
        with torch.no_grad():
            return module.forward(x.clone())
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UnknownGateError(f"it cannot be called with only a feature map: {first_line(error)}") from error


def _same(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=_SAME, atol=_SAME)
