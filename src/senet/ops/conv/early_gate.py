"""Inference without a tax: the gate is computed before the last convolution (docs/zero-tax.md).

Global average pooling commutes with a 1×1 convolution and with a folded norm: mean(W₃·h + b₃) = W₃·mean(h) + b₃. So the
gate is a function of h, the input of the block's last 1×1 convolution, which has a quarter of the channels. The first
FC layer is multiplied with that convolution in advance: W₁·(W₃·mean(h) + b₃) + b₁ = (W₁·W₃)·mean(h) + (W₁·b₃ + b₁).

Shapes: h (N, C, *S), weight (O, C, 1, 1), gate (N, O); R bottleneck channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.ops import reference
from senet.ops.conv import native_gate as native
from senet.ops.reference import FullyConnected

BACKENDS = ("reference", "native", "triton")


@torch.no_grad()
def fold_norm(conv: nn.Conv2d | nn.Linear, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with its frozen batch norm folded in, computed in float64."""
    weight = conv.weight.double()
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.double()
    if norm is not None:
        g = torch.rsqrt(norm.running_var.double() + norm.eps)
        g = g if norm.weight is None else g * norm.weight.double()
        weight, bias = weight * g.reshape(-1, *(1,) * (weight.ndim - 1)), (bias - norm.running_mean.double()) * g
        bias = bias if norm.bias is None else bias + norm.bias.double()
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


@torch.no_grad()
def move_before(weight: Tensor, bias: Tensor, excitation: FullyConnected) -> FullyConnected:
    """The excitation as a function of the mean of h, the input of the 1×1 convolution (``weight``, ``bias``).

    Its first FC layer is (R, C) instead of (R, O). Its dtype is float32, or float64 for float64 weights.
    """
    w1 = excitation.w1.flatten(1).double()
    b1 = w1 @ bias.double()
    b1 = b1 if excitation.b1 is None else b1 + excitation.b1.double()
    return as_tables(excitation._replace(w1=w1 @ weight.flatten(1).double(), b1=b1), weight.dtype)


@torch.no_grad()
def as_tables(excitation: FullyConnected, dtype: torch.dtype) -> FullyConnected:
    """A copy of the excitation with (R, C) and (C, R) matrices in the dtype of tables, detached from its module."""
    table = reference.table_dtype(dtype)

    def own(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(table).contiguous().clone()

    e = excitation
    w1, w2 = e.w1.flatten(1).detach().to(table).contiguous(), e.w2.flatten(1).detach().to(table).contiguous().clone()
    return FullyConnected(w1, own(e.b1), w2, own(e.b2), e.gate, e.activation)


def why_not(backend: str, weight: Tensor) -> str | None:
    """The reason why a backend's inference kernels do not support the device or dtype of ``weight``, or None."""
    if backend == "native":
        return native.why_not(weight)
    if backend == "triton" and weight.device.type != "cuda":
        return "the network is not on a CUDA device"
    if backend == "triton" and weight.dtype == torch.float64:
        return "Triton's matrix product supports float16, bfloat16, and float32"
    return None


def gate_of(h: Tensor, excitation: FullyConnected, backend: str) -> Tensor:
    """The gate, computed from the mean of ``h``, (N, C, *S) → (N, O)."""
    if backend == "native":
        return native.gate_of(h, excitation)
    return excitation(reference.squeeze(h))


def gated_sum(u: Tensor, gate: Tensor, shortcut: Tensor | None, relu: bool, backend: str) -> Tensor:
    """δ(gate·u + shortcut); overwrites ``u`` if the backend supports it."""
    if backend == "native":
        return native.gated_sum_(u, gate, shortcut, relu)
    if backend == "triton":
        from senet.ops.tail import triton as triton_kernels  # deferred: importing Triton is slow

        return triton_kernels.scale_add_relu(u, gate, shortcut, relu)
    y = reference.scale(u, gate)
    y = y if shortcut is None else y + shortcut
    return torch.relu(y) if relu else y


def gated_pointwise(
    h: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, shortcut: Tensor | None, relu: bool, backend: str
) -> Tensor:
    """δ(gate·(weight·h + bias) + shortcut): a 1×1 convolution with stride 1 and the tail in its epilogue."""
    if backend == "triton":
        from senet.ops.conv import triton as triton_gemm

        return triton_gemm.gated_pointwise(h, weight.flatten(1), bias, gate, shortcut, relu)
    return gated_sum(F.conv2d(h, weight, bias), gate, shortcut, relu, backend)


def biased_sum(u: Tensor, bias: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """δ(u + bias + shortcut) in one Triton kernel; ``bias`` is (O,), the shortcut has the shape of ``u`` or is None."""
    from senet.ops.tail import triton as triton_kernels  # deferred: importing Triton is slow

    return triton_kernels.elementwise(u, None, torch.ones_like(bias), bias, shortcut, None, relu=relu)
