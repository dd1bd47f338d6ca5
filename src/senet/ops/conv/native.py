"""Convolutions for inference on the CPU: our own for float32 (convolutions.hpp), and oneDNN's otherwise.

The weights are packed once. Our convolutions apply gate, shortcut, and activation in the epilogue, so SE needs no sweep
of its own (docs/zero-tax.md).
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

# Our own convolutions are used where they are no slower than oneDNN's, which do not pack the feature map. These limits
# were measured (benchmarks/convolutions.py).
_WASTE = 1.15  # direct: largest ratio of computed to existing output channels
_WASTE_WINOGRAD = 1.5
_TAPS = 8192  # without a gate: the largest number of packed positions, counted once per tap

# One dimension of Winograd's F(2, 3): maps three weights to four factors.
_FACTORS = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))

# The bounds without an activation.
UNBOUNDED = (-math.inf, math.inf)

_convolution: Any = torch.ops.mkldnn._convolution_pointwise.default if torch.backends.mkldnn.is_available() else None


def _in_panels(weight: Tensor) -> Tensor:
    """(…, out, c) → (…, out / PANEL, c, PANEL), padded with zeros: the right operand of products.hpp."""
    panel = constant("panel")
    weight = F.pad(weight, (0, 0, 0, -weight.shape[-2] % panel))
    return weight.unflatten(-2, (-1, panel)).transpose(-1, -2).contiguous()


def _factors(weight: Tensor) -> Tensor:
    """(out, c, 3, 3) → (16, out, c): the transformed weights of Winograd's F(2×2, 3×3), computed in float64."""
    g = torch.tensor(_FACTORS, dtype=torch.float64, device=weight.device)
    return torch.einsum("ai,ocij,bj->aboc", g, weight.double(), g).flatten(0, 1).to(weight.dtype)


