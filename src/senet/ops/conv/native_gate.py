"""Inference on the CPU: the early gate, and gate, shortcut and ReLU in one sweep, in C++ (inference.hpp)."""

import torch
from torch import Tensor

from senet.ops.border import UnsuitedMapError
from senet.ops.csrc import build
from senet.ops.layout import in_layout, is_last
from senet.ops.reference import FullyConnected, squeeze, table_dtype
from senet.ops.tail.native import TYPES, call
from senet.ops.tail.native_batch_norm import GATE_NUMBERS

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


def number_of(excitation: FullyConnected) -> int:
    """Its kind, as inference.hpp numbers them."""
    return GATE_NUMBERS[excitation.gate] + len(GATE_NUMBERS) * ACTIVATION_NUMBERS[excitation.activation]


def gate_of(h: Tensor, excitation: FullyConnected) -> Tensor:
    """See ``early_gate.gate_of``: one call instead of a dozen operations."""
    e, out, dtype = excitation, excitation.w2.shape[0], table_dtype(h.dtype)
    if h.ndim < 3 or h.shape[1] != e.w1.shape[1] or not h.is_cpu:
        raise UnsuitedMapError(f"this gate takes no map of {tuple(h.shape)} on {h.device}")
    if dtype != e.w1.dtype or h.dtype not in TYPES:
        return e(squeeze(h))
    h = h if is_last(h) else h.contiguous()
    gate = torch.empty(h.shape[0], out, dtype=dtype, device=h.device)
    call("gate", h, h, out, e.w1.shape[0], number_of(e), e.w1, e.b1, e.w2, e.b2, gate)
    return gate


def gated_sum_(u: Tensor, gate: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """δ(gate·u + shortcut) in place of ``u``."""
    last = not u.is_contiguous()
    shortcut = in_layout(shortcut, last)
    call("gated_sum", u, u, gate, shortcut, int(relu))
    return u
