"""Convolutions of inference on the CPU: our own for float32 (convolutions.hpp), oneDNN's for the rest.

The weights are packed once. A convolution takes gate, shortcut and activation into its epilogue: SE costs no sweep
(docs/zero-tax.md).
"""

import ctypes
import math
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from senet.ops.border import UnsuitedMapError, addresses, is_map
from senet.ops.conv.native_gate import as_arguments, gate_of, gated_sum_
from senet.ops.csrc.arguments import Convolution, Convolve
from senet.ops.csrc.calls import constant, fail, operation
from senet.ops.layout import is_last
from senet.ops.reference import FullyConnected

# Where our own are no slower than oneDNN's, which pack no maps: as measured (benchmarks/convolutions.py).
_WASTE = 1.15  # columns that are computed for one that is there, directly
_WASTE_WINOGRAD = 1.5
_TAPS = 8192  # positions that are packed, once for each tap, where no gate is taken in

# One dimension of Winograd's F(2, 3): the factors of three weights.
_FACTORS = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))

# Bounds of no activation at all.
UNBOUNDED = (-math.inf, math.inf)

_convolution: Any = torch.ops.mkldnn._convolution_pointwise.default if torch.backends.mkldnn.is_available() else None


def _in_panels(weight: Tensor) -> Tensor:
    """(…, out, c) → (…, out / PANEL, c, PANEL), panels filled up with zeros: the right side of products.hpp."""
    panel = constant("panel")
    weight = F.pad(weight, (0, 0, 0, -weight.shape[-2] % panel))
    return weight.unflatten(-2, (-1, panel)).transpose(-1, -2).contiguous()


def _factors(weight: Tensor) -> Tensor:
    """(out, c, 3, 3) → (16, out, c): the weights of Winograd's F(2×2, 3×3), computed in float64."""
    g = torch.tensor(_FACTORS, dtype=torch.float64, device=weight.device)
    return torch.einsum("ai,ocij,bj->aboc", g, weight.double(), g).flatten(0, 1).to(weight.dtype)


