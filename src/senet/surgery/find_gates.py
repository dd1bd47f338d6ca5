"""Finds SE gates in any network: ours by their class, those of other code by their structure.

Classes of other libraries are not used: they move, get renamed, and may not be installed. A module is an SE gate if it
consists of exactly the parts of equation 3: two pointwise layers C → R → C (1×1 convolutions or linear layers), at most
one norm between them, and a gate function that is a separate module; or one pointwise layer C → C (effective SE,
arXiv 1911.06667). This finds timm's ``SEModule``, ``SqueezeExcite``, and ``EffectiveSEModule``, torchvision's
``SqueezeExcitation``, those of Hugging Face, and most hand-written ones. Each candidate is verified when it runs: its
output must be gate · input.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from senet.errors import InputError
from senet.nn.squeeze_excite import SqueezeExcite
from senet.ops import reference

KINDS = ("senet", "two-fc", "one-fc")
_GATE_NAMES = ("gate", "sigmoid", "hsigmoid", "scale_activation")  # attribute names of the gate function in libraries
_FAR, _UNBOUNDED = 1e4, 100.0

Receive = Callable[[Tensor | None], None]


@dataclass(frozen=True)
class Gate:
    """An SE gate found in a network.

    Attributes:
        name: the path of its module, ``"layer1.0.se"``.
        kind: ``"senet"`` for this package's block; for other code, ``"two-fc"`` (C → R → C) or ``"one-fc"`` (C → C).
        channels: C.
        function: the name of the gate function, such as ``"sigmoid"``, ``"identity_sigmoid"``, or ``"Hardsigmoid"``.
        low, neutral, high: its values at −∞, 0, and ∞ (``inf`` if unbounded).
        module: the module, whose output is gate · input.
    """

    name: str
    kind: str
    channels: int
    function: str
    low: float
    neutral: float
    high: float
    module: nn.Module = field(repr=False, compare=False)
    _last: nn.Module | None = field(default=None, repr=False, compare=False)  # the gate function of another library

    @contextmanager
    def listening(self, receive: Receive) -> Iterator[None]:
        """Inside the context, pass the excitation (N, C) of every forward pass to ``receive``. Outputs do not change.

        For NoSqueeze, whose gate has spatial axes, it is the spatial mean. ``receive`` gets None if the output of the
        module is not gate · input, so it is not an SE gate after all.
        """
        with ExitStack() as hooks:
            if self._last is None:
                hooks.callback(self.module.register_forward_hook(_of_ours(receive), with_kwargs=True).remove)
            else:
                latest: deque[Tensor] = deque(maxlen=1)  # the gate function may be shared: keep only the last output
                keep = self._last.register_forward_hook(lambda module, args, output: latest.append(output))
                hooks.callback(keep.remove)
                check = _of_others(latest, self.channels, receive)
                hooks.callback(self.module.register_forward_hook(check, with_kwargs=True).remove)
            yield


def find_gates(model: nn.Module) -> list[Gate]:
    """The SE gates of a network, in module order; an empty list if there are none.

    ``model`` may be compiled, wrapped for several devices, or returned by ``senet.accelerate``. Names and modules are
    those of the network inside (see ``plain_network``). A module that is registered twice is listed once.

    Raises:
        InputError: ``model`` is not an ``nn.Module``, or is TorchScript, which cannot be inspected.
    """
    found: list[Gate] = []
    for name, module in plain_network(model).named_modules():
        gate = _own(name, module) if isinstance(module, SqueezeExcite) else _other(name, module)
        if gate is not None:
            found.append(gate)
    # A module that only wraps a gate has the same parts. The innermost is the gate.
    outer = {a.name for a in found for b in found if b is not a and b.name.startswith(f"{a.name}." if a.name else "")}
    return [gate for gate in found if gate.name not in outer]


def plain_network(model: nn.Module) -> nn.Module:
    """The network inside DDP, ``torch.compile``, and ``senet.accelerate``, in which every module is called.

    It shares all parameters with ``model``. The gates of an accelerated network agree with it up to rounding.

    Raises:
        InputError: ``model`` is not an ``nn.Module``, or is TorchScript.
    """
    inner: Any = model
    while isinstance(inner, nn.Module):
        if isinstance(inner, torch.jit.ScriptModule):
            raise InputError(
                "the network is TorchScript, whose gates cannot be inspected; pass the network it was made from"
            )
        if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        else:
            return inner
    raise InputError(f"expected a network, got {type(model).__name__}; pass an nn.Module")


def _own(name: str, module: SqueezeExcite) -> Gate:
    low, neutral, high = _values_of(reference.GATES[module.gate_name])
    return Gate(name, "senet", module.channels, module.gate_name, low, neutral, high, module)


def _other(name: str, module: nn.Module) -> Gate | None:
    """``module`` as a gate, judged by its parts; None if they are not those of an SE gate."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return None  # containers do not multiply
    parts = [(path, part) for path, part in module.named_modules() if not any(part.children())]
    if len(parts) > 10 or any(True for part in module.modules() if any(part.children()) and part._parameters):
        return None
    sizes = [size for size in (_pointwise(part) for _, part in parts) if size is not None]
    with_weights = [part for _, part in parts if any(True for _ in part.parameters()) and _pointwise(part) is None]
    if any("norm" not in type(part).__name__.lower() for part in with_weights) or len(with_weights) > 1:
        return None
    kind = _kind(sizes)
    last = _gate_function(parts)
    if kind is None or last is None:
        return None
    try:
        low, neutral, high = _values_of(last.forward)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None  # not an elementwise function, such as a gate with two inputs
    return Gate(name, kind, sizes[0][0], type(last).__name__, low, neutral, high, module, last)


