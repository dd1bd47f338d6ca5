"""Inference on the CPU: oneDNN's convolutions with packed weights; gate, shortcut and ReLU in C++ (inference.hpp)."""

import threading
from typing import Any

import torch
from torch import Tensor

from senet.ops.layout import in_layout, is_last
from senet.ops.native import build
from senet.ops.native.batch_norm_tail import GATE_NUMBERS
from senet.ops.native.sweeps import TYPES, call
from senet.ops.reference import FullyConnected, squeeze, table_dtype

# The numbers of inference.hpp: what stands between the two FCs.
ACTIVATION_NUMBERS = {"relu": 0, "silu": 1, "hardswish": 2}


def why_not(weight: Tensor) -> str | None:
    """Why this cannot run for a network with weights like ``weight``; None if it can."""
    if weight.device.type != "cpu":
        return "the network is not on the CPU"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return "oneDNN takes float32 and bfloat16"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    return build.why_not()


def gate_of(h: Tensor, excitation: FullyConnected) -> Tensor:
    """See ``early_gate.gate_of``: one call instead of a dozen operations."""
    e, out, dtype = excitation, excitation.w2.shape[0], table_dtype(h.dtype)
    # C++ would read past the end where PyTorch says what is wrong, or computes in the map's own type.
    if (h.shape[1], dtype, h.device) != (e.w1.shape[1], e.w1.dtype, e.w1.device) or h.dtype not in TYPES:
        return e(squeeze(h))
    h = h if is_last(h) else h.contiguous()
    gate = torch.empty(h.shape[0], out, dtype=dtype, device=h.device)
    kind = GATE_NUMBERS[e.gate] + len(GATE_NUMBERS) * ACTIVATION_NUMBERS[e.activation]
    call("gate", h, h, out, e.w1.shape[0], kind, e.w1, e.b1, e.w2, e.b2, gate)
    return gate


def gated_sum_(u: Tensor, gate: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """δ(gate·u + shortcut) in place of ``u``."""
    last = not u.is_contiguous()
    shortcut = in_layout(shortcut, last)
    call("gated_sum", u, u, gate, shortcut, int(relu))
    return u


_convolution: Any = torch.ops.mkldnn._convolution_pointwise.default if torch.backends.mkldnn.is_available() else None


class PackedConv2d:
    """A convolution with bias and activation, its weights packed by oneDNN for the shapes that it meets.

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

    def _weight_for(self, x: Tensor) -> Tensor:
        packed = self.packed.get(x.shape)
        if packed is None:
            packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, list(x.shape))
            with self._packing:
                if len(self.packed) >= self.KEPT:
                    self.packed.pop(next(iter(self.packed)))
                self.packed[x.shape] = packed
        return packed

    def __call__(self, x: Tensor) -> Tensor:
        """activation(convolution(x) + bias), a new map."""
        padding, stride, dilation, groups = self.geometry
        weight = self._weight_for(x)
        return _convolution(x, weight, self.bias, padding, stride, dilation, groups, self.activation, self.bounds, "")

    def add_to(self, shortcut: Tensor, x: Tensor, relu: bool) -> Tensor:
        """δ(shortcut + convolution(x) + bias), in place of ``shortcut``."""
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            shortcut, x, self._weight_for(x), self.bias, *self.geometry, "add", 1.0, "relu" if relu else None, [], ""
        )
