"""The modules of the inference form: convolutions with folded norm and activation, and gated tails."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.ops.border import UnsuitedMapError
from senet.ops.conv import early_gate
from senet.ops.conv import native_gate as native
from senet.ops.conv.native import OwnConv2d, PackedConv2d, PackedLinear
from senet.ops.layout import is_last, prepared
from senet.ops.reference import FullyConnected

# name → what it is in PyTorch (in place), oneDNN's name for it, and its bounds.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str, list[float]]] = {
    "relu": (torch.relu_, "relu", []),
    "relu6": (functools.partial(F.hardtanh, min_val=0.0, max_val=6.0), "hardtanh", [0.0, 6.0]),
    "silu": (F.silu, "swish", []),
    "hardswish": (F.hardswish, "hardswish", []),
}


def _in_plain_operations() -> bool:
    """Whether compilers are to see the operations, or autocast is to choose their types."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@dataclass(frozen=True)
class Convolved:
    """What a module does as one convolution of our own: see ``OwnConv2d``."""

    own: OwnConv2d
    relu: bool = False
    gated: bool = False
    overwrites: bool = False


class FoldedConv2d(nn.Module):
    """A convolution with its frozen norm folded in and, if there is one, its activation and the sum before it.

    Args:
        conv, norm: what is folded; the weights are copied.
        activation: a name of ``ACTIVATIONS``, or None.
        backend: ``"native"`` packs the weights for C++ or oneDNN; ``"triton"`` adds the bias and takes the ReLU in one
            pass, where PyTorch takes two; else ``F.conv2d``.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, activation: str | None, backend: str) -> None:
        super().__init__()
        weight, bias = early_gate.fold_norm(conv, norm)
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.stride, self.dilation = list(conv.stride), list(conv.dilation)
        self.padding = [int(side) for side in conv.padding]
        self.groups = conv.groups
        self.activation = activation
        self._packed: PackedConv2d | None = None
        self._in_one_pass = backend == "triton"
        if backend == "native":
            _, name, bounds = ACTIVATIONS[activation] if activation else (None, "none", [])
            geometry = (self.stride, self.padding, self.dilation, self.groups)
            self._packed = PackedConv2d(weight, bias, *geometry, name, bounds)

    @property
    def is_pointwise(self) -> bool:
        """Whether it is an ungrouped 1×1 convolution that keeps the resolution, without an activation."""
        return (
            tuple(self.weight.shape[2:]) == (1, 1)
            and self.groups == 1
            and self.stride == [1, 1]
            and self.padding == [0, 0]
            and self.activation is None
        )

    def fits(self, x: Tensor, other: Tensor) -> bool:
        """Whether ``other`` has the shape and type of the convolution of ``x``, so that it may take in their sum."""
        if not isinstance(other, Tensor) or (other.dtype, other.device) != (x.dtype, x.device) or x.ndim != 4:
            return False
        sides = zip(x.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        lengths = [(side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in sides]
        return [*other.shape] == [x.shape[0], self.weight.shape[0], *lengths]

    def step(self, x: Tensor) -> Convolved | None:
        """What this does with a map; None where it is not a single convolution of our own."""
        own = None if self._packed is None else self._packed.own
        return Convolved(own) if own is not None and own.takes(x, alone=True) else None

    def runner(self) -> Callable[..., Tensor]:
        """What computes this outside of ``torch.compile``, without the cost of a module's call."""
        return self.forward if self._packed is None else self._packed

    def with_sum(self, x: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
        """convolution(x) + shortcut, and the ReLU, on a GPU: one pass over the convolution's output, not three."""
        y = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        return early_gate.biased_sum(y, self.bias, shortcut, relu)

    def forward(self, x: Tensor) -> Tensor:
        """activation(convolution(x)), a new map."""
        if self._packed is not None and not _in_plain_operations():
            return self._packed(x)
        if x.ndim != 4:  # PyTorch's takes one image, too, the norm and the gate that are in here do not
            raise UnsuitedMapError(f"expected a feature map (N, C, H, W), got shape {tuple(x.shape)}")
        if self._in_one_pass and x.is_cuda and not _in_plain_operations():
            y = self.with_sum(x, None, self.activation == "relu")
            return y if self.activation in (None, "relu") else ACTIVATIONS[self.activation][0](y)
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return y if self.activation is None else ACTIVATIONS[self.activation][0](y)


class FoldedLinear(nn.Module):
    """An FC whose weights are packed once (``PackedLinear``); they are copied."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", linear.weight.detach().clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self._packed = PackedLinear(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, c) → (…, out)."""
        return F.linear(x, self.weight, self.bias) if _in_plain_operations() else self._packed(x)


class FoldedSum(nn.Module):
    """δ(convolution(x) + shortcut); ``overwrites`` says that nobody reads the shortcut afterwards."""

    def __init__(self, conv: FoldedConv2d, relu: bool, overwrites: bool) -> None:
        super().__init__()
        self.conv, self.relu, self.overwrites = conv, relu, overwrites

    def step(self, x: Tensor, shortcut: Tensor) -> Convolved | None:
        """See ``FoldedConv2d.step``."""
        step = self.conv.step(x)
        if step is None or not self.overwrites or not self.conv.fits(x, shortcut) or not is_last(shortcut):
            return None
        return Convolved(step.own, self.relu, overwrites=True)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """``shortcut`` has the shape of the convolution's output, or one that is broadcast with it."""
        packed = None if not self.overwrites or _in_plain_operations() else self.conv._packed
        if packed is not None and self.conv.fits(x, shortcut):
            return packed.add_to(shortcut, x, self.relu)
        alone = self.conv.activation is None and self.conv._in_one_pass and not _in_plain_operations()
        if alone and x.is_cuda and self.conv.fits(x, shortcut):
            return self.conv.with_sum(x, shortcut, self.relu)
        y = self.conv(x) + shortcut
        return torch.relu_(y) if self.relu else y


class Tables(nn.Module):
    """The weights of an excitation as buffers, which compilers take for inputs."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None

    def __init__(self, excitation: FullyConnected) -> None:
        super().__init__()
        self._own = excitation
        for name in ("w1", "b1", "w2", "b2"):
            self.register_buffer(name, getattr(excitation, name))

    @property
    def excitation(self) -> FullyConnected:
        """The excitation of the buffers as they are."""
        if self.w1 is self._own.w1:
            return self._own
        return self._own._replace(w1=self.w1, b1=self.b1, w2=self.w2, b2=self.b2)


class FoldedTail(nn.Module):
    """δ(SE(convolution(x)) + shortcut), with the gate from x where the convolution is 1×1 (docs/zero-tax.md).

    Args:
        conv: the block's last convolution; an activation of its own stands before the gate.
        excitation: that of the gate behind it; its squeeze is the average.
        relu: whether a ReLU follows.
        overwrites: whether nobody reads the shortcut afterwards.
        backend: one of ``early_gate.BACKENDS``.
    """

    def __init__(
        self, conv: FoldedConv2d, excitation: FullyConnected, relu: bool, overwrites: bool, backend: str
    ) -> None:
        super().__init__()
        self.conv, self.relu, self.overwrites, self.backend = conv, relu, overwrites, backend
        self.early = conv.is_pointwise
        if self.early:
            tables = early_gate.move_before(conv.weight, conv.bias, excitation)
            if conv._packed is not None:
                conv._packed.take_gate(tables)
        else:
            tables = early_gate.as_tables(excitation, conv.weight.dtype)
        self.gate = Tables(tables)
        # In one look-up: at batch 1 a network's time is a few hundred such steps.
        self._native = None if conv._packed is None else (conv._packed, tables)

    def step(self, x: Tensor, shortcut: Tensor | None = None) -> Convolved | None:
        """See ``FoldedConv2d.step``."""
        own = None if self.conv._packed is None or not self.early else self.conv._packed.own
        if own is None or not own.takes(x, alone=False):
            return None
        if shortcut is not None and not (self.conv.fits(x, shortcut) and is_last(shortcut)):
            return None
        return Convolved(own, self.relu, gated=True, overwrites=self.overwrites and shortcut is not None)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """``shortcut`` is None, or has the shape of the convolution's output, or one that is broadcast to it."""
        if self._native is not None and not _in_plain_operations():
            packed, excitation = self._native
            if self.early and (shortcut is None or self.conv.fits(x, shortcut)):
                return packed.gated(x, shortcut, self.relu, self.overwrites)
            u = packed(x)
            gate = native.gate_of(x if self.early else u, excitation)
            backend = "native" if shortcut is None or _is_alike(shortcut, u) else "reference"
            return early_gate.gated_sum(u, gate, shortcut, self.relu, backend)
        backend = "reference" if self._native is not None or torch.compiler.is_compiling() else self.backend
        if self.early and backend == "triton" and (shortcut is None or self.conv.fits(x, shortcut)):
            gate = early_gate.gate_of(x, self.gate.excitation, backend)
            return early_gate.gated_pointwise(x, self.conv.weight, self.conv.bias, gate, shortcut, self.relu, backend)
        u = self.conv(x)
        gate = early_gate.gate_of(x if self.early else u, self.gate.excitation, backend)
        backend = backend if shortcut is None or _is_alike(shortcut, u) else "reference"
        return early_gate.gated_sum(u, gate, shortcut, self.relu, backend)


def _is_alike(shortcut: Tensor, u: Tensor) -> bool:
    """Whether the kernels can add it: else it is broadcast, or the sum is of another type."""
    alike = (u.shape, u.dtype, u.device)
    return isinstance(shortcut, Tensor) and (shortcut.shape, shortcut.dtype, shortcut.device) == alike


class FoldedGate(nn.Module):
    """SE by itself: gate·x, in place where nobody reads x afterwards (``overwrites``)."""

    def __init__(self, excitation: FullyConnected, dtype: torch.dtype, overwrites: bool, backend: str) -> None:
        super().__init__()
        self.gate = Tables(early_gate.as_tables(excitation, dtype))
        self.overwrites, self.backend = overwrites, backend

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *S) → the same shape."""
        backend = "reference" if torch.compiler.is_compiling() else self.backend
        gate = early_gate.gate_of(x, self.gate.excitation, backend)
        if backend != "native" or x.dtype not in native.TYPES or not x.is_cpu:
            return early_gate.gated_sum(x, gate, None, False, "reference" if backend == "native" else backend)
        u, _ = prepared(x)
        return native.gated_sum_(u if self.overwrites or u is not x else u.clone(), gate, None, False)