def _kind(sizes: list[tuple[int, int]]) -> str | None:
    if len(sizes) == 1 and sizes[0][0] == sizes[0][1]:
        return "one-fc"
    return "two-fc" if len(sizes) == 2 and sizes[0] == sizes[1][::-1] else None


def _pointwise(part: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a 1×1 convolution or a linear layer."""
    if isinstance(part, nn.Linear):
        return part.in_features, part.out_features
    if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and part.groups == 1:
        return (part.in_channels, part.out_channels) if set(part.kernel_size) == {1} else None
    return None


def _gate_function(parts: list[tuple[str, nn.Module]]) -> nn.Module | None:
    """The part that computes the gate function, found by its attribute name or else by its class."""
    free = [(path.rpartition(".")[2], part) for path, part in parts if not any(True for _ in part.parameters())]
    named = [part for name, part in free if name in _GATE_NAMES]
    kinds = [part for _, part in free if any(word in type(part).__name__.lower() for word in ("sigmoid", "tanh"))]
    chosen = named or kinds
    return chosen[0] if len(chosen) == 1 else None


def _values_of(function: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    """The values of a gate function at −∞, 0, and ∞."""
    with torch.no_grad():
        low, neutral, high = function(torch.tensor([[-_FAR, 0.0, _FAR]], device="cpu"))[0].tolist()
    return (low if low > -_UNBOUNDED else -torch.inf), neutral, (high if high < _UNBOUNDED else torch.inf)


def _of_ours(receive: Receive) -> Callable[..., None]:
    def hook(module: SqueezeExcite, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        gate = module.gate(*args, **kwargs)
        receive(gate if gate.ndim == 2 else gate.flatten(2).mean(2))

    return hook


def _of_others(latest: deque[Tensor], channels: int, receive: Receive) -> Callable[..., None]:
    checked = False

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal checked
        gate = latest.pop() if latest else None
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if not checked:
            if x is None or gate is None or not _multiplies(x, gate, output, channels):
                receive(None)
                return
            checked = True
        receive(None if gate is None else gate.flatten(1))

    return hook


def _multiplies(x: Tensor, gate: Tensor, output: Any, channels: int) -> bool:
    """Whether the output is gate · input, with one factor per image and channel."""
    if not isinstance(output, Tensor) or output.shape != x.shape or gate.numel() != x.shape[0] * channels:
        return False
    if gate.ndim < x.ndim:
        gate = gate.reshape(*gate.shape, *(1,) * (x.ndim - gate.ndim))
    tolerance = 8 * torch.finfo(output.dtype).eps
    return gate.shape[0] == x.shape[0] and torch.allclose(output, x * gate, rtol=tolerance, equal_nan=True)