class OwnConv2d:
    """A float32 convolution in C++; Winograd's method for 3×3 kernels with stride 1.

    Args:
        weight, bias: (out, c, k, k) and (out), with the norm folded in.
        stride, padding, dilation: the same for height and width.
        low, high: bounds of the activation.
    """

    KEPT = 64  # input shapes in the cache

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
        """Let calls with ``gated`` multiply by the gate of the mean of x. Only for 1×1 convolutions with stride 1."""
        self.excitation = excitation
        self._excitation = as_arguments(excitation)

    @staticmethod
    def why_not(weight: Tensor, geometry: tuple[Any, ...], bounds: tuple[float, float] | None) -> str | None:
        """Why oneDNN computes a convolution, or None if it is computed here.

        Args:
            weight: (out, c, k, k).
            geometry: padding, stride, dilation, and groups.
            bounds: bounds of the activation; None if it is not a clamp.
        """
        *sides, groups = geometry
        out, c, *kernel = weight.shape
        if groups != 1 or bounds is None or any(one != other for one, other in (*sides, kernel)):
            return "it has groups, an activation other than a clamp, or settings that differ for height and width"
        chunk, panel = constant("chunk"), constant("panel")
        if c % chunk or kernel[0] not in (1, 3):
            return "its input channels are not a multiple of 16, or its kernel is neither 1×1 nor 3×3"
        if weight.dtype != torch.float32 or panel < 16:
            return "only float32 with AVX2 or AVX-512 was measured"
        winograd = kernel == [3, 3] and sides[1:] == [[1, 1], [1, 1]] and out % chunk == 0
        waste = -(-out // panel) * panel / out
        return "it has too few output channels" if waste > (_WASTE_WINOGRAD if winograd else _WASTE) else None

    def takes(self, x: Tensor, alone: bool) -> bool:
        """Whether to use this convolution for ``x``; ``alone``: without a gate, which would otherwise cost a sweep."""
        if not is_map(x, self.c, torch.float32) or x.ndim != 4 or not is_last(x):
            return False
        if min(x.shape[2:]) + self.reach < 0:
            return False  # PyTorch raises an error: the kernel is larger than the feature map
        return self.winograd or not alone or x.numel() <= self._largest

    def gate_address(self, gated: bool) -> int:
        """The address of the gate's excitation; 0 without a gate."""
        return ctypes.addressof(self._excitation) if gated else 0

    def call_for(self, shape: torch.Size, threads: int) -> tuple[Any, list[int]]:
        """The arguments for C++ that depend on the input shape, and the shape of the result."""
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
        """δ(gate·(convolution(x) + bias) + shortcut), written to ``into`` or to a new tensor.

        Shapes: x is (N, c, H, W); the shortcut and the result are (N, out, H', W'). All are channels_last. ``into`` may
        be the shortcut. The gate is used only if ``gated`` is true.
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
    """A convolution with bias and activation. We pack its weights once, or oneDNN packs them once per input shape.

    Args:
        weight, bias: parameters of the convolution, with the norm folded in.
        stride, padding, dilation, groups: geometry of the convolution.
        activation: oneDNN's name: ``"none"``, ``"relu"``, or ``"hardtanh"`` with ``bounds``.
        bounds: bounds of ``"hardtanh"``.
    """

    KEPT = 8  # packed weights in the cache, which must not grow without limit if the image size varies

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
            raise UnsuitedMapError(
                f"this convolution does not support a {x.dtype} feature map of shape {tuple(x.shape)} on {x.device}"
            )
        if packed is None:
            packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, list(x.shape))
            with self._packing:
                if len(self.packed) >= self.KEPT:
                    self.packed.pop(next(iter(self.packed)))
                self.packed[x.shape] = packed
        return packed

    def _suits(self, x: Tensor) -> bool:
        """Whether ``x`` has the number of axes, the channels, and the size that the convolution needs."""
        padding, _, dilation, groups = self.geometry
        _, c, *kernel = self.weight.shape
        if x.ndim != 4 or x.shape[1] != c * groups:
            return False
        sides = zip(x.shape[2:], kernel, padding, dilation, strict=True)
        return all(side + 2 * p > d * (k - 1) for side, k, p, d in sides)

    def __call__(self, x: Tensor) -> Tensor:
        """activation(convolution(x) + bias), a new feature map.

        Raises:
            UnsuitedMapError: the convolution does not support ``x``.
        """
        if self.own is not None and self.own.takes(x, alone=True):
            return self.own(x)
        padding, stride, dilation, groups = self.geometry
        weight = self._weight_for(x)
        return _convolution(x, weight, self.bias, padding, stride, dilation, groups, self.activation, self.bounds, "")

    def add_to(self, shortcut: Tensor, x: Tensor, relu: bool) -> Tensor:
        """δ(shortcut + convolution(x) + bias), in place in ``shortcut``."""
        if self.own is not None and self.own.takes(x, alone=True) and is_last(shortcut):
            return self.own(x, shortcut, relu, into=shortcut)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            shortcut, x, self._weight_for(x), self.bias, *self.geometry, "add", 1.0, "relu" if relu else None, [], ""
        )

    def take_gate(self, excitation: FullyConnected) -> None:
        """Let ``gated`` multiply by the gate of the mean of x. Only for 1×1, stride 1, and no activation."""
        self.excitation = excitation
        if self.own is not None:
            self.own.take_gate(excitation)

    def gated(self, x: Tensor, shortcut: Tensor | None, relu: bool, overwrites: bool) -> Tensor:
        """δ(gate·(convolution(x) + bias) + shortcut), in place in ``shortcut`` if ``overwrites`` is true.

        The shortcut, if any, has the shape and dtype of the convolution's output.
        """
        own = self.own if shortcut is None or is_last(shortcut) else None
        if own is not None and own.takes(x, alone=False):
            return own(x, shortcut, relu, into=shortcut if overwrites else None, gated=True)
        u = self(x)
        return gated_sum_(u, gate_of(x, self.excitation), shortcut, relu)


class PackedLinear:
    """An FC for a few rows, with its weights packed once. PyTorch packs them at every call.

    Args:
        weight, bias: (out, c), and (out) or None.
    """

    ROWS = 64  # the largest number that was measured (benchmarks/convolutions.py)

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        taken = self.why_not(weight) is None
        there = weight.new_zeros(weight.shape[0]) if bias is None else bias
        self.own = OwnConv2d(weight[:, :, None, None], there, 1, 0, 1, *UNBOUNDED) if taken else None

    @staticmethod
    def why_not(weight: Tensor) -> str | None:
        """Why PyTorch computes an FC, or None if it is computed here."""
        return OwnConv2d.why_not(weight[:, :, None, None], ([0, 0], [1, 1], [1, 1], 1), UNBOUNDED)

    def __call__(self, x: Tensor) -> Tensor:
        """(…, c) → (…, out)."""
        if self.own is not None and x.ndim == 2 and len(x) <= self.ROWS:
            rows = x.t()[None, :, :, None]  # the positions of one image, channels_last
            if self.own.takes(rows, alone=False):
                return self.own(rows)[0, :, :, 0].t()
        return F.linear(x, self.weight, self.bias)