class OwnConv2d:
    """A float32 convolution in C++; 3×3 of stride 1 by Winograd's method.

    Args:
        weight, bias: (out, c, k, k) and (out), norm folded in.
        stride, padding, dilation: of both sides.
        low, high: bounds of the activation.
    """

    KEPT = 64  # shapes of maps that it remembers

    def __init__(
        self, weight: Tensor, bias: Tensor, stride: int, padding: int, dilation: int, low: float, high: float
    ) -> None:
        self.out, self.c, kernel, _ = weight.shape
        self.reach = 2 * padding - dilation * (kernel - 1) - 1
        self.low, self.high = low, high
        self.geometry = (kernel, stride, padding, dilation)
        self.winograd = self.geometry == (3, 1, padding, 1) and self.out % constant("chunk") == 0
        self.weight = _in_panels(_factors(weight) if self.winograd else weight.permute(0, 2, 3, 1).flatten(1))
        self._largest = _TAPS // kernel**2 * self.c * stride**2
        self.bias = bias.contiguous()
        self.excitation: FullyConnected | None = None
        self._excitation: Any = None
        self._calls: dict[tuple[Any, ...], tuple[Any, list[int]]] = {}
        self._run = operation("convolve")

    def take_gate(self, excitation: FullyConnected) -> None:
        """Let ``gated`` calls multiply with the gate of the mean of x: of a 1×1 convolution of stride 1."""
        self.excitation = excitation
        self._excitation = as_arguments(excitation)

    @staticmethod
    def why_not(weight: Tensor, geometry: tuple[Any, ...], bounds: tuple[float, float] | None) -> str | None:
        """Why a convolution is left to oneDNN; None if it is computed here.

        Args:
            weight: (out, c, k, k).
            geometry: padding, stride, dilation and groups.
            bounds: of the activation; None if it has another form.
        """
        *sides, groups = geometry
        out, c, *kernel = weight.shape
        if groups != 1 or bounds is None or any(one != other for one, other in (*sides, kernel)):
            return "it has groups, another activation or sides of two kinds"
        chunk, panel = constant("chunk"), constant("panel")
        if c % chunk or kernel[0] not in (1, 3):
            return "it reads 16 channels at once, and is measured for 1×1 and 3×3"
        if weight.dtype != torch.float32 or panel < 16:
            return "this is measured for float32, with AVX2 and AVX-512"
        winograd = kernel == [3, 3] and sides[1:] == [[1, 1], [1, 1]] and out % chunk == 0
        waste = -(-out // panel) * panel / out
        return "it has few output channels" if waste > (_WASTE_WINOGRAD if winograd else _WASTE) else None

    def takes(self, x: Tensor, alone: bool) -> bool:
        """Whether this is to compute the convolution of a map; ``alone``: without a gate, which would cost a sweep."""
        if not is_map(x, self.c, torch.float32) or x.ndim != 4 or not is_last(x):
            return False
        if min(x.shape[2:]) + self.reach < 0:
            return False  # PyTorch says that the kernel is larger than the map
        return self.winograd or not alone or x.numel() <= self._largest

    def gate_address(self, gated: bool) -> int:
        """Where the gate's excitation lies; 0 where there is no gate."""
        return ctypes.addressof(self._excitation) if gated else 0

    def call_for(self, shape: torch.Size, threads: int) -> tuple[Any, list[int]]:
        """What C++ is told of maps of a shape, and the shape of the result."""
        known = self._calls.get((shape, threads))
        if known is not None:
            return known
        n, c, h, w = shape
        stride = self.geometry[1]
        out_h, out_w = (h + self.reach) // stride + 1, (w + self.reach) // stride + 1
        sides, weights = (n, c, h, w, self.out, out_h, out_w), addresses((self.weight, self.bias))
        call = Convolution(*sides, *self.geometry, threads, self.winograd, *weights, self.low, self.high)
        if len(self._calls) >= self.KEPT:
            self._calls.clear()
        self._calls[shape, threads] = known = (call, [n, self.out, out_h, out_w])
        return known

    def __call__(
        self, x: Tensor, shortcut: Tensor | None = None, relu: bool = False, into: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:  # fmt: skip
        """δ(gate·(convolution(x) + bias) + shortcut), written to ``into``, which may be the shortcut, or to a new map.

        Shapes: x (N, c, H, W), shortcut and result (N, out, H', W'); maps are channels_last. There is a gate if it is
        ``gated``.
        """
        threads = torch.get_num_threads()
        call, size = self.call_for(x.shape, threads)
        if into is None:
            into = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        gate, maps = self.gate_address(gated) if gated else 0, addresses((x, shortcut, into))
        error = self._run(Convolve.pack(ctypes.addressof(call), gate, relu, *maps))
        if error:
            fail(error)
        return into


class PackedConv2d:
    """A convolution with bias and activation, its weights packed by us, or by oneDNN for the shapes that it meets.

    Args:
        weight, bias: of the convolution, norm folded in.
        stride, padding, dilation, groups: of the convolution.
        activation: oneDNN's name, ``"none"``, ``"relu"`` or ``"hardtanh"`` with ``bounds``.
        bounds: of ``"hardtanh"``.
    """

    KEPT = 8  # packed forms; a network for images of all sizes does not collect them without end

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        activation: str,
        bounds: list[float],
    ) -> None:
        self.weight, self.bias = weight.contiguous(memory_format=torch.channels_last), bias
        self.geometry: tuple[Any, ...] = (padding, stride, dilation, groups)
        self.activation, self.bounds = activation, bounds
        self.packed: dict[torch.Size, Tensor] = {}
        self._packing = threading.Lock()
        self.own: OwnConv2d | None = None
        self.excitation: Any = None
        bounded = (bounds[0], bounds[1]) if activation == "hardtanh" else UNBOUNDED
        clamp = {"none": UNBOUNDED, "relu": (0.0, math.inf), "hardtanh": bounded}.get(activation)
        if OwnConv2d.why_not(weight, self.geometry, clamp) is None and clamp is not None:
            self.own = OwnConv2d(weight, bias, stride[0], padding[0], dilation[0], *clamp)

    def _weight_for(self, x: Tensor) -> Tensor:
        packed = self.packed.get(x.shape)
        if x.dtype != self.weight.dtype or not x.is_cpu or (packed is None and not self._suits(x)):
            raise UnsuitedMapError(f"this convolution takes no {x.dtype} map of {tuple(x.shape)} on {x.device}")
        if packed is None:
            packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, list(x.shape))
            with self._packing:
                if len(self.packed) >= self.KEPT:
                    self.packed.pop(next(iter(self.packed)))
                self.packed[x.shape] = packed
        return packed

    def _suits(self, x: Tensor) -> bool:
        """Whether a map has the axes, the channels and the size that the convolution takes."""
        padding, _, dilation, groups = self.geometry
        _, c, *kernel = self.weight.shape
        if x.ndim != 4 or x.shape[1] != c * groups:
            return False
        sides = zip(x.shape[2:], kernel, padding, dilation, strict=True)
        return all(side + 2 * p > d * (k - 1) for side, k, p, d in sides)

    def __call__(self, x: Tensor) -> Tensor:
        """activation(convolution(x) + bias), a new map.

        Raises:
            UnsuitedMapError: a map that the convolution does not take.
        """
        if self.own is not None and self.own.takes(x, alone=True):
            return self.own(x)
        padding, stride, dilation, groups = self.geometry
        weight = self._weight_for(x)
        return _convolution(x, weight, self.bias, padding, stride, dilation, groups, self.activation, self.bounds, "")

    def add_to(self, shortcut: Tensor, x: Tensor, relu: bool) -> Tensor:
        """δ(shortcut + convolution(x) + bias), in place of ``shortcut``."""
        if self.own is not None and self.own.takes(x, alone=True) and is_last(shortcut):
            return self.own(x, shortcut, relu, into=shortcut)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            shortcut, x, self._weight_for(x), self.bias, *self.geometry, "add", 1.0, "relu" if relu else None, [], ""
        )

    def take_gate(self, excitation: FullyConnected) -> None:
        """Let ``gated`` multiply with the gate of the mean of x: of a 1×1 convolution of stride 1, no activation."""
        self.excitation = excitation
        if self.own is not None:
            self.own.take_gate(excitation)

    def gated(self, x: Tensor, shortcut: Tensor | None, relu: bool, overwrites: bool) -> Tensor:
        """δ(gate·(convolution(x) + bias) + shortcut); in place of ``shortcut`` if it ``overwrites``.

        ``shortcut``, if any, has the shape and type of the convolution's output.
        """
        own = self.own if shortcut is None or is_last(shortcut) else None
        if own is not None and own.takes(x, alone=False):
            return own(x, shortcut, relu, into=shortcut if overwrites else None, gated=True)
        u = self(x)
        return gated_sum_(u, gate_of(x, self.excitation), shortcut, relu)


class PackedLinear:
    """An FC with its weights packed once, for a few rows: PyTorch's packs them anew at every call.

    Args:
        weight, bias: (out, c), and (out) or None.
    """

    ROWS = 64  # up to which it is measured (benchmarks/convolutions.py)

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        taken = self.why_not(weight) is None
        there = weight.new_zeros(weight.shape[0]) if bias is None else bias
        self.own = OwnConv2d(weight[:, :, None, None], there, 1, 0, 1, *UNBOUNDED) if taken else None

    @staticmethod
    def why_not(weight: Tensor) -> str | None:
        """Why an FC is left to PyTorch; None if it is computed here."""
        return OwnConv2d.why_not(weight[:, :, None, None], ([0, 0], [1, 1], [1, 1], 1), UNBOUNDED)

    def __call__(self, x: Tensor) -> Tensor:
        """(…, c) → (…, out)."""
        if self.own is not None and x.ndim == 2 and len(x) <= self.ROWS:
            rows = x.t()[None, :, :, None]  # the positions of one image, channels_last
            if self.own.takes(rows, alone=False):
                return self.own(rows)[0, :, :, 0].t()
        return F.linear(x, self.weight, self.bias)
